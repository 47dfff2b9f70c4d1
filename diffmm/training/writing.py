"""What tasks have in common whose models write texts about images or sounds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from diffmm.batch import IGNORE_INDEX
from diffmm.models.cross_attention import without_cross_attention
from diffmm.models.job import Job
from diffmm.models.text import TextModel
from diffmm.models.weights import load_weights
from diffmm.tokenizers import Tokenizer, load_tokenizer, until
from diffmm.training.batches import check_range
from diffmm.training.finetuning import FineTuneConfig, freeze
from diffmm.training.metrics import RatioOfSums
from diffmm.training.task import Task

TEXTS = ("tokens", "num_tokens")
"""The fields of the texts in a `diffmm.batch.PairBatch`."""


class Writing(Task):
    """Base of the tasks of models with an `encoder` of images or sounds, which write texts.

    Attributes:
        word_error_rate: Whether to log the word error rate, the number of wrong, missing and
            surplus words per word of the data (torchmetrics). The data must name their tokenizer.
        starts: The given settings of parts of the model, by their names.
    """

    word_error_rate: bool
    starts: dict[str, FineTuneConfig]

    def start_parts(self, settings: Mapping[str, FineTuneConfig | None]) -> None:
        """Freeze parts of the model, which start from weights of their own, as their settings say.
        Cross-attention in a decoder is new to those weights and stays trained.

        Raises:
            ValueError: If one has adapters.
        """
        self.starts = {name: config for name, config in settings.items() if config is not None}
        for name, config in self.starts.items():
            if config.lora is not None:
                raise ValueError(f"{name}.lora is not supported: give finetune.lora for all parts")
            part: nn.Module = getattr(self.model, name)
            with language_model(part):
                self.frozen += freeze(part, config)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.word_error_rate:
            _ = self.data_tokenizer  # an error before training

    def load_first_weights(self) -> None:
        super().load_first_weights()
        for name, config in self.starts.items():
            if config.weights is not None:
                part: nn.Module = getattr(self.model, name)
                skip_head = name == "encoder" or config.new_head
                with language_model(part):
                    load_weights(part, config.weights, skip_head=skip_head)

    def make_job(self, data: Any) -> Job:
        return replace(super().make_job(data), class_names=None)

    @cached_property
    def data_tokenizer(self) -> Tokenizer:
        """The tokenizer of the data.

        Raises:
            ValueError: If the data do not name it.
        """
        return tokenizer_of(self.job)

    def layouts(self) -> list[Sequence[str]]:
        media = [name for name in self._inputs() if name not in TEXTS]
        return [(*media, *TEXTS), (*media[:1], *TEXTS)]

    def last_tokens(self, batch: Any, vocab_size: int) -> Tensor | None:
        """The last token of each text, `[B]`; None for batches that are empty or not on the CPU,
        whose values are not checked.

        Raises:
            ValueError: If a token is not below `vocab_size`; the message names the sample.
        """
        tokens = batch["tokens"]
        check_range("token", tokens, vocab_size, of="token ids", index=batch.get("index"))
        if tokens.device.type != "cpu" or not len(tokens):
            return None
        return tokens.gather(1, batch["num_tokens"][:, None] - 1)[:, 0]

    def make_metrics(self) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {"loss": RatioOfSums()}
        if self.word_error_rate:
            from torchmetrics.text import WordErrorRate  # its import takes a second

            metrics["word_error_rate"] = WordErrorRate()
        return metrics

    def compare_words(
        self, metrics: dict[str, Metric], found: Tensor, batch: Any, eos_id: int
    ) -> None:
        """Update the word error rate, if it is logged, with texts `[B, T]` for a batch."""
        if self.word_error_rate:
            told = self.texts(targets_of(batch, eos_id))
            metrics["word_error_rate"].update(self.texts(found), told)

    def texts(self, tokens: Tensor) -> list[str]:
        """Decode texts, `[B, T]` ids, up to the end of each."""
        tokenizer = self.data_tokenizer
        return [tokenizer.decode(ids) for ids in until(tokens.tolist(), tokenizer.eos_id)]


@contextmanager
def language_model(part: nn.Module) -> Iterator[None]:
    """Take the cross-attention out of a decoder in the body of the `with` statement; other parts
    stay as they are."""
    with without_cross_attention(part.backbone) if isinstance(part, TextModel) else nullcontext():
        yield


def add_augmentation(encoder: nn.Module, augment: nn.Module | None) -> None:
    """Set the augmentation of an audio encoder's spectrograms, unless it is None.

    Raises:
        ValueError: If the encoder is another one.
    """
    if augment is None:
        return
    if not hasattr(encoder, "augment"):
        raise ValueError(f"augment requires an audio encoder, got {type(encoder).__name__}")
    encoder.augment = augment


def tokenizer_of(job: Job | None) -> Tokenizer:
    """The tokenizer of the data that a job describes.

    Raises:
        ValueError: If it names none.
    """
    reader = None if job is None else job.reader
    arguments = {} if reader is None else reader["init_args"]
    if "tokenizer" not in arguments:
        raise ValueError(
            "texts need data that name their tokenizer, such as those of datamodules.AudioTextData"
        )
    return load_tokenizer(arguments["tokenizer"], arguments.get("definition"))


def targets_of(batch: Any, padding: int = IGNORE_INDEX) -> Tensor:
    """The tokens of a batch with `padding` after the end of each text, `[B, N]`."""
    tokens = batch["tokens"]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.masked_fill(places >= batch["num_tokens"][:, None], padding)
