"""What the datamodules share: loaders that know the seed, the epoch and the process."""

from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, IterableDataset

from datamodules.sampling import EpochSampler, EvaluationSampler

Collate = Callable[[list[Any]], Any]


class SeededDataModule(LightningDataModule):
    """A datamodule whose batches depend on its arguments and `seed`, not on its workers.

    Args:
        batch_size: samples a batch of one process.
        num_workers: processes that load beside the training one; 0 loads in it.
        seed: of the order, augmentation and masking, at least 0.

    Raises:
        ValueError: for a number out of its range.
    """

    def __init__(self, *, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    @property
    def rank(self) -> int:
        """The number of this process in training, 0 before a trainer is attached."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """How many processes train, 1 before a trainer is attached."""
        return self.trainer.world_size if self.trainer else 1

    def training_loader(
        self, dataset: Dataset[Any], collate: Collate | None = None
    ) -> DataLoader[Any]:
        """Full batches of `dataset`, in a new order each epoch.

        Raises:
            ValueError: if the samples do not fill one batch of every process.
        """
        if isinstance(dataset, IterableDataset):
            return self._loader(dataset, collate, drop_last=True)
        assert isinstance(dataset, Sized)
        if len(dataset) < self.batch_size * self.world_size:
            raise ValueError(
                f"{len(dataset)} training samples do not fill one batch: batch_size is "
                f"{self.batch_size} on {self.world_size} process(es); lower it or give more data"
            )
        sampler = EpochSampler(
            len(dataset),
            shuffle=True,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            drop_last=True,
        )
        return self._loader(dataset, collate, sampler=sampler, drop_last=True)

    def evaluation_loader(
        self, dataset: Dataset[Any], collate: Collate | None = None
    ) -> DataLoader[Any]:
        """All of `dataset` in order, the same in every epoch."""
        if isinstance(dataset, IterableDataset):
            return self._loader(dataset, collate)
        assert isinstance(dataset, Sized)
        sampler = EvaluationSampler(len(dataset), rank=self.rank, world_size=self.world_size)
        return self._loader(dataset, collate, sampler=sampler)

    def _loader(
        self,
        dataset: Dataset[Any],
        collate: Collate | None,
        *,
        sampler: Iterable[Any] | None = None,
        drop_last: bool = False,
    ) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
