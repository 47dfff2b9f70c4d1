"""Evaluation on several processes: every sample once, and the same number of batches per process.

If processes communicate in every forward pass (FSDP2's weights, DDP's buffers), all must have the
same number of batches. A process that has run out of samples repeats a batch, marked by
`REPEATED`: its forward pass runs, but does not count in any metric.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import torch
from torch.utils.data import DistributedSampler, SequentialSampler

from datamodules.shared.sampling import SampleKey
from diffmm.batch import REPEATED
from diffmm.checks import DataError
from diffmm.workers import WorkerLoader


class EvaluationSampler(DistributedSampler[SampleKey], SequentialSampler):
    """A process's part of all samples, in order and the same in every epoch: every
    `world_size`-th sample, starting at the `rank`-th.

    A process whose part has one batch less than that of the first process gets sample 0 as its last
    batch. The class is a `SequentialSampler` too, so that Lightning keeps it under
    `overfit_batches`.

    Args:
        num_samples: Number of samples in the dataset.
        batch_size: Number of samples per batch and process.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are no samples.
    """

    def __init__(
        self, num_samples: int, *, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"there must be at least one sample to evaluate, got {num_samples}")
        super().__init__(
            range(num_samples),  # type: ignore[arg-type]  # only its length is used
            num_replicas=world_size,
            rank=rank,
            shuffle=False,
        )
        self._share = range(rank, num_samples, world_size)
        self.num_batches = -(-len(self._share) // batch_size)
        """Number of batches of samples that count."""
        largest_share = -(-num_samples // world_size)
        self._is_short = self.num_batches < -(-largest_share // batch_size)

    def __iter__(self) -> Iterator[SampleKey]:  # type: ignore[override]
        for index in (*self._share, *([0] if self._is_short else [])):
            yield 0, index

    def __len__(self) -> int:
        return len(self._share) + self._is_short

    def set_epoch(self, epoch: int) -> None:
        """Evaluation does not depend on the epoch."""


class EvaluationLoader(WorkerLoader[Any]):
    """Batches (dicts of tensors) of an `EvaluationSampler`, or of a stream of which every process
    has its own part; the same number of batches on every process.

    Raises:
        DataError: If a stream has no samples.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        if isinstance(self.sampler, EvaluationSampler):
            for number, batch in enumerate(batches):
                yield batch if number < self.sampler.num_batches else marked(batch)
            return
        is_empty = True
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            batches = evened(batches)
        for batch in batches:
            is_empty = False
            yield batch
        if is_empty:
            raise DataError(
                "there is nothing to evaluate: this split contains no document of the stream; use "
                "more documents, a larger fraction or a separate source"
            )


def marked(batch: dict[str, Any]) -> dict[str, Any]:
    """Mark a batch as one that does not count in any metric."""
    return {**batch, REPEATED: torch.ones_like(batch["index"], dtype=torch.bool)}


def evened(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A process's batches, followed by its last batch, marked, as long as another process has more.
    A process without any batch gets one of another process.

    All processes iterate together and exchange in each step whether they have a batch.
    """
    spare: dict[str, Any] | None = None
    for own in chain(batches, repeat(None)):
        spare = own or spare
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, (own is not None, spare is not None))
        if not any(has_own for has_own, _ in states):
            return
        if not all(has_spare for _, has_spare in states):
            giver = next(rank for rank, (has_own, _) in enumerate(states) if has_own)
            given = [spare]
            torch.distributed.broadcast_object_list(given, src=giver)
            spare = spare or given[0]
        assert spare is not None
        yield own if own is not None else marked(spare)
