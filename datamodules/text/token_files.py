"""Token files: text that is tokenized once and memory-mapped for training.

A token file `corpus.bin` contains the tokens of all documents, each followed by the end-of-text
token, as little-endian uint16 or uint32. Two files belong to it: `corpus.documents.npy` with the
length and key of each document, and `corpus.json`, a header that describes the tokenizer. The
header is written last: a file without a header is incomplete.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.shared.bad_samples import BadSampleError, BadSamples, Triage
from datamodules.shared.files import MISSING, why_no_file
from datamodules.text.token_documents import (
    Document,
    TokenDocuments,
    starts_of,
    token_dtype,
    tokenize,
)
from diffmm.checks import DataError
from diffmm.tokenizers import Tokenizer

FORMAT = 1
DTYPES = ("uint16", "uint32")
DOCUMENT_FIELDS = np.dtype([("length", "<i8"), ("key", "<u8")])

_HEADER = {
    "dtype": str,
    "tokenizer": str,
    "tokenizer_fingerprint": str,
    "vocab_size": int,
    "num_documents": int,
    "num_tokens": int,
}
_MOST_HEADER = 2**16  # bytes


class MappedTokens:
    """The memory-mapped tokens of a file; each worker maps the file itself.

    Args:
        path: Path of the file.
        dtype: Data type of the tokens.
        vocab_size: Vocabulary size of the tokenizer. Ids are checked against it when they are
            read, because larger ids would crash a model and files are too large to check before a
            run.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], vocab_size: int) -> None:
        self._path, self._dtype, self._vocab_size = path, dtype, vocab_size
        self._tokens = np.memmap(path, dtype, mode="r")

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, span: slice) -> NDArray[np.integer]:
        tokens = self._tokens[span]
        if tokens.size and tokens.max() >= self._vocab_size:
            # No `file` argument: the file is not a sample, so it must not be quarantined.
            raise BadSampleError(
                f"token file {self._path} has the id {tokens.max()} among its tokens "
                f"{span.start} to {span.stop}, but the tokenizer has {self._vocab_size} tokens: "
                f"write it again"
            )
        return tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedTokens, (self._path, self._dtype, self._vocab_size)


