"""The datamodule of pairs: what images with texts and sounds with texts share."""

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Generic, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from datamodules.pairs.own_data import pairs_in_words, pairs_to_evaluate
from datamodules.pairs.packing import packing
from datamodules.pairs.reader import ReadsTexts
from datamodules.pairs.sources import NUM_LOOKED_AT, Media, Medium, Pairs, PairSource, PairSplits
from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.examination import Examined, read_some
from datamodules.shared.fingerprints import Fingerprint, spread
from datamodules.shared.loading import Collate, SeededDataModule
from datamodules.shared.reader import Reader
from datamodules.shared.sampling import SeededDataset, sample_rng
from diffmm.batch import PairBatch
from diffmm.checks import counted

Inputs = Callable[[int, int], dict[str, Any]]
"""The input of an image or sound, as a function of the epoch and its index."""

_logger = logging.getLogger(__name__)

_TEXT = 2  # the last part of the key of the text's draw, so that it is independent of the others


class PairDataset(SeededDataset[dict[str, Any]]):
    """The pairs of a split as model inputs.

    In training, sample `i` is image or sound `i` with one of its texts, drawn from
    `(seed, epoch, i)`. In evaluation there is one sample per text, in the order of the images or
    sounds.

    Args:
        pairs: The pairs.
        inputs: Reads the images or sounds of `pairs`.
        reader: The preprocessing of texts.
        training: Whether to draw texts.
        seed: Seed of the draws.
    """

    def __init__(
        self, pairs: Pairs[Any], inputs: Inputs, reader: ReadsTexts, *, training: bool, seed: int
    ) -> None:
        self.pairs = pairs
        self.inputs = inputs
        self.reader = reader
        self.training = training
        self.seed = seed
        counts = [1] * len(pairs) if training else [pairs.num_texts(i) for i in range(len(pairs))]
        self._media = np.repeat(np.arange(len(pairs)), counts)
        self._firsts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self._media)

    def file(self, index: int) -> Any:
        return self.pairs.media.file(int(self._media[index]))

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        medium = int(self._media[index])

        def choose(count: int) -> int:
            if self.training:
                return int(sample_rng(self.seed, epoch, index, _TEXT).integers(count))
            return index - int(self._firsts[medium])

        text = self.pairs.text(medium, choose)
        return {
            **self.inputs(epoch, medium),
            **self.reader.read_text(text),
            "media_index": medium,
            "index": index,
        }

    def collate(self, samples: list[dict[str, Any]]) -> PairBatch:
        """Collate samples; texts are padded with the end of text, sounds with zeros."""
        return collate_pairs(self.reader, samples)


def collate_pairs(reader: ReadsTexts, samples: list[dict[str, Any]]) -> PairBatch:
    """Collate samples of a `PairDataset` with a reader of its media and texts."""
    batch: Any = reader.collate(samples)
    for name in ("media_index", "index"):
        batch[name] = torch.tensor([sample[name] for sample in samples])
    return batch


