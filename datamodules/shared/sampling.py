"""Order and random numbers of samples, as a function of (seed, epoch, index).

A dataset derives all random numbers of a sample (augmentation, crops, masking) from the seed, the
epoch and the sample's index, never from the state of a worker. The number of workers therefore has
no effect, and a resumed run draws the same numbers as an uninterrupted one. The epoch is passed to
the workers with every index, so that persistent workers know it too.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from datamodules.shared.bad_samples import BadSampleError, BadSamples, Triage
from datamodules.shared.stored import AnyFile

Sample = TypeVar("Sample", covariant=True)


SampleKey = tuple[int, int]
"""The key that a sampler passes to a dataset: `(epoch, index)`."""

_SUBSTITUTES = 100  # maximum number of substitutes drawn for a bad sample
_SUBSTITUTION = 1  # the last part of their key, so that they do not depend on the sample's draws


def sample_rng(seed: int, *key: int) -> np.random.Generator:
    """A NumPy generator for `(seed, *key)`, usually `(seed, epoch, index)`, all at least 0.

    Different keys, including keys of different lengths, give independent streams.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def sample_generator(seed: int, *key: int) -> torch.Generator:
    """A torch CPU generator for `(seed, *key)`, like `sample_rng`."""
    return torch.Generator().manual_seed(_torch_seed(np.random.SeedSequence(seed, spawn_key=key)))


@contextmanager
def seeded(seed: int, *key: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU) for the body, then restore them.

    For transforms that use the global generators, such as torchvision's and timm's.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        python_seed, numpy_seed = sequence.generate_state(2)
        random.seed(int(python_seed))
        np.random.seed(numpy_seed)
        torch.default_generator.manual_seed(_torch_seed(sequence))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _torch_seed(sequence: np.random.SeedSequence) -> int:
    # torch takes 64 bits; dropping the highest one keeps the seed within the signed range.
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeededDataset(Dataset[Sample], ABC):
    """A dataset whose samples are a function of epoch and index.

    The samplers of this module use `dataset[epoch, index]`; `dataset[index]` is the sample in
    epoch 0.

    Attributes:
        seed: Seed of all random numbers drawn for a sample.
        triage: How to handle a sample that cannot be read; by default, raise an error. A substitute
            is another sample of the same epoch, with its own index.
    """

    seed: int = 0
    triage: Triage = Triage(BadSamples())

    def __getitem__(self, key: SampleKey | int) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        for candidate in self._candidates(epoch, index):
            if self.triage.is_quarantined(self.file(candidate)):
                continue
            self.triage.num_read += 1
            try:
                return self.sample(epoch, candidate)
            except BadSampleError as error:
                self.triage.note(error, instead="another sample is used instead")
        raise ValueError(
            f"sample {index} of {len(self)} cannot be read, nor can {_SUBSTITUTES} substitutes: "
            f"fix the data, or empty the quarantine list"
        )

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        rng = sample_rng(self.seed, epoch, index, _SUBSTITUTION)
        for _ in range(_SUBSTITUTES):
            yield int(rng.integers(len(self)))

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, epoch: int, index: int) -> Sample:
        """Load sample `index` of `epoch`, with random numbers of `sample_rng(seed, epoch, index)`.

        Raises:
            BadSampleError: If the sample cannot be read.
        """

    def file(self, index: int) -> str | AnyFile | None:
        """The file of sample `index`, if it has its own."""
        return None


def why_no_batch(num_samples: int, batch_size: int, world_size: int) -> str | None:
    """Why samples do not fill a batch on every process, and what to set; `None` if they do.

    Args:
        num_samples: Number of training samples.
        batch_size: Number of samples per batch and process.
        world_size: Number of processes.
    """
    if num_samples >= batch_size * world_size:
        return None
    most = num_samples // world_size
    smaller = f"set --data.batch_size {1 << (most.bit_length() - 1)} or " if most else ""
    return (
        f"{num_samples} training samples do not fill one batch: batch_size is {batch_size} on "
        f"{world_size} process(es); {smaller}use more data"
    )


