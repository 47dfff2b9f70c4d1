"""Token files: text that is tokenized once, and mapped into memory to train on.

A token file `corpus.bin` holds the tokens of all its documents, each with the end-of-text token at
its end, as little-endian uint16 or uint32. Beside it stand `corpus.documents.npy`, each document's
length and key, and `corpus.json`, a header that says what made it. The header is written last: a
file without one is not finished.
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
from datamodules.shared.files import why_no_file
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
    """The tokens of a file, mapped into memory; a worker that gets it maps the file anew.

    Args:
        path: of the file.
        dtype: of its tokens.
        vocab_size: of the tokenizer. Ids are compared with it when they are read: a model would
            crash on larger ones, and files are too large to look through before a run.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], vocab_size: int) -> None:
        self._path, self._dtype, self._vocab_size = path, dtype, vocab_size
        self._tokens = np.memmap(path, dtype, mode="r")

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, span: slice) -> NDArray[np.integer]:
        tokens = self._tokens[span]
        if tokens.size and tokens.max() >= self._vocab_size:
            # The file is no sample: it is not named as one that later runs are to leave out.
            raise BadSampleError(
                f"token file {self._path} has the id {tokens.max()} among its tokens "
                f"{span.start} to {span.stop}, but the tokenizer has {self._vocab_size} tokens: "
                f"make it again"
            )
        return tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedTokens, (self._path, self._dtype, self._vocab_size)


def write_token_file(path: str | Path, documents: Iterable[Document], tokenizer: Tokenizer) -> Path:
    """Tokenize `documents` into the token file `path`, which ends in `.bin`.

    Nothing stands under the final names until all is written.

    Raises:
        ValueError: for another ending, or if there is no text.
        FileExistsError: if there is a finished file already.
    """
    path = Path(path)
    if path.suffix != ".bin":
        raise ValueError(f"a token file ends in .bin, got {path}")
    if is_finished(path):
        raise FileExistsError(f"token file {path} exists already: remove it or choose another name")
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
    """Whether the token file `path` has been written, all of it."""
    return _header_path(path).exists()


def read_token_files(
    paths: Sequence[str | Path], tokenizer: Tokenizer, triage: Triage | None = None
) -> TokenDocuments:
    """The documents of all token files, mapped; without the damaged ones, where `triage` says so.

    Raises:
        FileNotFoundError: for a file that is not there, or not finished.
        ValueError: for a file of another format or tokenizer, naming it.
        BadSampleError: for a damaged file, naming it.
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
            triage.note(error, instead="it is left out")
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
        told = f"{header['num_documents']} documents of {header['num_tokens']} tokens"
        if found != told:
            raise _DamageError(f"it has {found}, its header says {told}")
        lengths = documents["length"]
        # As floats too: integers of 64 bits may overflow to the right sum.
        sums = int(lengths.sum()), int(lengths.sum(dtype=np.float64))
        if lengths.min() < 1 or sums[0] != num_tokens or sums[1] > 2 * num_tokens:
            raise _DamageError(f"the lengths of its documents do not make {num_tokens} tokens")
        return MappedTokens(path, dtype, tokenizer.vocab_size), documents
    except _DamageError as error:
        raise BadSampleError(f"{name} was damaged: {error}; make it again", path) from error


class _DamageError(Exception):
    """What is wrong with a token file, to follow its name."""


def _check_files(path: Path, name: str) -> None:
    for needed in (path, _header_path(path), _documents_path(path)):
        fault = why_no_file(needed)
        if fault == "does not exist":
            raise FileNotFoundError(
                f"token file {path} needs {needed}, which is not there: "
                f"make token files with datamodules.text.data.write_token_file"
            )
        if fault is not None:
            raise BadSampleError(f"{name} needs {needed}, which {fault}", path)


def _read_header(path: Path) -> dict[str, Any]:
    """The header of a token file, with every field as it may be."""
    try:
        if (size := path.stat().st_size) > _MOST_HEADER:
            raise ValueError(f"it has {size} bytes")
        header = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _DamageError(f"its header {path} cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise _DamageError(f"its header {path} is no object")
    if header.get("format") != FORMAT:
        raise DataError(f"{path} has format {header.get('format')!r}, this version reads {FORMAT}")
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
            f"{path} was made with tokenizer {header['tokenizer']!r} "
            f"({header['vocab_size']} tokens), not with {tokenizer.name!r} "
            f"({tokenizer.vocab_size} tokens)"
        )


def _read_documents(path: Path) -> NDArray[Any]:
    """The table of documents, of the one type and as long as its file: no more memory is taken, and
    no object is made, because a header says so."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy's, for headers that Python 2 wrote
        try:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # of many types: NumPy's
            raise _DamageError(f"{path} is no table of documents: {error}") from error
        held, rest = divmod(os.fstat(file.fileno()).st_size - file.tell(), DOCUMENT_FIELDS.itemsize)
        if version != (1, 0) or dtype != DOCUMENT_FIELDS or shape != (held,) or rest or not held:
            raise _DamageError(
                f"{path} has {held} rows and {rest} bytes, its header says {dtype} of shape {shape}"
            )
        return np.fromfile(file, DOCUMENT_FIELDS, held)


def _header_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _documents_path(path: Path) -> Path:
    return path.with_suffix(".documents.npy")