class PairData(SeededDataModule, Generic[Media]):
    """A datamodule for the splits of a source of pairs. Prediction uses the test split.

    Args:
        source: Source of the pairs.
        medium: The images or sounds that the datamodule reads.
        reader: The evaluation preprocessing of images or sounds and of texts.
        pairs_per_row: Number of pairs that are packed into each row of a training batch.
        batch_size: Number of samples per batch and process.
        num_workers: Number of data loader workers per process; 0 loads in the training process.
        seed: Seed of the order, the augmentation, and the choice among several texts.
        bad_samples: How to handle samples that cannot be read; by default, raise an error.

    Raises:
        ValueError: If the source has another kind of media, or `pairs_per_row` does not divide
            `batch_size`.
    """

    reader: ReadsTexts

    def __init__(
        self,
        source: PairSource,
        medium: Medium[Media],
        reader: ReadsTexts,
        *,
        pairs_per_row: int,
        batch_size: int,
        num_workers: int,
        seed: int,
        bad_samples: BadSamples | None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, bad_samples=bad_samples
        )
        if type(pairs_per_row) is not int or pairs_per_row < 1 or batch_size % pairs_per_row:
            raise ValueError(
                f"pairs_per_row must be at least 1 and divide batch_size={batch_size}, got "
                f"{pairs_per_row}"
            )
        self.pairs_per_row = pairs_per_row
        if medium.noun not in source.kinds:
            raise ValueError(
                f"{type(source).__name__} has {source.kinds[0]}, but {type(self).__name__} reads "
                f"{medium.noun}: use another source or datamodule"
            )
        self.source = source
        self.medium = medium
        self.reader = reader
        self._splits: PairSplits[Media] | None = None
        self._is_cut_reported = False

    @property
    def evaluation_reader(self) -> ReadsTexts:
        return self.reader

    def read_with(self, reader: Reader) -> None:
        if type(reader) is not type(self.reader):
            super().read_with(reader)
            return
        self.reader = reader

    def prepare_data(self) -> None:
        if self._splits is None:
            self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        if self._splits is None:
            _ = self.reader.encoder.eos_id  # an error before anything is read
            self._splits = self.source.splits(self.medium)

    @property
    def splits(self) -> PairSplits[Media]:
        """The source's splits, available after `setup`."""
        if self._splits is None:
            raise RuntimeError("the pairs are available after setup()")
        return self._splits

    @property
    def has_test_split(self) -> bool:
        return self.splits.test is not self.splits.val

    def evaluate_on_pairs(self, path: str, *, split: str) -> str:
        """Evaluate on other pairs than those of the source, which are then not read. Inputs are
        prepared as for the source's own validation data, and texts are found as by it, such as in
        the names of files.

        Args:
            path: A folder of images or sounds with text files, shards, or a table of files and
                texts.
            split: The split to evaluate if there are several, `"val"` or `"test"`; without splits,
                all pairs are evaluated.

        Returns:
            A one-line summary.

        Raises:
            FileNotFoundError: If the path does not exist.
            ValueError: If it has no texts.
        """
        pairs, summary = pairs_to_evaluate(path, self.source, self.medium, split)
        self._splits = PairSplits(pairs, pairs, pairs)
        return summary

    @abstractmethod
    def inputs(self, media: Media, *, training: bool) -> Inputs:
        """The images or sounds of a split as inputs, with the augmentation of training or
        without."""

    def dataset(self, pairs: Pairs[Media], *, training: bool) -> PairDataset:
        """Create the dataset of `pairs`, as in training or as in evaluation."""
        inputs = self.inputs(pairs.media, training=training)
        return PairDataset(pairs, inputs, self.reader, training=training, seed=self.seed)

    def fingerprint(self) -> Fingerprint:
        return {
            **self.splits.train.fingerprint(),
            "tokenizer": self.reader.encoder.fingerprint,
            "start_ids": list(self.reader.start_ids),
            "max_tokens": self.reader.max_tokens,
        }

    def examine(self, limit: int) -> Examined:
        """Count the images or sounds and the texts of each split, and read `limit` samples per
        split with the evaluation preprocessing.

        Raises:
            FileNotFoundError, ValueError: As `splits` of the source.
        """
        found = self.examine_pairs(limit)
        too_few = self.why_no_batch(len(self.splits.train))
        return found._replace(faults=[*too_few, *found.faults])

    def examine_pairs(self, limit: int) -> Examined:
        """`examine`, whatever the batch size."""
        self.setup()
        parts = {"train": self.splits.train, "val": self.splits.val}
        if self.has_test_split:
            parts["test"] = self.splits.test
        lines: dict[str, str] = {}
        faults: list[str] = []
        doubts: list[str] = []
        num_read = 0
        for split, pairs in parts.items():
            lines[split] = pairs_in_words(pairs, self.medium.noun)
            inputs = self.inputs(pairs.media, training=False)

            def read(media: Any, index: int, pairs: Any = pairs, inputs: Inputs = inputs) -> None:
                inputs(0, index)
                for number in range(pairs.num_texts(index)):
                    self.reader.read_text(pairs.text(index, lambda _, chosen=number: chosen))

            bad, count = read_some(pairs.media, read, limit)
            num_read += count
            tolerates = self.bad_samples.policy != "raise"
            (doubts if tolerates else faults).extend(f"{split}: {message}" for message in bad)
        total = counted(num_read, "sample")
        lines["read"] = f"{total}, including the first and the last of each split"
        if cut := self.cut_texts(self.splits.train, NUM_LOOKED_AT):
            doubts.append(f"train: {cut}")
        return Examined(lines, faults, doubts)

    def cut_texts(self, pairs: Pairs[Media], limit: int) -> str | None:
        """How many of the texts of at most `limit` images or sounds exceed `max_tokens`, in words;
        `None` if there are none."""
        looked_at = [
            text for index in spread(range(len(pairs)), limit) for text in pairs.known_texts(index)
        ]
        num_cut = sum(map(self.reader.is_cut, looked_at))
        if not num_cut:
            return None
        return (
            f"{num_cut:,} of {len(looked_at):,} texts{' looked at' if len(pairs) > limit else ''} "
            f"are longer than max_tokens ({self.reader.max_tokens}) and are cut: increase "
            f"--data.max_tokens to keep them whole"
        )

    def train_dataloader(self) -> DataLoader[Any]:
        self.report_cut_texts()
        dataset = self.dataset(self.splits.train, training=True)
        return self.loader_of(dataset)

    def report_cut_texts(self) -> None:
        """Warn once if training texts are cut."""
        if not self._is_cut_reported and self.rank == 0:
            self._is_cut_reported = True
            if cut := self.cut_texts(self.splits.train, NUM_LOOKED_AT):
                _logger.warning("%s", cut)

    def loader_of(self, dataset: PairDataset) -> DataLoader[Any]:
        """The loader of training samples."""
        return self.training_loader(dataset, self.collate_of(dataset))

    def collate_of(self, dataset: PairDataset) -> Collate:
        """The collation of training samples."""
        if self.pairs_per_row == 1:
            return dataset.collate
        longest = self.pairs_per_row * self.reader.max_tokens if self.reader.pad_texts else None
        return packing(dataset.collate, self.pairs_per_row, longest)

    def as_evaluated(self, split: Literal["train", "val", "test"]) -> DataLoader[Any]:
        """The pairs of a split in order, prepared as in evaluation."""
        dataset = self.dataset(getattr(self.splits, split), training=False)
        return self.evaluation_loader(dataset, dataset.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.as_evaluated("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.as_evaluated("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.as_evaluated("test")
