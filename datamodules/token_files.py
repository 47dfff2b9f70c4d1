"""Token files: text that is tokenized once, and mapped into memory to train on.

A token file `corpus.bin` holds the tokens of all its documents, each with the end-of-text token at
its end, as little-endian uint16 or uint32. Beside it stand `corpus.documents.npy`, each document's
length and key, and `corpus.json`, a header that says what made it. The header is written last: a
file without one is not finished.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.bad_samples import BadSampleError, BadSamples, Triage
from datamodules.token_documents import (
    Document,
    TokenDocuments,
    starts_of,
    token_dtype,
    tokenize,
)
from diffmm.tokenizers import Tokenizer

FORMAT = 1
DOCUMENT_FIELDS = np.dtype([("length", "<i8"), ("key", "<u8")])


class MappedTokens:
    """The tokens of a file, mapped into memory; a worker that gets it maps the file anew."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self._tokens = np.memmap(path, dtype, mode="r")

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, span: slice) -> NDArray[np.integer]:
        return self._tokens[span]

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedTokens, (self._path, self._dtype)


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
        (folder / _header_path(path).name).write_text(json.dumps(header, indent=2) + "\n")
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
    header = _read_header(path, tokenizer)
    told = f"{header['num_documents']} documents of {header['num_tokens']} tokens"
    try:
        tokens = MappedTokens(path, np.dtype(header["dtype"]).newbyteorder("<"))
        documents = np.load(_documents_path(path))
        found = f"{len(documents)} documents of {len(tokens)} tokens"
        if found == told and documents["length"].sum() == len(tokens):
            return tokens, documents
    except (ValueError, EOFError, IndexError) as error:  # NumPy's, for files cut or overwritten
        found = str(error)
    raise BadSampleError(
        f"token file {number} ({path}) was damaged: it has {found}, its header says {told}; "
        f"make it again",
        path,
    )


def _read_header(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    for needed in (path, _header_path(path), _documents_path(path)):
        if not needed.is_file():
            raise FileNotFoundError(
                f"token file {path} needs {needed}, which is not there: "
                f"make token files with datamodules.text.write_token_file"
            )
    header = json.loads(_header_path(path).read_text())
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{_header_path(path)} has format {header.get('format')!r}, this version reads {FORMAT}"
        )
    if header["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"{path} was made with tokenizer {header['tokenizer']!r} "
            f"({header['vocab_size']} tokens), not with {tokenizer.name!r} "
            f"({tokenizer.vocab_size} tokens)"
        )
    return header


def _header_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _documents_path(path: Path) -> Path:
    return path.with_suffix(".documents.npy")
