"""Training of transcription by connectionist temporal classification."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss
from torchmetrics import Metric

from diffmm.batch import InputShapes, inputs_of
from diffmm.layers.norm import upcast
from diffmm.models.ctc import CTCModel, Spoken, needed_times
from diffmm.models.job import Job
from diffmm.models.weights import load_weights
from diffmm.tokenizers import Tokenizer
from diffmm.training.accumulation import LossSum
from diffmm.training.batches import check_range, with_index
from diffmm.training.captioning import add_augmentation, tokenizer_of
from diffmm.training.finetuning import FineTuneConfig, freeze
from diffmm.training.metrics import RatioOfSums
from diffmm.training.optimizer import OptimizerConfig
from diffmm.training.schedule import ScheduleConfig
from diffmm.training.task import Task


class CTC(Task):
    """Transcription of sounds by CTC (Graves et al. 2006): the loss is the negative log-likelihood
    of all alignments of a text with the encoder's tokens, per id of the text.

    The blank is the end of text of the data's tokenizer, which is not part of the targets. In
    addition to the metrics of every task, it logs `val/loss` (nats per id) and, with
    `word_error_rate`, `val/word_error_rate` of greedy decoding (torchmetrics). On a GPU, the
    gradients of torch's CTC are not the same to the last bit in each run.

    Args:
        model: CTC model to train.
        optimizer, schedule, finetune, compile, activation_checkpointing, fp8: See `Task`.
        word_error_rate: Whether to log the word error rate. The data must name their tokenizer.
        skip_too_long: Whether sounds that are too short for their text are left out of the loss;
            otherwise they raise an error. (The encoder needs a token per id, and one more between
            equal ids.)
        augment: Augmentation of the spectrograms of sounds in training, as in `Classification`;
            none by default.
        encoder: Weights for the encoder to start from, such as those of a classifier, and its
            frozen part. None by default.

    Raises:
        ValueError: If the model is no CTC model, or `encoder` has adapters.
    """

    model: CTCModel
    TARGETS: ClassVar[tuple[str, ...]] = ("tokens", "num_tokens")

    def __init__(
        self,
        model: CTCModel,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        word_error_rate: bool = True,
        skip_too_long: bool = False,
        augment: nn.Module | None = None,
        encoder: FineTuneConfig | None = None,
        finetune: FineTuneConfig | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        fp8: bool = False,
    ) -> None:
        if not isinstance(model, CTCModel):
            raise ValueError(f"CTC needs a CTCModel, got {type(model).__name__}")
        self.word_error_rate = word_error_rate
        self.skip_too_long = skip_too_long
        super().__init__(
            model,
            optimizer,
            schedule,
            finetune=finetune,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            fp8=fp8,
        )
        add_augmentation(model.encoder, augment)
        self.encoder = encoder
        if encoder is not None:
            if encoder.lora is not None:
                raise ValueError("encoder.lora is not supported: give finetune.lora")
            self.frozen += freeze(model.encoder, encoder)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.word_error_rate:
            _ = self.data_tokenizer  # an error before training

    def load_first_weights(self) -> None:
        super().load_first_weights()
        if self.encoder is not None and self.encoder.weights is not None:
            load_weights(self.model.encoder, self.encoder.weights, skip_head=True)

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
        media = self._inputs()
        return [(*media, *self.TARGETS), (*media[:1], *self.TARGETS)]

    def check_batch(self, batch: Any) -> None:
        if "document_ids" in batch:
            raise ValueError("packed rows are for captioning: set the data's pairs_per_row to 1")
        if not self.needs_targets:
            return
        tokens, num_tokens, index = batch["tokens"], batch["num_tokens"], batch.get("index")
        config = self.model.config
        check_range("token", tokens, config.vocab_size, of="token ids", index=index)
        if tokens.device.type != "cpu" or not len(tokens):
            return
        last = tokens.gather(1, num_tokens[:, None] - 1)[:, 0]
        if (last != config.blank_id).any():
            found = int(last[last != config.blank_id][0])
            raise ValueError(
                f"the blank is the tokenizer's end of text: the texts end with {found}, but the "
                f"model's blank_id is {config.blank_id}"
            )
        if self.skip_too_long:
            return
        needed = needed_times(tokens, num_tokens - 1)
        times = self.model.num_times(*inputs_of(self.model, batch))
        if (needed > times).any():
            row = int((needed > times).nonzero()[0])
            sample = f"batch entry {row}" if index is None else f"sample {int(index[row])}"
            raise ValueError(
                f"the text of {sample} needs {int(needed[row])} tokens of the encoder, but its "
                f"sound has {int(times[row])}: reduce hop_seconds, the patch size or "
                f"frame_strides, or set skip_too_long=True to leave such samples out"
            )

    def losses(self, batch: Any, found: Spoken) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample, `[B]`, 0 where the text is too long for its sound, and
        the number of ids that count, a scalar."""
        return ctc_losses(batch, found, self.model.config.blank_id)

    def loss_sum(self, batch: Any, batch_idx: int) -> LossSum:
        each, count = self.losses(batch, self.model(*inputs_of(self.model, batch)))
        return LossSum(each.sum(), count.float())

    def target_shapes(self, inputs: InputShapes) -> InputShapes:
        (batch_size, *_), _ = inputs["waveforms"]
        return {
            "tokens": ((batch_size, 2), torch.int64),
            "num_tokens": ((batch_size,), torch.int64),
        }

    def make_metrics(self) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {"loss": RatioOfSums()}
        if self.word_error_rate:
            from torchmetrics.text import WordErrorRate  # its import takes a second

            metrics["word_error_rate"] = WordErrorRate()
        return metrics

    def update_metrics(self, batch: Any, metrics: dict[str, Metric]) -> None:
        found = self.model(*inputs_of(self.model, batch))
        each, count = self.losses(batch, found)
        metrics["loss"].update(each.sum(), count)
        if self.word_error_rate:
            rows = zip(batch["tokens"].tolist(), batch["num_tokens"].tolist(), strict=True)
            told = [self.data_tokenizer.decode(row[: length - 1]) for row, length in rows]
            texts = [self.data_tokenizer.decode(ids) for ids in self.model.greedy(found)]
            metrics["word_error_rate"].update(texts, told)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return the most likely ids of each sound, `[B, N]`, padded with the blank."""
        rows = self.model.greedy(self.model(*inputs_of(self.model, batch)))
        blank, longest = self.model.config.blank_id, max(map(len, rows), default=0)
        padded = [[*row, *[blank] * (longest - len(row))] for row in rows]
        tokens = torch.tensor(padded, dtype=torch.int64).view(len(rows), longest)
        return with_index(batch, tokens=tokens)

    def texts(self, tokens: Tensor) -> list[str]:
        """Decode texts, `[B, N]` ids, padded with the blank."""
        return [self.data_tokenizer.decode(row) for row in tokens.tolist()]


def ctc_losses(batch: Any, found: Spoken, blank_id: int) -> tuple[Tensor, Tensor]:
    """The CTC losses of a batch of sounds with their texts.

    Args:
        batch: A `diffmm.batch.PairBatch` of sounds, whose texts end with the blank.
        found: The output of the model.
        blank_id: Id of the blank.

    Returns:
        The loss of each sample in nats, `[B]`, 0 where the text is too long for its sound, and the
        number of ids that count, a scalar.
    """
    lengths = batch["num_tokens"] - 1
    each = ctc_loss(
        upcast(found.logits).log_softmax(dim=-1).transpose(0, 1),
        batch["tokens"],
        found.lengths,
        lengths,
        blank=blank_id,
        reduction="none",
        zero_infinity=True,
    )
    fits = needed_times(batch["tokens"], lengths) <= found.lengths
    return each.where(fits, 0.0), (lengths * fits).sum()
