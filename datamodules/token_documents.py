"""Tokenized documents, in memory or mapped from disk.

A token file `corpus.bin` holds the tokens of all its documents, each with the end-of-text token at
its end, as little-endian uint16 or uint32. Beside it stand `corpus.documents.npy`, each document's
length and key, and `corpus.json`, a header that says what made it. The header is written last: a
file without one is not finished.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.bad_samples import BadSampleError, BadSamples, Triage
from diffmm.tokenizers import Tokenizer

FORMAT = 1
DOCUMENT_FIELDS = np.dtype([("length", "<i8"), ("key", "<u8")])
ENCODED_AT_ONCE = 64  # documents a tokenizer sees at once


class Document(NamedTuple):
    """A text, and what it is known by: held-out splits are drawn by the key."""

    key: str
    text: str


class TokenizedDocument(NamedTuple):
    """A document's tokens, with the end of text at their end, and its key as 64 bits."""

    key: int
    tokens: NDArray[np.integer]


def key_number(key: str) -> int:
    """64 bits of a document's key, the same on every machine and in every run."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """The tokens of each document that has any text."""
    dtype = token_dtype(tokenizer.vocab_size)
    remaining = iter(documents)
    while batch := list(islice(remaining, ENCODED_AT_ONCE)):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            if len(ids):
                tokens = np.append(ids.astype(dtype), dtype.type(tokenizer.eos_id))
                yield TokenizedDocument(key_number(document.key), tokens)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that token files hold these ids in."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class TokenDocuments:
    """Documents as spans of token arrays.

    Args:
        arrays: the tokens, as if one followed the other. No document spans two.
        starts, lengths: `[documents]` int64, where each document lies in them.
        keys: `[documents]` uint64, each document's `key_number`.
    """

    arrays: "Sequence[NDArray[np.integer] | MappedTokens]"
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    keys: NDArray[np.uint64]

    @classmethod
    def in_memory(cls, documents: Iterable[TokenizedDocument]) -> "TokenDocuments":
        """All `documents`, held in memory."""
        keys, tokens = [], []
        for document in documents:
            keys.append(document.key)
            tokens.append(document.tokens)
        lengths = np.array([len(ids) for ids in tokens], np.int64)
        whole = np.concatenate(tokens) if tokens else np.empty(0, np.uint16)
        return cls([whole], _starts(lengths), lengths, np.array(keys, np.uint64))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        return _starts(np.array([len(array) for array in self.arrays], np.int64))

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens `start` to `stop` of a document."""
        begin = self.starts[document]
        array = int(np.searchsorted(self._offsets, begin, side="right")) - 1
        begin = begin - self._offsets[array]
        return self.arrays[array][begin + start : begin + stop].astype(np.int64)

    def held_out(self, low: float, high: float) -> "TokenDocuments":
        """The documents whose keys, as fractions of all keys, lie in `[low, high)`."""
        chosen = in_split(self.keys, low, high)
        return TokenDocuments(
            self.arrays, self.starts[chosen], self.lengths[chosen], self.keys[chosen]
        )

    def stretch(self, low: float, high: float) -> "TokenDocuments":
        """The tokens whose places, as fractions of all tokens in order, lie in `[low, high)`: whole
        documents, and parts of those at its ends."""
        offsets, total = _starts(self.lengths), int(self.lengths.sum())
        begin, end = round(low * total), round(high * total)
        skipped = np.clip(begin - offsets, 0, self.lengths)
        lengths = np.clip(end - offsets, 0, self.lengths) - skipped
        chosen = lengths > 0
        starts = (self.starts + skipped)[chosen]
        return TokenDocuments(self.arrays, starts, lengths[chosen], self.keys[chosen])


def in_split(keys: Any, low: float, high: float) -> Any:
    """Whether each key, as a fraction of all keys, lies in `[low, high)`."""
    fractions = np.asarray(keys, np.uint64) / 2.0**64
    # The largest keys round up to 1.0.
    return (fractions >= low) & ((fractions < high) | (high >= 1.0))


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
    return TokenDocuments(arrays, _starts(lengths), lengths, table["key"].copy())


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


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(lengths) - lengths
