"""Which samples, in which order, with which random numbers: a function of (seed, epoch, index).

A dataset draws all randomness of a sample (augmentation, crops, masking) from the run's seed, the
epoch and the sample's number, never from a worker's state. So a changed number of workers changes
nothing, and a resumed run draws what the unbroken one would have drawn. The epoch travels to the
workers with every index, so that persistent workers know it too.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from datamodules.shared.bad_samples import BadSampleError, BadSamples, Triage

Sample = TypeVar("Sample", covariant=True)


SampleKey = tuple[int, int]
"""What a sampler asks of a dataset: `(epoch, index)`."""

_SUBSTITUTES = 100  # drawn for one bad sample before giving up
_SUBSTITUTION = 1  # the last part of their key: independent of the sample's own draws


def sample_rng(seed: int, *key: int) -> np.random.Generator:
    """A NumPy generator for `(seed, *key)`, usually `(seed, epoch, index)`; none is negative.

    Different keys give independent streams, keys of different lengths too.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def sample_generator(seed: int, *key: int) -> torch.Generator:
    """A torch generator (CPU) for `(seed, *key)`, as `sample_rng`."""
    return torch.Generator().manual_seed(_torch_seed(np.random.SeedSequence(seed, spawn_key=key)))


@contextmanager
def seeded(seed: int, *key: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU) for the body, then restore them.

    For transforms that draw from global state, as torchvision's and timm's do.
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
    # torch takes 64 bits; the top one is left out to stay clear of its signed range.
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class SeededDataset(Dataset[Sample], ABC):
    """A dataset whose samples are a function of their epoch and index.

    `dataset[epoch, index]` is what the samplers of this module ask for; `dataset[index]`
    is the sample as in epoch 0.

    Attributes:
        seed: of all that is drawn for a sample.
        triage: what happens to a sample that cannot be read; by default it is refused. Another one
            stands in for it where `triage` says so, as it is in this epoch, with its own index.
    """

    seed: int = 0
    triage: Triage = Triage(BadSamples())

    def __getitem__(self, key: SampleKey | int) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a dataset of {len(self)}")
        for candidate in self._candidates(epoch, index):
            if self.triage.is_quarantined(self.file(candidate)):
                continue
            self.triage.num_read += 1
            try:
                return self.sample(epoch, candidate)
            except BadSampleError as error:
                self.triage.note(error, instead="another sample stands in for it")
        raise ValueError(
            f"sample {index} of {len(self)} is bad, and so are {_SUBSTITUTES} others that were "
            f"drawn to stand in for it: mend the data, or empty its quarantine list"
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
        """Sample `index` as it is in `epoch`, drawing from `sample_rng(seed, epoch, index)`.

        Raises:
            BadSampleError: if it cannot be read.
        """

    def file(self, index: int) -> str | Path | None:
        """The file that sample `index` is in, if it has one of its own."""
        return None


class EpochSampler(DistributedSampler[SampleKey]):
    """Each process's share of every epoch, as `(epoch, index)`; the same number on every process.

    Process `r` of `W` takes every `W`-th sample of the epoch's order, beginning with the `r`-th:
    batch `k` of all processes together is batch `k` of one process with a batch `W` times as large.
    Where `W` does not divide the number of samples, the last of the order are left out.

    A run that stopped within an epoch goes on where it was: `load_state_dict` takes the epoch and
    the `position` in it, the number of samples consumed by all processes together (so the number
    of processes may change). Only the training loop knows how much was consumed, since loaders
    fetch ahead: it passes that number to `state_dict`. `set_epoch` with another epoch starts that
    epoch at its beginning. The length is always that of a whole epoch.

    It is a `DistributedSampler`, so that Lightning keeps it instead of inserting its own.

    Args:
        num_samples: how many the dataset has.
        shuffle: a new order each epoch, drawn from `(seed, epoch)`; otherwise in order of index.
        seed: of the order, at least 0.
        rank, world_size: this process, and how many there are.

    Raises:
        ValueError: if no sample would be left for a process, or `rank` is not one of them.
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
            raise ValueError(f"{num_samples} samples cannot be shared among {world_size} processes")
        super().__init__(
            range(num_samples),  # type: ignore[arg-type]  # only its length is asked for
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
        """Go to the beginning of `epoch`, or stay at the position within it."""
        if epoch != self.epoch:
            self._position = 0
        super().set_epoch(epoch)

    def state_dict(self, position: int) -> dict[str, Any]:
        """Where this epoch stands, after `position` samples of all processes together."""
        return {"epoch": self.epoch, "position": position, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any], *, any_order: bool = False) -> None:
        """Start the next iteration at the epoch and position of `state`.

        Args:
            state: of `state_dict`.
            any_order: whether it may be of another dataset, seed or order. Where there are fewer
                samples now than its position, the epoch is over.

        Raises:
            ValueError: if `state` is of another dataset, seed or order, or the number of processes
                does not divide its position.
        """
        if state["order"] != self._order() and not any_order:
            raise ValueError(
                f"the order of samples was {state['order']} and is now {self._order()}: "
                f"resume with the same data and seed"
            )
        if state["position"] % self.num_replicas:
            raise ValueError(
                f"{self.num_replicas} processes cannot share evenly what follows sample "
                f"{state['position']}: resume with a number that divides it"
            )
        self.epoch, self._position = state["epoch"], state["position"]

    def _order(self) -> dict[str, Any]:
        return {"samples": self._num_all_samples, "seed": self.seed, "shuffle": self.shuffle}


class OverfitSampler(EpochSampler, SequentialSampler):
    """The first samples in order, drawn alike in every epoch: what `overfit_batches` learns by
    heart. It is a `SequentialSampler`, so that Lightning keeps it, and its place in the epoch.

    Args:
        num_samples, seed, rank, world_size: as in `EpochSampler`.
    """

    def __init__(self, num_samples: int, *, seed: int, rank: int, world_size: int) -> None:
        super().__init__(num_samples, shuffle=False, seed=seed, rank=rank, world_size=world_size)

    def __iter__(self) -> Iterator[SampleKey]:  # type: ignore[override]
        for _, index in super().__iter__():
            yield 0, index
