"""Sources of text."""

import codecs
import hashlib
import sys
import sysconfig
import tokenize as python_source
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from datamodules.shared.bad_samples import BadSampleError, BadSamples, Triage
from datamodules.shared.files import composed, glob_files, why_no_file
from datamodules.shared.folders import shown
from datamodules.text.token_documents import Document, TokenDocuments, key_number, tokenize
from datamodules.text.token_files import is_finished, read_token_files, write_token_file
from diffmm.checks import DataError
from diffmm.tokenizers import Tokenizer


class Corpus(ABC):
    """A collection of tokenized documents.

    Attributes:
        triage: How to handle a file that cannot be read: skip it, or, by default, raise an error.
    """

    triage: Triage = Triage(BadSamples())

    @abstractmethod
    def load(self, tokenizer: Tokenizer) -> TokenDocuments:
        """Load all documents as tokens."""

    def place(self) -> str:
        """Where the texts are, for messages: a folder, files, or a dataset."""
        return type(self).__name__

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in vars(self).items() if name != "triage"
        )
        return f"{type(self).__name__}({arguments})"


class TextSource(Corpus):
    """A corpus of texts."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Iterate over all documents in a fixed order."""

    @abstractmethod
    def state(self) -> str:
        """A string that changes when the documents change, for caching."""

    def fingerprint(self) -> str:
        """The name of these documents in a cache."""
        content = f"{self!r} {self.state()}{' tolerant' if self.triage.tolerates else ''}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def token_file(self, folder: str, tokenizer: Tokenizer) -> Path:
        """The token file of these documents in a cache, written now if it does not exist."""
        name = f"{type(self).__name__}-{self.fingerprint()}-{tokenizer.fingerprint}.bin"
        path = Path(folder, name)
        if not is_finished(path):
            with suppress(FileExistsError):  # another process may have written it
                write_token_file(path, self.documents(), tokenizer)
        return path

    def load(self, tokenizer: Tokenizer) -> TokenDocuments:
        """Load all documents as tokens, in memory."""
        return TokenDocuments.in_memory(tokenize(self.documents(), tokenizer))


class StandardLibrary(TextSource):
    """The source files of the Python standard library, without its tests, one document per file.

    Real text that is available on every machine: about 11 MiB with Python 3.11.

    Args:
        max_bytes: Maximum total size in bytes; a sample of the files that does not exceed it is
            used.

    Raises:
        FileNotFoundError: During reading, if the interpreter has no source files.
        ValueError: If `max_bytes` is not positive.
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
        # A different hash than that of held-out splits, or small samples would be in one split.
        for name in sorted(sizes, key=lambda name: key_number(f"sampled {name}")):
            if total + sizes[name] <= self.max_bytes:
                total += sizes[name]
                chosen.append(name)
        for name in sorted(chosen):
            with python_source.open(root / name) as file:  # uses the file's declared encoding
                yield Document(name, file.read())

    def state(self) -> str:
        return sys.version

    def place(self) -> str:
        return "the standard library"


class TextFolder(TextSource):
    """The text files of a folder, one document per file.

    A byte order mark at the beginning of a file is removed.

    Args:
        root: Path of the folder.
        pattern: Pattern of the files, as in `pathlib`, or several patterns; `**/` includes
            subfolders. Hidden files and folders are skipped.
        separator: A string at which each file is split into documents; None makes each file one
            document.
        encoding: Text encoding of the files.

    Raises:
        ValueError: If `separator` is empty, or Python does not know the encoding.
        FileNotFoundError: During reading, if the folder does not exist or no file matches.
        BadSampleError: During reading, if a file is not text in this encoding.
    """

    def __init__(
        self,
        root: str,
        pattern: str | list[str] = "**/*.txt",
        separator: str | None = None,
        encoding: str = "utf-8",
    ) -> None:
        if separator == "":
            raise ValueError("separator must not be empty; None makes each file a document")
        try:
            "".encode(encoding)
        except LookupError as error:
            raise ValueError(f"encoding {encoding!r} is not a known text encoding") from error
        self.root = root
        self.pattern = pattern
        self.separator = separator
        self.encoding = encoding

    def documents(self) -> Iterator[Document]:
        for number, file in enumerate(self._files()):
            if self.triage.is_quarantined(file):
                continue
            # Splits depend on names, so they must be the same on all systems.
            name = composed(file.relative_to(self.root).as_posix())
            self.triage.num_read += 1
            try:
                text = self._read(file)
            except DataError as error:
                bad = BadSampleError(f"file {number} ({file}) {error}", file)
                self.triage.note(bad, instead="skipping it")
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
                f"is not {self.encoding} text ({error}): set its encoding "
                f"(--data.source.encoding {_likely_encoding(file)}), or a pattern that excludes it "
                f"(--data.source.pattern)"
            ) from error

    def state(self) -> str:
        stats = [(str(file), None if why_no_file(file) else file.stat()) for file in self._files()]
        return repr([(name, stat and (stat.st_size, stat.st_mtime_ns)) for name, stat in stats])

    def place(self) -> str:
        patterns = [self.pattern] if isinstance(self.pattern, str) else self.pattern
        return f"{self.root} ({', '.join(patterns)})"

    def _files(self) -> list[Path]:
        folder = Path(self.root)
        if folder.exists() and not folder.is_dir():
            raise FileNotFoundError(
                f"{self.root} is not a folder: set --data.source.root to its folder and "
                f"--data.source.pattern to its name"
            )
        if not folder.is_dir():
            raise FileNotFoundError(f"text folder {self.root} does not exist")
        patterns = [self.pattern] if isinstance(self.pattern, str) else self.pattern
        files = sorted({file for pattern in patterns for file in glob_files(folder, pattern)})
        if not files:
            listed = " or ".join(map(repr, patterns))
            raise FileNotFoundError(f"no file in {self.root} matches {listed}")
        return files


def _likely_encoding(file: Path) -> str:
    """The encoding of the byte order mark at the beginning of a text file; `latin-1` without."""
    with file.open("rb") as opened:
        start = opened.read(4)
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    return "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"


class TokenFiles(Corpus):
    """Memory-mapped token files, written by `write_token_file`.

    Args:
        paths: Paths of the `.bin` files.

    Raises:
        ValueError: If there are no paths; during reading, if a file has another tokenizer.
        BadSampleError: During reading, if a file is damaged.
        FileNotFoundError: During reading, if a file does not exist or is incomplete.
    """

    def __init__(self, paths: list[str]) -> None:
        if not paths:
            raise ValueError("TokenFiles needs at least one path")
        self.paths: Sequence[str] = paths

    def load(self, tokenizer: Tokenizer) -> TokenDocuments:
        return read_token_files(self.paths, tokenizer, self.triage)

    def place(self) -> str:
        return shown(self.paths, 3)


def without_mark(text: str) -> str:
    """Remove the byte order mark from a text, if it has one."""
    return text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
