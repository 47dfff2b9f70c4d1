"""Language modelling: the next token, or the masked ones."""

import math
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from diffmm.batch import IGNORE_INDEX, InputShapes, TextBatch
from diffmm.models.job import Job, text_reader
from diffmm.models.text import TextModel
from diffmm.ops import AttentionMask
from diffmm.training.accumulation import LossSum
from diffmm.training.finetuning import FineTuneConfig
from diffmm.training.metrics import Perplexity, RatioOfSums
from diffmm.training.optimizer import OptimizerConfig
from diffmm.training.schedule import ScheduleConfig
from diffmm.training.task import Task, check_range


class LanguageTask(Task):
    """Cross-entropy of the batch's targets, a mean over all of them in an optimizer step.

    Logs, besides what every task logs, `val/loss` (nats a target), `val/perplexity` (its exponent)
    and `val/bits_per_byte` (bits that all targets take over the bytes they stand for, which
    compares models with different tokenizers).

    Args:
        model: a text model.
        optimizer, schedule, finetune, compile, activation_checkpointing: as in `Task`.
        tokenizer: name of the tokenizer that made the tokens; checkpoints carry it, so that
            generation finds it.

    Raises:
        ValueError: if the model is a decoder where the task needs an encoder, or the other way.
    """

    CAUSAL: ClassVar[bool]

    def __init__(
        self,
        model: TextModel,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        tokenizer: str = "bytes",
        finetune: FineTuneConfig | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        if model.config.causal != self.CAUSAL:
            raise ValueError(
                f"{type(self).__name__} trains a text model with causal={self.CAUSAL}, "
                f"got causal={model.config.causal}"
            )
        super().__init__(
            model,
            optimizer,
            schedule,
            finetune=finetune,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
        )
        self.config = model.config
        self.tokenizer = tokenizer

    def make_job(self, data: Any) -> Job:
        job = super().make_job(data)
        return job if job.reader else replace(job, reader=text_reader(self.tokenizer))

    def losses(self, batch: TextBatch) -> Tensor:
        """The loss of each position, `[B, N]` in float32, 0 where there is no target."""
        mask = AttentionMask(
            causal=self.CAUSAL,
            document_ids=batch.get("document_ids"),
            key_padding=batch.get("key_padding"),
        )
        logits = self.model(batch["tokens"], mask=mask)
        losses = cross_entropy(
            logits.flatten(0, 1).float(),
            batch["targets"].flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )
        return losses.view_as(batch["targets"])

    def loss_sum(self, batch: TextBatch, batch_idx: int) -> LossSum:
        count = (batch["targets"] != IGNORE_INDEX).sum().float()
        return LossSum(self.losses(batch).sum(), count)

    def target_shapes(self, inputs: InputShapes) -> InputShapes:
        return {"targets": inputs["tokens"]}

    def make_metrics(self) -> dict[str, Metric]:
        return {"loss": RatioOfSums(), "perplexity": Perplexity(), "bits_per_byte": RatioOfSums()}

    def update_metrics(self, batch: TextBatch, metrics: dict[str, Metric]) -> None:
        total = self.losses(batch).sum()
        count = (batch["targets"] != IGNORE_INDEX).sum()
        metrics["loss"].update(total, count)
        metrics["perplexity"].update(total, count)
        metrics["bits_per_byte"].update(total / math.log(2.0), batch["num_bytes"].sum())

    def predict_step(self, batch: TextBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """The negative log-likelihood of each sample's targets, `[B]` nats, and their bytes."""
        nats = self.losses(batch).sum(dim=1)
        return {"index": batch["index"], "nats": nats, "num_bytes": batch["num_bytes"]}

    def check_batch(self, batch: TextBatch) -> None:
        size = self.config.vocab_size
        index = batch["index"]
        check_range("token", batch["tokens"], size, of="token ids", index=index)
        check_range(
            "target", batch["targets"], size, of="token ids", index=index, ignore=IGNORE_INDEX
        )


class CausalLM(LanguageTask):
    """Predict each next token, with a causal text model."""

    CAUSAL = True


class MaskedLM(LanguageTask):
    """Predict masked tokens from all others (Devlin et al. 2019), with a bidirectional one. The
    masks are drawn by the dataset."""

    CAUSAL = False
