"""The base class of all datamodules: data loaders with reproducible order and resume."""

from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from datamodules.shared.bad_samples import BadSamples, Triage
from datamodules.shared.evaluation import EvaluationLoader, EvaluationSampler
from datamodules.shared.fingerprints import Fingerprint, changes
from datamodules.shared.reader import Reader
from datamodules.shared.sampling import EpochSampler, SeededDataset, why_no_batch
from diffmm.workers import WorkerLoader, ignore_stop_signals

Collate = Callable[[list[Any]], Any]


class SeededDataModule(LightningDataModule):
    """A datamodule whose batches depend only on its arguments, not on the number of workers.

    Args:
        batch_size: Number of samples per batch and process.
        num_workers: Number of data loader workers per process; 0 loads in the training process.
        seed: Seed of order, augmentation and masking, at least 0.
        bad_samples: How to handle samples that cannot be read; by default, raise an error.

    Attributes:
        keeps_batches: Whether its hooks, if it has any, leave batches unchanged.
        allow_changed_data: Whether to warn, instead of raising an error, if a checkpoint was
            trained on different data.

    Raises:
        ValueError: If a number is out of range.
    """

    keeps_batches = True

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        bad_samples: BadSamples | None = None,
    ) -> None:
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
        self.bad_samples = bad_samples or BadSamples()
        self._sampler: EpochSampler | None = None
        self._restored: dict[str, Any] | None = None
        self._fingerprint: Fingerprint = {}
        self.allow_changed_data = False

    @property
    def rank(self) -> int:
        """Rank of this process among those that load different samples; 0 before a trainer is
        attached."""
        return self._processes["rank"]

    @property
    def world_size(self) -> int:
        """Number of processes that load different samples; 1 before a trainer is attached."""
        return self._processes["num_replicas"]

    @property
    def _processes(self) -> dict[str, int]:
        # Given by the strategy, because tensor-parallel processes load the same samples.
        strategy: Any = self.trainer.strategy if self.trainer else None
        return getattr(strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})

    def training_loader(
        self, dataset: Dataset[Any], collate: Collate | None = None
    ) -> DataLoader[Any]:
        """Full batches of `dataset`, in a new order each epoch.

        Raises:
            ValueError: If there are fewer samples than one batch per process.
        """
        assert isinstance(dataset, Sized)
        for fault in self.why_no_batch(len(dataset)):
            raise ValueError(fault)
        sampler = EpochSampler(
            len(dataset),
            shuffle=True,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        return self._sampled_loader(dataset, collate, sampler)

    def why_no_batch(self, num_samples: int) -> list[str]:
        """Why so many training samples do not fill a batch, for the faults of an examination;
        empty if they do."""
        fault = why_no_batch(num_samples, self.batch_size, self.world_size)
        return [] if fault is None else [fault]

    def evaluation_loader(
        self, dataset: Dataset[Any], collate: Collate | None = None
    ) -> DataLoader[Any]:
        """All of `dataset` in order, the same in every epoch. With several processes, each sample
        is loaded by one of them, and all have the same number of batches (see
        `datamodules.shared.evaluation`)."""
        sampler = None
        if not isinstance(dataset, IterableDataset):
            assert isinstance(dataset, Sized)
            sampler = EvaluationSampler(
                len(dataset),
                batch_size=self.batch_size,
                rank=self.rank,
                world_size=self.world_size,
            )
        return self._loader(EvaluationLoader, dataset, collate, sampler=sampler)

    def state_dict(self) -> dict[str, Any]:
        """The position of training in the data for a checkpoint, the same on every process.
        Lightning saves it."""
        if self._sampler is None or self.trainer is None:
            return {}
        batches: int = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        size = self.batch_size * self.world_size
        place = self._sampler.state_dict(batches * size)
        return {**place, "global_batch_size": size, "data": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the position of `state` when training begins.

        Raises:
            ValueError: When training begins, if `state` has different data (unless allowed),
                another seed, or another global batch size.
        """
        self._restored = state

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the training data for a checkpoint: available after `setup`, the same
        on every process, and cheap to compute. Subclasses extend it."""
        return {}

    @property
    def evaluation_reader(self) -> Reader | None:
        """The preprocessing of evaluation and prediction; None if a datamodule has no reader."""
        return None

    def read_with(self, reader: Reader) -> None:
        """Prepare the inputs of evaluation with another reader, such as that of trained weights.
        Call it before `setup`.

        Raises:
            ValueError: If the datamodule cannot, and the reader differs from its own.
        """
        own = self.evaluation_reader
        if own is None or own.describe() != reader.describe():
            raise ValueError(
                f"{type(self).__name__} prepares its inputs in another way than the model's "
                f"{type(reader).__name__}: give the run of the model, or other data"
            )

    def describe_inputs(self) -> dict[str, Any]:
        """The preprocessing of inputs and the names of the classes, as plain values that are saved
        with a model's weights; available after `setup`."""
        reader = self.evaluation_reader
        return {"reader": None if reader is None else reader.describe()}

    @property
    def has_test_split(self) -> bool:
        """Whether the test samples are others than the validation samples; available after
        `setup`."""
        return True

    def triage(self) -> Triage:
        """The handling of bad samples in this process, with the current quarantine list."""
        return Triage(self.bad_samples, self.trainer.default_root_dir if self.trainer else None)

    def _sampled_loader(
        self, dataset: Dataset[Any], collate: Collate | None, sampler: EpochSampler
    ) -> DataLoader[Any]:
        """The training loader of samples in the order of `sampler`, or of the repeated samples of
        `overfit_batches`."""
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            sampler = sampler.for_overfitting()
        self._fingerprint = self.fingerprint()
        if self._restored:
            self._check_batch_size(self._restored["global_batch_size"])
            self._check_data(self._restored.get("data", {}))
            sampler.load_state_dict(self._restored, any_order=self.allow_changed_data)
        self._sampler, self._restored = sampler, None
        return self._loader(WorkerLoader, dataset, collate, sampler=sampler, drop_last=True)

    def _check_data(self, then: Fingerprint) -> None:
        found = changes(then, self._fingerprint)
        if not found:
            return
        message = f"the training data differ from those of the checkpoint ({'; '.join(found)})"
        if not self.allow_changed_data:
            raise ValueError(
                f"{message}: resume with the original data, or use --allow-changed-data to resume "
                f"with the changed data"
            )
        rank_zero_warn(f"{message}: resuming at the same position of the changed data")

    def _check_batch_size(self, then: int) -> None:
        now = self.batch_size * self.world_size
        if then != now:
            advice = (
                f"with batch_size {then // self.world_size}"
                if then % self.world_size == 0
                else f"on a number of processes that divides {then}"
            )
            raise ValueError(
                f"the global batch size was {then} samples and is now {now} (batch_size "
                f"{self.batch_size} on {self.world_size} process(es)): resume {advice}"
            )

    def _loader(
        self,
        kind: type[WorkerLoader[Any]],
        dataset: Dataset[Any],
        collate: Collate | None,
        *,
        sampler: Iterable[Any] | None = None,
        drop_last: bool = False,
    ) -> DataLoader[Any]:
        if isinstance(dataset, SeededDataset):
            dataset.triage = self.triage()
        return kind(
            dataset,
            sampler=sampler,
            drop_last=drop_last,
            persistent_workers=self.num_workers > 0,
            **self._loading(collate),
        )

    def _loading(self, collate: Collate | None) -> dict[str, Any]:
        """Arguments of every loader."""
        return {
            "batch_size": self.batch_size,
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": ignore_stop_signals,
            # The generator of the workers' seeds, which no sample depends on. Without it every new
            # iterator would draw from the default generator and change the dropout that follows.
            "generator": torch.Generator(),
        }
