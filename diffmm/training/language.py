"""Causal and masked language modeling."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from diffmm.batch import IGNORE_INDEX, InputShapes, TextBatch, answer_counts
from diffmm.models.job import Job, text_reader
from diffmm.models.text import TextModel
from diffmm.ops import AttentionMask, Losses
from diffmm.training.accumulation import LossSum
from diffmm.training.batches import check_range, with_index
from diffmm.training.finetuning import FineTuneConfig
from diffmm.training.metrics import Perplexity, RatioOfSums
from diffmm.training.optimizer import OptimizerConfig
from diffmm.training.schedule import ScheduleConfig
from diffmm.training.task import Task


class LanguageTask(Task):
    """Cross-entropy averaged over all targets of an optimizer step.

    In addition to the metrics of every task, it logs `val/loss` (nats per target),
    `val/perplexity` (`exp(val/loss)`) and `val/bits_per_byte` (the total loss in bits divided by
    the number of bytes that the targets encode). Bits per byte are comparable between tokenizers,
    and are logged only if the batches contain `num_bytes`. With `answers`, it also logs
    `val/accuracy`.

    Args:
        model: Text model to train.
        optimizer, schedule, finetune, compile, activation_checkpointing, fp8: See `Task`.
        tokenizer: Name of the tokenizer that produced the tokens. Checkpoints store it for text
            generation.
        answers: Whether the targets are answers, such as those of `datamodules.RetrievalData`.
            Evaluation then logs `val/accuracy`, the fraction of answers all of whose tokens have
            the highest logits (see `diffmm.batch.answer_counts`), and holds all logits of a batch
            in memory.

    Raises:
        ValueError: If `model.config.causal` is not what the task needs.
    """

    CAUSAL: ClassVar[bool]
    TARGETS: ClassVar[tuple[str, ...]] = ("targets",)

    def __init__(
        self,
        model: TextModel,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        tokenizer: str = "bytes",
        answers: bool = False,
        finetune: FineTuneConfig | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        fp8: bool = False,
    ) -> None:
        if model.config.causal != self.CAUSAL:
            raise ValueError(
                f"{type(self).__name__} trains a text model with causal={self.CAUSAL}, "
                f"got causal={model.config.causal}"
            )
        self.answers = answers
        super().__init__(
            model,
            optimizer,
            schedule,
            finetune=finetune,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            fp8=fp8,
        )
        self.config = model.config
        self.tokenizer = tokenizer

    def make_job(self, data: Any) -> Job:
        job = super().make_job(data)
        return job if job.reader else replace(job, reader=text_reader(self.tokenizer))

    def mask(self, batch: TextBatch) -> AttentionMask:
        """Return the mask of a batch."""
        return AttentionMask(
            causal=self.CAUSAL,
            document_ids=batch.get("document_ids"),
            key_padding=batch.get("key_padding"),
        )

    def losses(self, batch: TextBatch) -> Losses:
        """Return the losses of all positions, `[B, N]`, and their sum."""
        return self.model(batch["tokens"], mask=self.mask(batch), targets=batch["targets"])

    def loss_sum(self, batch: TextBatch, batch_idx: int) -> LossSum:
        count = (batch["targets"] != IGNORE_INDEX).sum().float()
        return LossSum(self.losses(batch).total, count)

    def target_shapes(self, inputs: InputShapes) -> InputShapes:
        return {"targets": inputs["tokens"]}

    def make_metrics(self) -> dict[str, Metric]:
        accuracy = {"accuracy": RatioOfSums()} if self.answers else {}
        return {
            "loss": RatioOfSums(),
            "perplexity": Perplexity(),
            "bits_per_byte": RatioOfSums(),
            **accuracy,
        }

    def update_metrics(self, batch: TextBatch, metrics: dict[str, Metric]) -> None:
        if self.answers:
            targets = batch["targets"]
            logits = self.model(batch["tokens"], mask=self.mask(batch)).float()
            total = cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
            num_exact, num_answers = answer_counts(logits.argmax(dim=-1), targets)
            metrics["accuracy"].update(num_exact.sum(), num_answers.sum())
        else:
            total = self.losses(batch).total
        count = (batch["targets"] != IGNORE_INDEX).sum()
        metrics["loss"].update(total, count)
        metrics["perplexity"].update(total, count)
        self.unmeasured = set() if "num_bytes" in batch else {"bits_per_byte"}
        if not self.unmeasured:
            metrics["bits_per_byte"].update(total / math.log(2.0), batch["num_bytes"].sum())

    def predict_step(self, batch: TextBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return the negative log-likelihood of each sample's targets, `[B]` in nats, and the
        number of bytes that they encode, if known."""
        known = {"num_bytes": batch["num_bytes"]} if "num_bytes" in batch else {}
        return with_index(batch, nats=self.losses(batch).each.sum(dim=1), **known)

    @property
    def needs_targets(self) -> bool:
        return True

    def check_batch(self, batch: TextBatch) -> None:
        size = self.config.vocab_size
        index = batch.get("index")
        for name in ("tokens", "targets"):
            ids: Tensor = batch[name]
            if ids.shape != batch["tokens"].shape or ids.ndim != 2 or ids.dtype != torch.int64:
                raise ValueError(
                    f"tokens and targets must be int64 of the same shape [B, N], got {name} with "
                    f"{tuple(ids.shape)} {ids.dtype}"
                )
        check_range("token", batch["tokens"], size, of="token ids", index=index)
        check_range(
            "target", batch["targets"], size, of="token ids", index=index, ignore=IGNORE_INDEX
        )


class CausalLM(LanguageTask):
    """Next-token prediction with a causal text model.

    A batch may also be tokens alone, `[B, N + 1]`: the first `N` are the inputs and the last `N`
    the targets.
    """

    CAUSAL = True

    def layouts(self) -> list[Sequence[str]]:
        return [*super().layouts(), ("tokens",)]

    def prepared(self, batch: Any) -> Any:
        tokens = batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 else batch
        if isinstance(tokens, Tensor):
            if tokens.ndim != 2 or tokens.shape[1] < 2:
                raise ValueError(
                    f"tokens alone must be [B, N + 1] with N >= 1, got {tuple(tokens.shape)}"
                )
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        return super().prepared(batch)


class MaskedLM(LanguageTask):
    """Masked-token prediction with a bidirectional text model (Devlin et al. 2019). The dataset
    draws the masks."""

    CAUSAL = False
