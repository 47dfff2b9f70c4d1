"""Batches of an endless stream, and what a checkpoint needs to know of it.

A stream is cut into shares (`datamodules.text.stream`), which take turns: turn `n` gives the next
few samples of share `n % num_shares`. A batch is one turn or several that follow each other, and
the batches go to the processes in turn, and in each to its workers. So where the turns that are
under way at once divide the number of shares, the batches of all processes together are the same
for every number of processes and workers, and a run may go on with another.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any, Protocol, TypedDict

import torch
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.text.stream import Place, StreamShare
from datamodules.text.windows import TextSample, WindowTask
from diffmm.batch import TextBatch
from diffmm.workers import WorkerLoader


class Shares(Protocol):
    def __call__(self, *, share: int, num_shares: int) -> StreamShare:
        """One share of so many."""


class StreamState(TypedDict):
    """Where a stream stands, in plain containers: the same on every process."""

    turn: int
    """How many turns all processes together have taken."""
    turn_size: int
    """How many samples a turn gives."""
    global_batch_size: int
    """How many samples a batch of all processes together has."""
    num_shares: int
    places: dict[int, Place]
    """Where each share goes on; one that has given nothing yet is missing."""
    stream: dict[str, Any]
    """What must be the same for these places to mean anything."""
    quarantined: list[str]
    """The files that the run left out from its start."""


class StreamedWindows(IterableDataset[tuple[TextSample, int, Place]]):
    """Windows of the shares of this process, each with its share and where that then goes on.

    Args:
        shares: of the stream.
        task: makes samples of windows.
        num_shares: how many there are.
        turn_size: samples a turn; `None` takes share after share, each to its end.
        turns_a_batch: that follow each other in this process.
        rank, world_size: this process, and how many there are.
    """

    def __init__(
        self,
        shares: Shares,
        task: WindowTask,
        *,
        num_shares: int,
        turn_size: int | None,
        turns_a_batch: int = 1,
        rank: int,
        world_size: int,
    ) -> None:
        self._shares = shares
        self._task = task
        self.num_shares = num_shares
        self._turn_size, self._turns_a_batch = turn_size, turns_a_batch
        self._rank, self._world_size = rank, world_size
        self.start_at(0, {})

    def start_at(self, turn: int, places: dict[int, Place]) -> None:
        """Begin the next iteration with this turn of all processes, at these places."""
        self._turn = turn
        self._places = places

    def __iter__(self) -> Iterator[tuple[TextSample, int, Place]]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self._turn + (number * self._world_size + self._rank) * self._turns_a_batch
        stride = num_workers * self._world_size * self._turns_a_batch
        if self._turn_size is None:
            for share in range(first, self.num_shares, stride):
                yield from self._samples(share)
            return
        samples: dict[int, Iterator[tuple[TextSample, int, Place]]] = {}
        for begin in count(first, stride):
            for turn in range(begin, begin + self._turns_a_batch):
                share = turn % self.num_shares
                if share not in samples:
                    samples[share] = self._samples(share)
                yield from islice(samples[share], self._turn_size)

    def _samples(self, share: int) -> Iterator[tuple[TextSample, int, Place]]:
        windows = self._shares(share=share, num_shares=self.num_shares).windows(
            self._places.get(share)
        )
        for window, place in windows:
            index = (place["window"] - 1) * self.num_shares + share
            yield self._task.sample(window, epoch=0, index=index), share, place


class StreamLoader(WorkerLoader[Any]):
    """Batches of an endless stream; a new iteration goes on after the last batch that was taken.

    Args:
        dataset: what they are made of.
        state: where the stream stands.
        counts_itself: a batch is taken when it is asked for. Otherwise (for a trainer, which
            fetches ahead) whoever takes it says so, by `take`.
        loading: further arguments of torch's `DataLoader`.
    """

    def __init__(
        self,
        dataset: StreamedWindows,
        state: StreamState,
        *,
        counts_itself: bool,
        loading: dict[str, Any],
    ) -> None:
        super().__init__(dataset, **loading)
        self._windows = dataset
        self._state = state
        self._counts_itself = counts_itself
        self._fetched: deque[dict[int, Place]] = deque()

    def __iter__(self) -> Iterator[TextBatch]:  # type: ignore[override]
        self._fetched.clear()
        self._windows.start_at(self._state["turn"], dict(self._state["places"]))
        for batch, places in super().__iter__():
            self._fetched.append(places)
            if self._counts_itself:
                self.take()
            yield batch

    def take(self) -> None:
        """Count the oldest batch that was not counted yet."""
        self._state["places"].update(self._fetched.popleft())
        self._state["turn"] += self._state["global_batch_size"] // self._state["turn_size"]

    def state_dict(self) -> StreamState:
        """After the batches that were taken. All processes must call it after the same number of
        them, since it gathers what each knows."""
        places = dict(self._state["places"])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, places)
            # Those that are not a process's own are as old as the run's start.
            for others in gathered:
                places |= {
                    share: place
                    for share, place in others.items()
                    if share not in places or place["window"] > places[share]["window"]
                }
        return {**self._state, "places": dict(sorted(places.items()))}


def continued(new: StreamState, old: dict[str, Any], *, any_stream: bool = False) -> StreamState:
    """`old`, from a checkpoint, for a run that would begin at `new`.

    Args:
        new, old: where a stream stands.
        any_stream: whether `old` may be of another stream than `new`.

    Raises:
        ValueError: if it is of another stream.
    """
    was = old.get("stream") or {}
    changed = [name for name, value in new["stream"].items() if was.get(name) != value]
    if changed and not any_stream:
        then = ", ".join(f"{name}={was.get(name)!r}" for name in changed)
        now = ", ".join(f"{name}={new['stream'][name]!r}" for name in changed)
        raise ValueError(
            f"the stream had {then} and now has {now}: resume with the same data and seed"
        )
    return StreamState(**{**old, "stream": new["stream"], "places": dict(old["places"])})  # type: ignore[typeddict-item]


def check_turns(state: StreamState, *, batch_size: int, world_size: int, num_workers: int) -> None:
    """Refuse a number of processes, workers or samples with which the shares' turns do not fit.

    Raises:
        ValueError: saying what would.
    """
    size, shares = state["turn_size"], state["num_shares"]
    if batch_size % size:
        raise ValueError(
            f"the stream gives {size} samples a turn, which do not make a batch of {batch_size}: "
            f"resume with a batch_size that {size} divides"
        )
    turns = world_size * max(1, num_workers) * (batch_size // size)
    if shares % turns:
        raise ValueError(
            f"a stream of {shares} shares cannot be read by {world_size} process(es) with "
            f"num_workers={num_workers}, in batches of {batch_size // size} turn(s): their product "
            f"must divide {shares}; choose another num_workers (or, in a new run, stream_shares)"
        )


def collate_with_places(
    collate: Callable[[list[TextSample]], TextBatch],
    samples: list[tuple[TextSample, int, Place]],
) -> tuple[TextBatch, dict[int, Place]]:
    """A batch, and where its shares go on."""
    places = {share: place for _, share, place in samples}
    return collate([sample for sample, _, _ in samples]), places


def collate_windows(
    collate: Callable[[list[TextSample]], TextBatch],
    samples: list[tuple[TextSample, int, Place]],
) -> TextBatch:
    """A batch alone."""
    return collate([sample for sample, _, _ in samples])
