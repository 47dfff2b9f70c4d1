"""The datamodule of generated retrieval tasks."""

import json
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.shared.examination import Examined
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.own_data import looked_at_numbers
from datamodules.shared.sampling import SeededDataset, sample_rng
from datamodules.text.reader import TextReader
from datamodules.text.retrieval.sources import EOS, Needles, RetrievalSource
from diffmm.batch import IGNORE_INDEX
from diffmm.tokenizers import Tokenizer

TRAIN, VAL, TEST = range(3)


class RetrievalSample(TypedDict):
    """One row of a `TextBatch`."""

    tokens: Tensor
    targets: Tensor
    evidence: Tensor
    index: Tensor


class RetrievalSamples(SeededDataset[RetrievalSample]):
    """Generated sequences, a function of `(seed, split, epoch, index)`.

    Args:
        source: The task.
        length: Number of tokens per sample.
        num_samples: Number of samples per epoch.
        split: Number of the split; splits have independent sequences.
        seed: Seed of the sequences.

    Raises:
        ValueError: If the sequences are too short for the task.
    """

    def __init__(
        self, source: RetrievalSource, *, length: int, num_samples: int, split: int, seed: int
    ) -> None:
        source.check_length(length)
        self.source = source
        self.length = length
        self.num_samples = num_samples
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def sample(self, epoch: int, index: int) -> RetrievalSample:
        drawn = self.source.draw(self.length, sample_rng(self.seed, self.split, epoch, index))
        targets = np.where(drawn.targets[1:] < 0, IGNORE_INDEX, drawn.targets[1:])
        return {
            "tokens": torch.from_numpy(drawn.ids[:-1].astype(np.int64)),
            "targets": torch.from_numpy(targets.astype(np.int64)),
            "evidence": torch.from_numpy(drawn.evidence[:-1]),
            "index": torch.tensor(index),
        }


class RetrievalData(SeededDataModule):
    """Generated retrieval tasks as `TextBatch`es with `evidence`, for causal language models.

    Training samples are new in every epoch. Targets are the answers alone; `CausalLM` with
    `answers: true` measures their accuracy.

    Args:
        source: The task, a class of `datamodules.text.retrieval.sources`; by default `Needles()`.
        sequence_length: Number of tokens per sample.
        vocab_size: The model's vocabulary size; if given, the task must not exceed it.
        num_samples: Number of training samples per epoch.
        num_val_samples: Number of validation samples, and of test samples.
        batch_size: Number of samples per batch and process.
        num_workers: Number of data loader workers per process; 0 loads in the training process.
        seed: Seed of all samples.

    Raises:
        ValueError: If an argument is out of range, the sequences are too short for the task, or the
            task has more words than `vocab_size`.
    """

    objective = "causal"

    def __init__(
        self,
        source: RetrievalSource | None = None,
        *,
        sequence_length: int = 128,
        vocab_size: int | None = None,
        num_samples: int = 32768,
        num_val_samples: int = 512,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.source = source or Needles()
        self.source.check_length(sequence_length)
        for name, number in (("num_samples", num_samples), ("num_val_samples", num_val_samples)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        num_words = len(self.source.words)
        if vocab_size is not None and num_words > vocab_size:
            raise ValueError(
                f"{self.source!r} has {num_words} words, which exceeds the model's vocab_size of "
                f"{vocab_size}"
            )
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.num_samples = num_samples
        self.num_val_samples = num_val_samples

    @cached_property
    def evaluation_reader(self) -> TextReader:
        """The reader of prompts: words of the task, separated by spaces."""
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

        ids = {word: id for id, word in enumerate(self.source.words)}
        inner = Tokenizer(models.WordLevel(ids, unk_token=EOS))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.add_special_tokens([AddedToken(EOS, special=True)])
        name = type(self.source).__name__.lower()
        return TextReader(tokenizer=name, definition=json.dumps(json.loads(inner.to_str())))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the task's words, whose end of text is the only special token."""
        return self.evaluation_reader.encoder

    def samples(self, split: int) -> RetrievalSamples:
        """The samples of a split: `TRAIN`, `VAL` or `TEST`."""
        return RetrievalSamples(
            self.source,
            length=self.sequence_length,
            num_samples=self.num_samples if split == TRAIN else self.num_val_samples,
            split=split,
            seed=self.seed,
        )

    def fingerprint(self) -> Fingerprint:
        return {
            "source": repr(self.source),
            "sequence_length": self.sequence_length,
            "samples": self.num_samples,
            "data seed": self.seed,
        }

    def examine(self, limit: int) -> Examined:
        """Count the samples of each split, and draw `limit` of them."""
        lines = {}
        for name, split in (("training", TRAIN), ("validation", VAL), ("test", TEST)):
            samples = self.samples(split)
            drawn = [samples.sample(0, i) for i in looked_at_numbers(len(samples), limit)]
            answers = sum(int((each["targets"] != IGNORE_INDEX).sum()) for each in drawn)
            lines[name] = (
                f"{len(samples):,} samples of {self.sequence_length} tokens, "
                f"{answers / max(1, len(drawn)):.3g} answer tokens each"
            )
        return Examined(lines, self.why_no_batch(len(self.samples(TRAIN))), [])

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.samples(TRAIN))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.samples(VAL))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.samples(TEST))

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.samples(TEST))
