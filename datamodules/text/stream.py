"""One share of a stream of text: its documents and windows, from any position.

The files of all epochs, in a new order per epoch, form one endless sequence that is assigned to the
shares in turn. Each file is thus read once per epoch, whatever the number of shares. If there are
more shares than files, each file is assigned several times, and each time a part of its rows is
used; this is exact, but the file is parsed several times.

Rows are shuffled in blocks, so a position in a share is a few numbers: the first row of the block,
and a document and a token in the shuffled block. Resuming rereads only that block.
"""

from collections import deque
from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple, TypedDict

import numpy as np

from datamodules.shared.bad_samples import BadSampleError, Triage
from datamodules.shared.sampling import sample_rng
from datamodules.text.packing import Ids, Window
from datamodules.text.shards import Shards
from datamodules.text.token_documents import ENCODED_AT_ONCE, in_split, key_number
from datamodules.text.windows import WindowTask

_SHUFFLING, _DEALING = 2, 3  # the last parts of the keys of random numbers


class Place(TypedDict):
    """The start of the next window of a share."""

    part: int
    """Number of file parts assigned to the share before the block."""
    row: int
    """The row in that part's file at which the block begins."""
    block: int
    """Number of blocks before this one."""
    document: int
    """Index of a document in the shuffled block."""
    token: int
    """Index of a token in the document."""
    window: int
    """Number of windows before this one."""


class _Row(NamedTuple):
    text: str
    part: int
    row: int  # the next one


class StreamShare:
    """One share of a stream.

    Args:
        shards: Files of the stream.
        task: How documents are cut into windows.
        share: Index of the share.
        num_shares: Number of shares.
        low: Lower bound (inclusive) of the documents' keys, as a fraction of all keys.
        high: Upper bound (exclusive) of the documents' keys, as a fraction of all keys.
        shuffle_buffer: Number of rows per block; `None` keeps files and rows in order and ends
            after one epoch.
        triage: How to handle a file that cannot be read. If bad files are skipped, rows before the
            damage are used and the share continues with its next file.
    """

    def __init__(
        self,
        shards: Shards,
        task: WindowTask,
        *,
        share: int,
        num_shares: int,
        low: float,
        high: float,
        shuffle_buffer: int | None,
        triage: Triage,
    ) -> None:
        self._shards = shards
        self._task = task
        self._share, self._num_shares = share, num_shares
        self._low, self._high = low, high
        self._shuffle_buffer = shuffle_buffer
        self._triage = triage
        self._parts_a_file = -(-num_shares // len(shards))

    def windows(self, place: Place | None = None) -> Iterator[tuple[Window, Place]]:
        """Iterate over the windows from `place` on, each with the start of the next one."""
        begun: deque[tuple[int, Place]] = deque()  # documents in which windows may still begin

        def documents() -> Iterator[Ids]:
            for number, (where, ids) in enumerate(self._documents(place)):
                begun.append((number, where))
                yield ids

        first = place["window"] if place else 0
        for number, window in enumerate(self._task.windows(documents()), first + 1):
            document, token = window.following
            while begun[0][0] < document:
                begun.popleft()
            where = begun[0][1]
            yield window, {**where, "token": where["token"] + token, "window": number}

    def _documents(self, place: Place | None) -> Iterator[tuple[Place, Ids]]:
        """The documents of the split, each with its position; the first one starts at its token."""
        tokenizer = self._task.tokenizer
        last_part = place["part"] if place else 0
        for start, texts in self._blocks(place):
            self._check_progress("document of the split", start["part"] - last_part)
            wanted = [
                number
                for number in range(start["document"], len(texts))
                if texts[number] and in_split(key_number(texts[number]), self._low, self._high)
            ]
            for batch in (
                wanted[i : i + ENCODED_AT_ONCE] for i in range(0, len(wanted), ENCODED_AT_ONCE)
            ):
                encoded = tokenizer.encode_batch([texts[number] for number in batch])
                for number, ids in zip(batch, encoded, strict=True):
                    if not len(ids):
                        continue
                    last_part = start["part"]
                    token = start["token"] if number == start["document"] else 0
                    tokens = np.append(ids, tokenizer.eos_id).astype(np.int64)[token:]
                    yield {**start, "document": number, "token": token}, tokens

    def _blocks(self, place: Place | None) -> Iterator[tuple[Place, list[str]]]:
        """Shuffled blocks of texts, each with its position."""
        start: Place = place or {
            "part": 0, "row": 0, "block": 0, "document": 0, "token": 0, "window": 0,
        }  # fmt: skip
        rows = self._rows(start["part"], start["row"])
        while block := list(islice(rows, self._shuffle_buffer or ENCODED_AT_ONCE)):
            order = np.arange(len(block))
            if self._shuffle_buffer is not None:
                key = (self._share, start["block"], _SHUFFLING)
                order = sample_rng(self._task.seed, *key).permutation(order)
            yield start, [block[index].text for index in order]
            start = {
                "part": block[-1].part, "row": block[-1].row, "block": start["block"] + 1,
                "document": 0, "token": 0, "window": 0,
            }  # fmt: skip

    def _rows(self, first_part: int, row: int) -> Iterator[_Row]:
        """Rows from a position on, each with the position of the next one."""
        idle = 0
        for part in count(first_part):
            dealt = self._dealt(part)
            if dealt is None:
                return
            shard, residue = dealt
            found = False
            for text in self._texts(shard, row):
                if row % self._parts_a_file == residue:
                    found = True
                    yield _Row(text, part, row + 1)
                row += 1
            row = 0
            idle = 0 if found else idle + 1
            self._check_progress("row that can be read", idle)

    def _texts(self, shard: int, row: int) -> Iterator[str]:
        name = self._shards.names[shard]
        if self._triage.is_quarantined(name):
            return
        self._triage.num_read += 1
        try:
            yield from self._shards.texts(shard, row)
        except BadSampleError as error:
            self._triage.note(error, instead="continuing with another file")

    def _check_progress(self, what: str, num_parts: int) -> None:
        """Raise an error if an endless stream finds nothing in a whole epoch."""
        size = self._parts_a_file * len(self._shards)
        if self._shuffle_buffer is not None and num_parts > size:
            raise ValueError(
                f"the stream has no {what} in {size} parts of its {len(self._shards)} files (the "
                f"first is {self._shards.names[0]}): use more data"
            )

    def _dealt(self, part: int) -> tuple[int, int] | None:
        """The file of the share's part `part`, and the remainder that selects its rows."""
        size = self._parts_a_file * len(self._shards)
        epoch, number = divmod(self._share + part * self._num_shares, size)
        if self._shuffle_buffer is None and epoch > 0:
            return None
        file, residue = divmod(number, self._parts_a_file)
        if self._shuffle_buffer is not None:
            order = sample_rng(self._task.seed, epoch, 0, _DEALING).permutation(len(self._shards))
            file = int(order[file])
        return file, residue
