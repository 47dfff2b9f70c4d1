"""Batches of an endless stream, and their state in a checkpoint.

A stream is divided into shares (`datamodules.text.stream`), which take turns: turn `n` yields the
next samples of share `n % num_shares`. A batch consists of one or several consecutive turns; the
batches are assigned to the processes in turn, and within a process to its workers. If the number of
concurrent turns divides the number of shares, the global batches are therefore the same for every
number of processes and workers, and a run may resume with other numbers.
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
    """A function that divides a stream among processes and workers."""

    def __call__(self, *, share: int, num_shares: int) -> StreamShare:
        """Create one of `num_shares` shares."""


class StreamState(TypedDict):
    """The position of a stream in plain containers, the same on every process."""

    turn: int
    """Number of turns taken by all processes together."""
    turn_size: int
    """Number of samples per turn."""
    global_batch_size: int
    """Number of samples per batch of all processes together."""
    num_shares: int
    places: dict[int, Place]
    """The position of each share; shares that have yielded nothing yet are missing."""
    stream: dict[str, Any]
    """Settings that must be the same for these positions to be valid."""
    quarantined: list[str]
    """The files that the run has skipped from its start."""


class StreamedWindows(IterableDataset[tuple[TextSample, int, Place]]):
    """Windows of the shares of this process, each with its share and the share's next position.

    Args:
        shares: Creates the shares of the stream.
        task: Turns windows into samples.
        num_shares: Number of shares.
        turn_size: Number of samples per turn; `None` reads one share after the other to its end.
        turns_a_batch: Number of consecutive turns per batch.
        rank: Rank of this process.
        world_size: Number of processes.
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
        """Start the next iteration at this global turn and these positions."""
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
    """Batches of an endless stream; a new iteration continues after the last batch taken.

    Args:
        dataset: Windows of the stream.
        state: Position of the stream.
        counts_itself: Whether a batch counts as taken when it is yielded. Otherwise, for a trainer
            that prefetches, `take` must be called.
        loading: Further arguments of torch's `DataLoader`.
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
        """Count the oldest batch that has not been counted yet."""
        self._state["places"].update(self._fetched.popleft())
        self._state["turn"] += self._state["global_batch_size"] // self._state["turn_size"]

    def state_dict(self) -> StreamState:
        """The position after the batches taken. All processes must call it after the same number
        of batches, because it gathers the positions of all."""
        places = dict(self._state["places"])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, places)
            # A process has outdated positions of the shares of other processes.
            for others in gathered:
                places |= {
                    share: place
                    for share, place in others.items()
                    if share not in places or place["window"] > places[share]["window"]
                }
        return {**self._state, "places": dict(sorted(places.items()))}


def continued(new: StreamState, old: dict[str, Any], *, any_stream: bool = False) -> StreamState:
    """The state of a run that resumes from `old`.

    Args:
        new: The initial state of the run.
        old: The state in a checkpoint.
        any_stream: Whether `old` may be from another stream than `new`.

    Raises:
        ValueError: If it is from another stream.
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
    """Check that the number of processes, workers and samples fits the turns of the shares.

    Raises:
        ValueError: If they do not; the message says which numbers would.
    """
    size, shares = state["turn_size"], state["num_shares"]
    if batch_size % size:
        raise ValueError(
            f"the stream has {size} samples per turn, which do not divide a batch of "
            f"{batch_size}: resume with a batch_size that is a multiple of {size}"
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
    """Collate a batch and the next positions of its shares."""
    places = {share: place for _, share, place in samples}
    return collate([sample for sample, _, _ in samples]), places


def collate_windows(
    collate: Callable[[list[TextSample]], TextBatch],
    samples: list[tuple[TextSample, int, Place]],
) -> TextBatch:
    """Collate a batch without positions."""
    return collate([sample for sample, _, _ in samples])


def check_horizon(trainer: Any) -> None:
    """Check that training on an endless stream has an end.

    Args:
        trainer: The trainer, or None outside of one.

    Raises:
        ValueError: If nothing ends an epoch.
    """
    if trainer is not None and trainer.max_steps < 0 and trainer.limit_train_batches == 1.0:
        raise ValueError(
            "a streamed source is endless: set --trainer.max_steps, or "
            "--trainer.limit_train_batches for the length of an epoch"
        )
