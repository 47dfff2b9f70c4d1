"""Cutting documents into windows of equal length.

A window has up to `sequence_length + 1` tokens, because each token except the first is predicted
from the ones before it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Span(NamedTuple):
    """The tokens `start` to `stop` of a document."""

    document: int
    start: int
    stop: int


class Window(NamedTuple):
    """Up to `sequence_length + 1` tokens and the document of each.

    When documents are iterated, `following` is the start of the next window: the index of a
    document and of a token in it.
    """

    ids: Ids
    document_ids: Ids
    following: tuple[int, int] = (0, 0)


class Cut(Protocol):
    """A division of documents into windows."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: int) -> list[Span]: ...


class PackedCut:
    """Concatenates all documents and cuts them every `sequence_length` tokens.

    Neighboring windows share a token: the last target of one is the first input of the next.
    """

    def __init__(self, lengths: Ids, sequence_length: int) -> None:
        self._ends = np.cumsum(lengths)
        self._lengths = lengths
        self._total = int(lengths.sum())
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return -(-max(self._total - 1, 0) // self._sequence_length)

    def __getitem__(self, window: int) -> list[Span]:
        start = window * self._sequence_length
        stop = min(start + self._sequence_length + 1, self._total)
        spans = []
        document = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[document])
            begin = end - int(self._lengths[document])
            spans.append(Span(document, start - begin, min(stop, end) - begin))
            start = end
            document += 1
        return spans


class PaddedCut:
    """Cuts each document separately, if it is longer than `sequence_length`."""

    def __init__(self, lengths: Ids, sequence_length: int) -> None:
        self._num_windows = -(-(lengths - 1) // sequence_length)
        self._ends = np.cumsum(self._num_windows)
        self._lengths = lengths
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return int(self._num_windows.sum())

    def __getitem__(self, window: int) -> list[Span]:
        document = int(np.searchsorted(self._ends, window, side="right"))
        window -= int(self._ends[document] - self._num_windows[document])
        start = window * self._sequence_length
        stop = min(start + self._sequence_length + 1, int(self._lengths[document]))
        return [Span(document, start, stop)]


def packed_windows(documents: Iterable[Ids], sequence_length: int) -> Iterator[Window]:
    """The windows of `PackedCut` for an iterable of documents."""
    ids = numbers = places = np.empty(0, np.int64)
    for number, tokens in enumerate(documents):
        ids = np.append(ids, tokens)
        numbers = np.append(numbers, np.full(len(tokens), number))
        places = np.append(places, np.arange(len(tokens)))
        while len(ids) > sequence_length:
            following = int(numbers[sequence_length]), int(places[sequence_length])
            yield Window(ids[: sequence_length + 1], numbers[: sequence_length + 1], following)
            ids, numbers = ids[sequence_length:], numbers[sequence_length:]
            places = places[sequence_length:]
    if len(ids) > 1:
        yield Window(ids, numbers)


def padded_windows(documents: Iterable[Ids], sequence_length: int) -> Iterator[Window]:
    """The windows of `PaddedCut` for an iterable of documents."""
    for number, tokens in enumerate(documents):
        for start in range(0, len(tokens) - 1, sequence_length):
            ids = tokens[start : start + sequence_length + 1]
            yield Window(ids, np.full(len(ids), number), (number, start + sequence_length))
