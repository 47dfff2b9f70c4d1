"""The datamodule of labeled samples: data loaders for the splits of a source."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Literal, Self

from torch.utils.data import DataLoader, default_collate

from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.examination import Examined, examine_labelled
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.folders import FolderSource
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.other_data import note_of_training
from datamodules.shared.reader import Reader
from datamodules.shared.sampling import SeededDataset
from datamodules.shared.sources import Labelled, Samples, Source, Splits
from datamodules.shared.stored import AnyFile
from datamodules.shared.tables import TableSource


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

    def file(self, index: int) -> AnyFile | None:
        return self.samples.file(index)

    def collate(self, samples: list[dict[str, Any]]) -> Any:
        """Collate samples into a batch; by default, stack them."""
        return default_collate(samples)


class Evaluated(Source[Samples]):
    """Samples to evaluate, in place of those of every split.

    Args:
        class_names: The names of the classes, in order of their indices.
        samples: The samples.
        multi_label: Whether a sample may have any number of classes.
    """

    def __init__(self, class_names: Sequence[str], samples: Samples, multi_label: bool) -> None:
        self.class_names = class_names
        self.samples = samples
        self.multi_label = multi_label

    def splits(self) -> Splits[Samples]:
        samples = self.samples
        return Splits(self.class_names, samples, samples, samples, self.multi_label)


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
    def has_test_split(self) -> bool:
        return self.splits.test is not self.splits.val

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

    def evaluate_on(
        self,
        path: str,
        class_names: Sequence[str],
        *,
        split: str,
        multi_label: bool | None = None,
    ) -> str:
        """Evaluate on other labeled data than those of the source, which are then not read.
        Inputs are prepared as for the source's own validation data.

        Args:
            path: A folder with one folder per class (or such folders in `train`, `val` and
                `test`), or a CSV file of files and labels.
            class_names: Names of the model's classes, in order; labels are matched by name.
            split: The split to evaluate if there are several, `"val"` or `"test"`; without splits,
                all samples are evaluated.
            multi_label: Whether the model's inputs may have any number of classes; by default as in
                the source.

        Returns:
            A one-line summary.

        Raises:
            FileNotFoundError: If the path does not exist.
            ValueError: If its structure is not supported, or it has a class that the model does
                not have.
        """
        own = self.other_source(path, split)
        samples = own.labelled_as(class_names, split)
        if multi_label is None:
            multi_label = bool(getattr(self.source, "multi_label", False))
        note = note_of_training(own, self.source)
        self.source = Evaluated(class_names, samples, multi_label)
        self._splits = self.source.splits()
        num_present = len({label for labels in samples.labels for label in labels})
        return (
            f"{path} has {len(samples.labels):,} samples of {num_present} of the model's "
            f"{len(class_names)} classes{note}"
        )

    @classmethod
    def prepared_by(
        cls,
        reader: Reader,
        path: str,
        *,
        multi_label: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> Self:
        """The labeled data at a path, with the preprocessing of a reader.

        Args:
            reader: The reader, such as that of a trained model.
            path: A folder with one folder per class (or such folders in `train`, `val` and
                `test`), or a CSV file of files and labels.
            multi_label: Whether a row of a CSV file may have any number of labels.
            batch_size: Number of samples per batch.
            num_workers: Number of data loader workers.

        Raises:
            FileNotFoundError: If the path does not exist.
            ValueError: If its structure is not supported.
        """
        raise ValueError(f"--data {path}: {cls.__name__} cannot read labeled data by a path")

    def other_source(self, path: str, split: str) -> FolderSource[Samples] | TableSource[Samples]:
        """The source of other labeled data, whose `train` is the folder or table to evaluate."""
        raise ValueError(f"--data {path}: {type(self).__name__} cannot evaluate other data")

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
        found = examine_labelled(self.splits, read, limit=limit, tolerates=tolerates)
        too_few = self.why_no_batch(len(self.splits.train.labels))
        return found._replace(faults=[*found.faults, *too_few])

    def as_evaluated(self, split: Literal["train", "val", "test"]) -> DataLoader[Any]:
        """The samples of a split in order, prepared as in evaluation."""
        return self._evaluation(getattr(self.splits, split))

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