class EpochSampler(DistributedSampler[SampleKey]):
    """Each process's part of every epoch, as `(epoch, index)`, the same number on every process.

    Rank `r` of `W` takes every `W`-th sample of the epoch's order, starting at the `r`-th, so batch
    `k` of all processes together is batch `k` of one process with a batch `W` times as large. If
    `W` does not divide the number of samples, the last ones of the order are dropped.

    A run that stopped within an epoch resumes at the same position: `load_state_dict` takes the
    epoch and the `position` in it, the number of samples consumed by all processes together, so the
    number of processes may change. Data loaders prefetch, so only the training loop knows this
    number and passes it to `state_dict`. `set_epoch` with another epoch starts at its beginning.
    The length is always that of a whole epoch.

    It is a `DistributedSampler`, so that Lightning keeps it instead of inserting its own.

    Args:
        num_samples: Number of samples in the dataset.
        shuffle: Whether each epoch has a new order, drawn from `(seed, epoch)`; otherwise samples
            are in order of index.
        seed: Seed of the order, at least 0.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are fewer samples than processes, or `rank` is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_samples < world_size:
            raise ValueError(f"{num_samples} samples are too few for {world_size} processes")
        super().__init__(
            range(num_samples),  # type: ignore[arg-type]  # only its length is used
            num_replicas=world_size,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=True,
        )
        self._num_all_samples = num_samples
        self._position = 0

    def __iter__(self) -> Iterator[SampleKey]:
        order = np.arange(self._num_all_samples)
        if self.shuffle:
            order = sample_rng(self.seed, self.epoch).permutation(order)
        for index in order[self._position + self.rank : self.total_size : self.num_replicas]:
            yield self.epoch, int(index)

    def set_epoch(self, epoch: int) -> None:
        """Start at the beginning of `epoch`, or keep the position if it is the current epoch."""
        if epoch != self.epoch:
            self._position = 0
        super().set_epoch(epoch)

    def state_dict(self, position: int) -> dict[str, Any]:
        """The state after `position` samples of this epoch by all processes together."""
        return {"epoch": self.epoch, "position": position, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any], *, any_order: bool = False) -> None:
        """Start the next iteration at the epoch and position of `state`.

        Args:
            state: A result of `state_dict`.
            any_order: Whether to accept another dataset, seed or order. If the position is beyond
                the number of samples, the epoch has ended.

        Raises:
            ValueError: If `state` has another dataset, seed or order, or the number of processes
                does not divide its position.
        """
        if state["order"] != self._order() and not any_order:
            raise ValueError(
                f"the order of samples was {state['order']} and is now {self._order()}: "
                f"resume with the same data and seed"
            )
        if state["position"] % self.num_replicas:
            raise ValueError(
                f"{self.num_replicas} processes cannot resume at sample {state['position']}: "
                f"resume with a number of processes that divides it"
            )
        self.epoch, self._position = state["epoch"], state["position"]

    def for_overfitting(self) -> "EpochSampler":
        """The sampler that takes the place of this one with `overfit_batches`."""
        return OverfitSampler(
            len(self.dataset),  # type: ignore[arg-type]
            seed=self.seed,
            rank=self.rank,
            world_size=self.num_replicas,
        )

    def _order(self) -> dict[str, Any]:
        return {"samples": self._num_all_samples, "seed": self.seed, "shuffle": self.shuffle}


class OverfitSampler(EpochSampler, SequentialSampler):
    """The first samples in order, identical in every epoch, for `overfit_batches`. It is a
    `SequentialSampler`, so that Lightning keeps it and its position in the epoch. Arguments as in
    `EpochSampler`.
    """

    def __init__(self, num_samples: int, *, seed: int, rank: int, world_size: int) -> None:
        super().__init__(num_samples, shuffle=False, seed=seed, rank=rank, world_size=world_size)

    def __iter__(self) -> Iterator[SampleKey]:  # type: ignore[override]
        for _, index in super().__iter__():
            yield 0, index


class MixedSampler(EpochSampler):
    """An `EpochSampler` of several datasets, of which every batch has fixed numbers of samples.

    Samples are numbered through all datasets. In each batch, those of a dataset follow those of
    the previous one. An epoch ends when the dataset with the most batches has no whole one left;
    the others begin again meanwhile, each time in a new order. A repeated sample is drawn anew: the
    epoch of its key is `epoch * p + i` in the `i`-th of the `p` passes of an epoch.

    Args:
        counts: Number of samples of each dataset.
        sizes: Number of samples of each per batch and process.
        shuffle: Whether each pass has a new order, drawn from `(seed, epoch)`.
        seed: Seed of the order, at least 0.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If a dataset has fewer samples than one batch of all processes.
    """

    def __init__(
        self,
        counts: Sequence[int],
        sizes: Sequence[int],
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.counts, self.sizes = list(counts), [size * world_size for size in sizes]
        for count, size in zip(self.counts, self.sizes, strict=True):
            if count < size:
                raise ValueError(
                    f"{count} training samples do not fill one batch, which has {size} of them on "
                    f"{world_size} process(es): set a smaller --data.batch_size or use more data"
                )
        self.num_batches = max(n // size for n, size in zip(self.counts, self.sizes, strict=True))
        super().__init__(
            self.num_batches * sum(self.sizes),
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    def __iter__(self) -> Iterator[SampleKey]:
        epochs, indices = self._keys()
        own = slice(self._position + self.rank, self.total_size, self.num_replicas)
        yield from zip(epochs[own].tolist(), indices[own].tolist(), strict=True)

    def for_overfitting(self) -> EpochSampler:
        sizes = [size // self.num_replicas for size in self.sizes]
        return OverfitMixedSampler(
            self.counts, sizes, seed=self.seed, rank=self.rank, world_size=self.num_replicas
        )

    def _keys(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epochs and the indices of all samples of the epoch, in order."""
        rng = sample_rng(self.seed, self.epoch)
        parts = []
        for first, count, size in zip(self._firsts, self.counts, self.sizes, strict=True):
            per_pass = count // size * size
            num_passes = -(-self.num_batches * size // per_pass)
            order, epochs = [], []
            for number in range(num_passes):
                indices = rng.permutation(count) if self.shuffle else np.arange(count)
                order.append(first + indices[:per_pass])
                epochs.append(np.full(per_pass, self.epoch * num_passes + number))
            keys = np.stack([np.concatenate(epochs), np.concatenate(order)])
            parts.append(keys[:, : self.num_batches * size].reshape(2, self.num_batches, size))
        keys = np.concatenate(parts, axis=2).reshape(2, -1)
        return keys[0], keys[1]

    @property
    def _firsts(self) -> list[int]:
        """The index of the first sample of each dataset."""
        return [sum(self.counts[:number]) for number in range(len(self.counts))]

    def _order(self) -> dict[str, Any]:
        return {**super()._order(), "counts": self.counts, "global_batch": self.sizes}


class OverfitMixedSampler(MixedSampler, SequentialSampler):
    """The first samples of each dataset, as in `OverfitSampler`. Arguments as in `MixedSampler`."""

    def __init__(
        self, counts: Sequence[int], sizes: Sequence[int], *, seed: int, rank: int, world_size: int
    ) -> None:
        super().__init__(counts, sizes, shuffle=False, seed=seed, rank=rank, world_size=world_size)

    def __iter__(self) -> Iterator[SampleKey]:  # type: ignore[override]
        for _, index in super().__iter__():
            yield 0, index
