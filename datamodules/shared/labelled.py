"""What the datamodules of labelled samples share: a source's splits, made into loaders."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, Generic

from torch.utils.data import DataLoader, default_collate

from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.examination import Examined, examine_labelled
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.sampling import SeededDataset
from datamodules.shared.sources import Labelled, Samples, Source, Splits


class LabelledDataset(SeededDataset[dict[str, Any]]):
    """The samples of a split as a model sees them.

    Args:
        samples: of the split.
        seed: of all that is drawn for a sample.
    """

    def __init__(self, samples: Labelled, *, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples.labels)

    def file(self, index: int) -> Path | None:
        return self.samples.file(index)

    def collate(self, samples: list[dict[str, Any]]) -> Any:
        """The batch of some samples: stacked, unless a subclass knows better."""
        return default_collate(samples)


class LabelledData(SeededDataModule, Generic[Samples]):
    """A datamodule over the splits of a source; it predicts on the test split.

    Args:
        source: where the samples come from.
        batch_size, num_workers, seed, bad_samples: as in `SeededDataModule`.
    """

    def __init__(
        self,
        source: Source[Samples],
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        bad_samples: BadSamples | None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, bad_samples=bad_samples
        )
        self.source = source
        self._splits: Splits[Samples] | None = None

    def prepare_data(self) -> None:
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        if self._splits is None:
            self._splits = self.source.splits()

    @property
    def splits(self) -> Splits[Samples]:
        """The source's splits, known after `setup`."""
        if self._splits is None:
            raise RuntimeError("the samples and their classes are known after setup()")
        return self._splits

    @property
    def class_names(self) -> list[str]:
        """The classes in order of their numbers, known after `setup`."""
        return list(self.splits.class_names)

    @property
    def num_classes(self) -> int:
        """How many classes there are, known after `setup`."""
        return len(self.splits.class_names)

    def describe_inputs(self) -> dict[str, Any]:
        return {**super().describe_inputs(), "class_names": self.class_names}

    @abstractmethod
    def dataset(self, samples: Samples, *, training: bool) -> LabelledDataset:
        """`samples` as the model sees them, with the randomness of training or without."""

    def fingerprint(self) -> Fingerprint:
        return self.splits.train.fingerprint()

    def examine(self, limit: int) -> Examined:
        """Count the samples of each split and class, and read `limit` of each split as they are
        read for evaluation.

        Raises:
            FileNotFoundError, ValueError: as the source's `splits`.
        """
        self.setup()

        def read(samples: Labelled, index: int) -> Any:
            return self.dataset(samples, training=False).sample(0, index)  # type: ignore[arg-type]

        tolerates = self.bad_samples.policy != "raise"
        return examine_labelled(self.splits, read, limit=limit, tolerates=tolerates)

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = self.dataset(self.splits.train, training=True)
        return self.training_loader(dataset, dataset.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self.splits.val)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self.splits.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self.splits.test)

    def _evaluation(self, samples: Samples) -> DataLoader[Any]:
        dataset = self.dataset(samples, training=False)
        return self.evaluation_loader(dataset, dataset.collate)