def write_token_file(path: str | Path, documents: Iterable[Document], tokenizer: Tokenizer) -> Path:
    """Tokenize `documents` into the token file `path`, which ends in `.bin`.

    Files get their final names only when all of them are complete.

    Raises:
        ValueError: If the path does not end in `.bin`, or there is no text.
        FileExistsError: If a complete file exists.
    """
    path = Path(path)
    if path.suffix != ".bin":
        raise ValueError(f"the path of a token file must end in .bin, got {path}")
    if is_finished(path):
        raise FileExistsError(f"token file {path} already exists: remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(tokenizer.vocab_size)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as temporary:
        folder = Path(temporary)
        rows = []
        with open(folder / path.name, "wb") as file:
            for key, tokens in tokenize(documents, tokenizer):
                rows.append((len(tokens), key))
                file.write(tokens.tobytes())
        if not rows:
            raise ValueError(f"there is no text to write to {path}")
        table = np.array(rows, DOCUMENT_FIELDS)
        np.save(folder / _documents_path(path).name, table)
        header = {
            "format": FORMAT,
            "dtype": dtype.name,
            "tokenizer": tokenizer.name,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "num_documents": len(table),
            "num_tokens": int(table["length"].sum()),
        }
        (folder / _header_path(path).name).write_text(json.dumps(header, indent=2) + "\n", "utf-8")
        for final in (path, _documents_path(path), _header_path(path)):
            os.replace(folder / final.name, final)
    return path


def is_finished(path: Path) -> bool:
    """Whether the token file `path` is complete."""
    return _header_path(path).exists()


def read_token_files(
    paths: Sequence[str | Path], tokenizer: Tokenizer, triage: Triage | None = None
) -> TokenDocuments:
    """The memory-mapped documents of all token files; damaged ones are skipped if `triage` says so.

    Raises:
        FileNotFoundError: If a file does not exist or is incomplete.
        ValueError: If a file has another format or tokenizer.
        BadSampleError: If a file is damaged.
    """
    triage = triage or Triage(BadSamples())
    arrays: list[MappedTokens] = []
    tables = [np.empty(0, DOCUMENT_FIELDS)]
    for number, path in enumerate(map(Path, paths)):
        if triage.is_quarantined(path):
            continue
        triage.num_read += 1
        try:
            tokens, documents = _read_token_file(path, tokenizer, number)
        except BadSampleError as error:
            triage.note(error, instead="skipping it")
            continue
        arrays.append(tokens)
        tables.append(documents)
    table = np.concatenate(tables)
    lengths = table["length"].astype(np.int64)
    return TokenDocuments(arrays, starts_of(lengths), lengths, table["key"].copy())


def _read_token_file(
    path: Path, tokenizer: Tokenizer, number: int
) -> tuple[MappedTokens, NDArray[Any]]:
    name = f"token file {number} ({path})"
    _check_files(path, name)
    try:
        header = _read_header(_header_path(path))
        _check_maker(path, header, tokenizer)
        dtype = np.dtype(header["dtype"]).newbyteorder("<")
        num_tokens, rest = divmod(path.stat().st_size, dtype.itemsize)
        documents = _read_documents(_documents_path(path))
        found = f"{len(documents)} documents of {num_tokens} tokens"
        found += f" and {rest} bytes" if rest else ""
        declared = f"{header['num_documents']} documents of {header['num_tokens']} tokens"
        if found != declared:
            raise _DamageError(f"it has {found}, but its header says {declared}")
        lengths = documents["length"]
        # Also summed as floats, because 64-bit integers may overflow to the right sum.
        sums = int(lengths.sum()), int(lengths.sum(dtype=np.float64))
        if lengths.min() < 1 or sums[0] != num_tokens or sums[1] > 2 * num_tokens:
            raise _DamageError(f"the lengths of its documents do not add up to {num_tokens} tokens")
        return MappedTokens(path, dtype, tokenizer.vocab_size), documents
    except _DamageError as error:
        raise BadSampleError(f"{name} is damaged: {error}; write it again", path) from error


class _DamageError(Exception):
    """Damage of a token file; the message continues a sentence about it."""


def _check_files(path: Path, name: str) -> None:
    for needed in (path, _header_path(path), _documents_path(path)):
        fault = why_no_file(needed)
        if fault is not None and fault.startswith(MISSING):
            raise FileNotFoundError(
                f"token file {path} needs {needed}, which does not exist: "
                f"write token files with datamodules.text.data.write_token_file"
            )
        if fault is not None:
            raise BadSampleError(f"{name} needs {needed}, which {fault}", path)


def _read_header(path: Path) -> dict[str, Any]:
    """Read and check the header of a token file."""
    try:
        if (size := path.stat().st_size) > _MOST_HEADER:
            raise ValueError(f"it has {size} bytes")
        header = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _DamageError(f"its header {path} cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise _DamageError(f"its header {path} is not an object")
    if header.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {header.get('format')!r}, but this version reads {FORMAT}"
        )
    for field, kind in _HEADER.items():
        value = header.get(field)
        if type(value) is not kind or (isinstance(value, int) and not 0 < value < 2**62):
            raise _DamageError(f"its header {path} has {field} {value!r:.60}")
    if header["dtype"] not in DTYPES:
        raise _DamageError(f"its header has dtype {header['dtype']!r}, not {' or '.join(DTYPES)}")
    return header


def _check_maker(path: Path, header: dict[str, Any], tokenizer: Tokenizer) -> None:
    if header["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"{path} was written with tokenizer {header['tokenizer']!r} "
            f"({header['vocab_size']} tokens), not with {tokenizer.name!r} "
            f"({tokenizer.vocab_size} tokens)"
        )


def _read_documents(path: Path) -> NDArray[Any]:
    """Read the table of documents. Its dtype and length are checked against the file first, so that
    a wrong header can neither allocate memory nor create objects."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's warning about headers of Python 2
        try:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # NumPy raises various types
            raise _DamageError(f"{path} is not a table of documents: {error}") from error
        held, rest = divmod(os.fstat(file.fileno()).st_size - file.tell(), DOCUMENT_FIELDS.itemsize)
        if version != (1, 0) or dtype != DOCUMENT_FIELDS or shape != (held,) or rest or not held:
            raise _DamageError(
                f"{path} has {held} rows and {rest} bytes, but its header says {dtype} of shape "
                f"{shape}"
            )
        return np.fromfile(file, DOCUMENT_FIELDS, held)


def _header_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _documents_path(path: Path) -> Path:
    return path.with_suffix(".documents.npy")
