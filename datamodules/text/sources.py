"""Where text comes from."""

import hashlib
import sys
import sysconfig
import tokenize as python_source
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.shared.bad_samples import BadSampleError, BadSamples, Triage
from datamodules.shared.files import composed, glob_files, why_no_file
from datamodules.text.token_documents import Document, TokenDocuments, key_number, tokenize
from datamodules.text.token_files import read_token_files
from diffmm.checks import DataError
from diffmm.tokenizers import Tokenizer


class Corpus(ABC):
    """Anything that gives tokenized documents.

    Attributes:
        triage: what happens to a file that cannot be read: it is left out where that says so; by
            default it is refused.
    """

    triage: Triage = Triage(BadSamples())

    @abstractmethod
    def load(self, tokenizer: Tokenizer) -> TokenDocuments:
        """All documents as tokens."""

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in vars(self).items() if name != "triage"
        )
        return f"{type(self).__name__}({arguments})"


class TextSource(Corpus):
    """A corpus of texts."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, in an order that does not change."""

    @abstractmethod
    def state(self) -> str:
        """What changes when the documents change, for what is cached of them."""

    def fingerprint(self) -> str:
        """Names these documents in a cache."""
        content = f"{self!r} {self.state()}{' tolerant' if self.triage.tolerates else ''}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def load(self, tokenizer: Tokenizer) -> TokenDocuments:
        """All documents as tokens, in memory."""
        return TokenDocuments.in_memory(tokenize(self.documents(), tokenizer))


class StandardLibrary(TextSource):
    """The source files of the running interpreter's own standard library, without its tests.

    Real text that is on every machine: about 11 MiB with Python 3.11. Each file is a document.

    Args:
        max_bytes: leaves out files so that the rest is no larger, a sample of the whole.

    Raises:
        FileNotFoundError: (when read) where the interpreter comes without its sources.
        ValueError: if `max_bytes` is not positive.
    """

    LEFT_OUT = frozenset(
        ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
    )

    def __init__(self, max_bytes: int = 16 * 2**20) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self.max_bytes = max_bytes

    def documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_path("stdlib"))
        sizes = {
            path.relative_to(root).as_posix(): path.stat().st_size
            for path in glob_files(root, "**/*.py")
            if not self.LEFT_OUT.intersection(path.relative_to(root).parts)
            and why_no_file(path) is None
        }
        if not sizes:
            raise FileNotFoundError(
                f"the standard library of this interpreter has no source files in {root}: "
                f"choose another source, such as TextFolder"
            )
        chosen, total = [], 0
        # Not by the number that held-out splits are drawn by, or small samples would be one split.
        for name in sorted(sizes, key=lambda name: key_number(f"sampled {name}")):
            if total + sizes[name] <= self.max_bytes:
                total += sizes[name]
                chosen.append(name)
        for name in sorted(chosen):
            with python_source.open(root / name) as file:  # in the encoding that the file declares
                yield Document(name, file.read())

    def state(self) -> str:
        return sys.version


class TextFolder(TextSource):
    """The text files of a folder, each a document.

    A byte order mark at the beginning of a file is no part of its text.

    Args:
        root: the folder.
        pattern: which of its files, as in `pathlib`; `**/` also looks into its folders. Hidden
            files and folders are left out.
        separator: splits each file into documents where this string stands.
        encoding: of the files.

    Raises:
        ValueError: for an empty `separator`, or an encoding that Python does not know.
        FileNotFoundError: (when read) if there is no such folder, or no such file in it.
        BadSampleError: (when read) for a file that is not text in this encoding, naming it.
    """

    def __init__(
        self,
        root: str,
        pattern: str = "**/*.txt",
        separator: str | None = None,
        encoding: str = "utf-8",
    ) -> None:
        if separator == "":
            raise ValueError("separator must not be empty; None makes each file a document")
        try:
            "".encode(encoding)
        except LookupError as error:
            raise ValueError(f"encoding {encoding!r} is none of text that Python knows") from error
        self.root = root
        self.pattern = pattern
        self.separator = separator
        self.encoding = encoding

    def documents(self) -> Iterator[Document]:
        for number, file in enumerate(self._files()):
            if self.triage.is_quarantined(file):
                continue
            # The splits follow from names: they are alike on all systems.
            name = composed(file.relative_to(self.root).as_posix())
            self.triage.num_read += 1
            try:
                text = self._read(file)
            except DataError as error:
                bad = BadSampleError(f"file {number} ({file}) {error}", file)
                self.triage.note(bad, instead="it is left out")
                continue
            if self.separator is None:
                yield Document(name, text)
            else:
                for place, part in enumerate(text.split(self.separator)):
                    yield Document(f"{name}#{place}", part)

    def _read(self, file: Path) -> str:
        if fault := why_no_file(file):
            raise DataError(fault)
        try:
            return without_mark(file.read_text(self.encoding))
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(
                f"is not {self.encoding} text ({error}): give its encoding, or a pattern that "
                f"leaves it out"
            ) from error

    def state(self) -> str:
        stats = [(str(file), None if why_no_file(file) else file.stat()) for file in self._files()]
        return repr([(name, stat and (stat.st_size, stat.st_mtime_ns)) for name, stat in stats])

    def _files(self) -> list[Path]:
        folder = Path(self.root)
        if folder.exists() and not folder.is_dir():
            raise FileNotFoundError(
                f"{self.root} is no folder: give its folder as root, and its name as pattern"
            )
        if not folder.is_dir():
            raise FileNotFoundError(f"text folder {self.root} is not there")
        files = glob_files(folder, self.pattern)
        if not files:
            raise FileNotFoundError(f"no file in {self.root} matches {self.pattern!r}")
        return files


class TokenFiles(Corpus):
    """Token files, tokenized once by `write_token_file` and mapped into memory.

    Args:
        paths: of the `.bin` files.

    Raises:
        ValueError: if there is none; (when read) for one of another tokenizer.
        BadSampleError: (when read) for one that is damaged.
        FileNotFoundError: (when read) for one that is not there or not finished.
    """

    def __init__(self, paths: list[str]) -> None:
        if not paths:
            raise ValueError("TokenFiles needs at least one path")
        self.paths: Sequence[str] = paths

    def load(self, tokenizer: Tokenizer) -> TokenDocuments:
        return read_token_files(self.paths, tokenizer, self.triage)


def without_mark(text: str) -> str:
    """A text without the byte order mark that stands before it in some files."""
    return text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
