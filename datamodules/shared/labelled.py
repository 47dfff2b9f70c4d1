"""The datamodule of labeled samples: data loaders for the splits of a source."""

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
    """The samples of a split as model inputs.

    Args:
        samples: Samples of the split.
        seed: Seed of all random numbers drawn for a sample.
    """

    def __init__(self, samples: Labelled, *, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples.labels)

    def file(self, index: int) -> Path | None:
        return self.samples.file(index)

    def collate(self, samples: list[dict[str, Any]]) -> Any:
        """Collate samples into a batch; by default, stack them."""
        return default_collate(samples)


class LabelledData(SeededDataModule, Generic[Samples]):
    """A datamodule for the splits of a source. Prediction uses the test split.

    Args:
        source: Source of the samples.
        batch_size: Number of samples per batch and process.
        num_workers: Number of data loader workers per process; 0 loads in the training process.
        seed: Seed of the order and the augmentation of samples.
        bad_samples: How to handle samples that cannot be read; by default, raise an error.
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
        """The source's splits, available after `setup`."""
        if self._splits is None:
            raise RuntimeError("the samples and their classes are available after setup()")
        return self._splits

    @property
    def class_names(self) -> list[str]:
        """The names of the classes in order of their indices, available after `setup`."""
        return list(self.splits.class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes, available after `setup`."""
        return len(self.splits.class_names)

    def describe_inputs(self) -> dict[str, Any]:
        return {**super().describe_inputs(), "class_names": self.class_names}

    @abstractmethod
    def dataset(self, samples: Samples, *, training: bool) -> LabelledDataset:
        """Create the dataset of `samples`, with the augmentation of training or without."""

    def fingerprint(self) -> Fingerprint:
        return self.splits.train.fingerprint()

    def examine(self, limit: int) -> Examined:
        """Count the samples of each split and class, and read `limit` samples per split with the
        evaluation preprocessing.

        Raises:
            FileNotFoundError, ValueError: As `splits` of the source.
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
