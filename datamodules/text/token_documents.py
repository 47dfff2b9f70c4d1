"""Tokenized documents: spans of token arrays, and the keys that determine their split."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.fingerprints import Fingerprint, digest, spread
from diffmm.checks import counted
from diffmm.tokenizers import Tokenizer

ENCODED_AT_ONCE = 64  # documents per call of a tokenizer


class Document(NamedTuple):
    """A text and its key, which determines its split."""

    key: str
    text: str


class TokenizedDocument(NamedTuple):
    """A document's tokens, including the end-of-text token, and its key as 64 bits."""

    key: int
    tokens: NDArray[np.integer]


def key_number(key: str) -> int:
    """A 64-bit hash of a document's key, the same on every machine and in every run."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """Tokenize all documents that are not empty."""
    dtype = token_dtype(tokenizer.vocab_size)
    remaining = iter(documents)
    while batch := list(islice(remaining, ENCODED_AT_ONCE)):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            if len(ids):
                tokens = np.append(ids.astype(dtype), dtype.type(tokenizer.eos_id))
                yield TokenizedDocument(key_number(document.key), tokens)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype of token files that can represent all ids."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class Tokens(Protocol):
    """An array of tokens, or an object with the same interface."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> NDArray[np.integer]: ...


@dataclass(frozen=True)
class TokenDocuments:
    """Documents as spans of token arrays.

    Args:
        arrays: Token arrays, treated as concatenated. No document spans two of them.
        starts: Start of each document, `[documents]` int64.
        lengths: Length of each document, `[documents]` int64.
        keys: The `key_number` of each document, `[documents]` uint64.
    """

    arrays: Sequence[Tokens]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    keys: NDArray[np.uint64]

    @classmethod
    def in_memory(cls, documents: Iterable[TokenizedDocument]) -> "TokenDocuments":
        """Hold all `documents` in memory."""
        keys, tokens = [], []
        for document in documents:
            keys.append(document.key)
            tokens.append(document.tokens)
        lengths = np.array([len(ids) for ids in tokens], np.int64)
        whole = np.concatenate(tokens) if tokens else np.empty(0, np.uint16)
        return cls([whole], starts_of(lengths), lengths, np.array(keys, np.uint64))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        return starts_of(np.array([len(array) for array in self.arrays], np.int64))

    def in_words(self, *, with_keys: bool) -> str:
        """How many documents there are; `with_keys`, also how many keys if several have the
        same."""
        text = f"{counted(len(self), 'document')} with text"
        num_different = len(np.unique(self.keys)) if with_keys else len(self)
        if num_different == len(self):
            return text
        return f"{text}, of which only {num_different:,} differ (equal ones are in the same split)"

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Read the tokens `start` to `stop` of a document."""
        begin = self.starts[document]
        array = int(np.searchsorted(self._offsets, begin, side="right")) - 1
        begin = begin - self._offsets[array]
        return self.arrays[array][begin + start : begin + stop].astype(np.int64)

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the documents: their number, lengths and names, and some of their
        tokens."""
        return {
            "documents": len(self),
            "tokens": int(self.lengths.sum()),
            "names of documents": digest([self.keys.tobytes()]),
            "sizes of documents": digest([self.lengths.tobytes()]),
            "contents of documents": digest(map(self._beginning, spread(range(len(self)), 64))),
        }

    def _beginning(self, document: int) -> bytes:
        try:
            return self.read(document, 0, min(int(self.lengths[document]), 1024)).tobytes()
        except BadSampleError:
            return b""  # handled when the document is read

    def held_out(self, low: float, high: float) -> "TokenDocuments":
        """The documents whose keys, as fractions of all keys, are in `[low, high)`."""
        chosen = in_split(self.keys, low, high)
        return TokenDocuments(
            self.arrays, self.starts[chosen], self.lengths[chosen], self.keys[chosen]
        )

    def stretch(self, low: float, high: float) -> "TokenDocuments":
        """The tokens whose positions, as fractions of all tokens, are in `[low, high)`: whole
        documents, and parts of those at the ends."""
        offsets, total = starts_of(self.lengths), int(self.lengths.sum())
        begin, end = round(low * total), round(high * total)
        skipped = np.clip(begin - offsets, 0, self.lengths)
        lengths = np.clip(end - offsets, 0, self.lengths) - skipped
        chosen = lengths > 0
        starts = (self.starts + skipped)[chosen]
        return TokenDocuments(self.arrays, starts, lengths[chosen], self.keys[chosen])


def in_split(keys: Any, low: float, high: float) -> Any:
    """Whether each key, as a fraction of all keys, is in `[low, high)`."""
    fractions = np.asarray(keys, np.uint64) / 2.0**64
    # The largest keys round up to 1.0.
    return (fractions >= low) & ((fractions < high) | (high >= 1.0))


def starts_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The start of each item in a concatenation of items of these lengths."""
    return np.cumsum(lengths) - lengths
