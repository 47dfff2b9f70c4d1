"""Batches of clips of similar length, which need little padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.shared.sampling import EpochSampler, SampleKey, sample_rng, why_no_batch


class BucketSampler(EpochSampler):
    """An `EpochSampler` whose batches contain samples of similar length.

    Each epoch's random order is cut into pools of `pool_batches` global batches; each pool is
    sorted by length and cut into batches, whose order is then shuffled. All processes thus get
    samples of similar length in the same step and do not wait for each other. The order is a
    function of `(seed, epoch)`; the data loader must drop the last incomplete batch.

    Args:
        lengths: Length of each sample, in any unit.
        batch_size: Number of samples per batch and process.
        pool_batches: Number of batches per pool; more means less padding and less randomness.
        seed: Seed of the order, at least 0.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are fewer samples than one batch per process.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        pool_batches: int = 50,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if fault := why_no_batch(len(lengths), batch_size, world_size):
            raise ValueError(fault)
        super().__init__(
            len(lengths),
            shuffle=True,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        self.lengths = np.asarray(lengths)
        self.global_batch_size = batch_size * world_size
        self.pool_batches = pool_batches

    def _order(self) -> dict[str, Any]:
        return {
            **super()._order(),
            "global_batch_size": self.global_batch_size,
            "pool_batches": self.pool_batches,
        }

    def __iter__(self) -> Iterator[SampleKey]:
        order = self._bucketed()[: self.total_size]
        for index in order[self._position + self.rank :: self.num_replicas]:
            yield self.epoch, int(index)

    def _bucketed(self) -> NDArray[np.int64]:
        rng, size = sample_rng(self.seed, self.epoch), self.global_batch_size
        order = rng.permutation(len(self.lengths))
        num_whole = len(order) // size * size
        pools = np.split(
            order[:num_whole], range(self.pool_batches * size, num_whole, self.pool_batches * size)
        )
        batches = [
            batch
            for pool in pools
            for batch in pool[np.argsort(self.lengths[pool], kind="stable")].reshape(-1, size)
        ]
        # Samples that do not fill a batch come last, where the loader drops them.
        shuffled = [batches[i] for i in rng.permutation(len(batches))]
        return np.concatenate([*shuffled, order[num_whole:]])
