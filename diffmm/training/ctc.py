"""Training of transcription by connectionist temporal classification."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss
from torchmetrics import Metric

from diffmm.batch import InputShapes, inputs_of
from diffmm.layers.norm import upcast
from diffmm.models.ctc import CTCModel, Spoken, needed_times
from diffmm.training.accumulation import LossSum
from diffmm.training.batches import with_index
from diffmm.training.finetuning import FineTuneConfig
from diffmm.training.optimizer import OptimizerConfig
from diffmm.training.schedule import ScheduleConfig
from diffmm.training.writing import TEXTS, Writing, add_augmentation


class CTC(Writing):
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
    TARGETS: ClassVar[tuple[str, ...]] = TEXTS

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
        self.start_parts({"encoder": encoder})

    def check_batch(self, batch: Any) -> None:
        if "document_ids" in batch:
            raise ValueError("packed rows are for captioning: set the data's pairs_per_row to 1")
        if not self.needs_targets:
            return
        config = self.model.config
        last = self.last_tokens(batch, config.vocab_size)
        if last is None:
            return
        if (last != config.blank_id).any():
            found = int(last[last != config.blank_id][0])
            raise ValueError(
                f"the blank is the tokenizer's end of text: the texts end with {found}, but the "
                f"model's blank_id is {config.blank_id}"
            )
        if self.skip_too_long:
            return
        needed = needed_times(batch["tokens"], batch["num_tokens"] - 1)
        times = self.model.num_times(*inputs_of(self.model, batch))
        if (needed > times).any():
            row, index = int((needed > times).nonzero()[0]), batch.get("index")
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

    def update_metrics(self, batch: Any, metrics: dict[str, Metric]) -> None:
        found = self.model(*inputs_of(self.model, batch))
        each, count = self.losses(batch, found)
        metrics["loss"].update(each.sum(), count)
        self.compare_words(metrics, self.padded(found), batch, self.model.config.blank_id)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return the most likely ids of each sound, `[B, N]`, padded with the blank."""
        return with_index(batch, tokens=self.padded(self.model(*inputs_of(self.model, batch))))

    def padded(self, found: Spoken) -> Tensor:
        """The most likely ids of each sound, `[B, N]`, padded with the blank."""
        rows = self.model.greedy(found)
        blank, longest = self.model.config.blank_id, max(map(len, rows), default=0)
        ids = [[*row, *[blank] * (longest - len(row))] for row in rows]
        return torch.tensor(ids, dtype=torch.int64).view(len(rows), longest)


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
