"""Training of captioning models: texts that describe images, or transcripts of speech."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from torchmetrics import Metric

from diffmm.batch import InputShapes, inputs_of
from diffmm.models.captioning import CaptioningModel
from diffmm.models.generation import generate
from diffmm.ops import Losses
from diffmm.training.accumulation import LossSum
from diffmm.training.batches import with_index
from diffmm.training.finetuning import FineTuneConfig
from diffmm.training.metrics import RatioOfSums
from diffmm.training.optimizer import OptimizerConfig
from diffmm.training.parallel import data_share
from diffmm.training.schedule import ScheduleConfig
from diffmm.training.sharding import TENSOR_PARALLEL
from diffmm.training.writing import Writing, add_augmentation, targets_of


class Captioning(Writing):
    """Next-token prediction of texts, given images or sounds: captioning and, with sounds of
    speech, transcription.

    In addition to the metrics of every task, it logs `val/loss` (nats per token) and, of texts that
    are generated greedily, `val/exact_match`, the fraction that equals the sample's text, and with
    `word_error_rate` also `val/word_error_rate`.

    Args:
        model: Captioning model to train.
        optimizer, schedule, finetune, compile, activation_checkpointing, fp8: See `Task`;
            `finetune` is for the weights of a whole captioning model.
        max_new_tokens: Maximum number of tokens of a generated text. Longer texts of the data
            cannot be matched.
        num_generated: Number of samples of each evaluation for which a text is generated, the
            first ones of each process, rounded up to whole batches; 0 for none.
        word_error_rate: Whether to log the word error rate, the number of wrong, missing and
            surplus words per word of the data (torchmetrics). The data must name their tokenizer.
        augment: Augmentation of the spectrograms of sounds in training, as in `Classification`;
            none by default.
        encoder: Weights for the encoder to start from, such as those of a classifier, whose head is
            ignored, and its frozen part (`freeze: all` for the whole encoder). None by default.
        decoder: The same for the decoder; `new_head: false` keeps the file's head.

    Raises:
        ValueError: If the model is no captioning model, a number is out of range, or `augment` is
            given for images.
    """

    model: CaptioningModel
    TARGETS: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: CaptioningModel,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        max_new_tokens: int = 64,
        num_generated: int = 256,
        word_error_rate: bool = False,
        augment: nn.Module | None = None,
        encoder: FineTuneConfig | None = None,
        decoder: FineTuneConfig | None = None,
        finetune: FineTuneConfig | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        fp8: bool = False,
    ) -> None:
        if not isinstance(model, CaptioningModel):
            raise ValueError(f"captioning needs a CaptioningModel, got {type(model).__name__}")
        for name, value, least in (
            ("max_new_tokens", max_new_tokens, 1),
            ("num_generated", num_generated, 0),
        ):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if word_error_rate and not num_generated:
            raise ValueError("word_error_rate is that of generated texts: set num_generated")
        self.max_new_tokens = max_new_tokens
        self.num_generated = num_generated
        self.word_error_rate = word_error_rate
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
        self.encoder, self.decoder = encoder, decoder
        self.start_parts({"encoder": encoder, "decoder": decoder})
        self._num_seen = 0

    def setup(self, stage: str) -> None:
        super().setup(stage)
        mesh = self.device_mesh
        if self.num_generated and mesh is not None and mesh[TENSOR_PARALLEL].size() > 1:
            raise ValueError(
                "texts cannot be generated with tensor_parallel_size > 1: set num_generated to 0 "
                "(and generate after training), or use fsdp2 without tensor parallelism"
            )

    def check_batch(self, batch: Any) -> None:
        missing = [name for name in (self._inputs()[1], "num_tokens") if name not in batch]
        if missing:
            raise ValueError(
                f"a batch for this model must have tokens, num_tokens and {self._inputs()[1]}, got "
                f"{', '.join(batch)}"
            )
        last = self.last_tokens(batch, self.model.config.decoder.vocab_size)
        if last is None:
            return
        if (last != last[0]).any():
            row = int((last != last[0]).nonzero()[0])
            raise ValueError(
                f"the last token of each text must be the same end of text, but it is "
                f"{last[0].item()} and {last[row].item()}"
            )

    def losses(self, batch: Any) -> Losses:
        """Return the losses of all tokens, `[B, N]`, and their sum."""
        return caption_losses(self.model, batch)

    def loss_sum(self, batch: Any, batch_idx: int) -> LossSum:
        return LossSum(self.losses(batch).total, batch["num_tokens"].sum().float())

    def target_shapes(self, inputs: InputShapes) -> InputShapes:
        return {"num_tokens": (inputs["tokens"][0][:1], torch.int64)}

    def make_metrics(self) -> dict[str, Metric]:
        metrics = super().make_metrics()
        if self.num_generated:
            metrics["exact_match"] = RatioOfSums()
        return metrics

    def on_validation_epoch_start(self) -> None:
        self._num_seen = 0

    on_test_epoch_start = on_validation_epoch_start

    def update_metrics(self, batch: Any, metrics: dict[str, Metric]) -> None:
        metrics["loss"].update(self.losses(batch).total, batch["num_tokens"].sum())
        # All processes generate for equally many batches.
        count = data_share(self.trainer)[1]
        if self._num_seen * count < self.num_generated:
            found = self.generate(batch)
            exact = is_exact(found, batch)
            metrics["exact_match"].update(exact.sum(), len(exact))
            self.compare_words(metrics, found, batch, eos_of(batch))
        self._num_seen += self._batch_size(batch)

    @torch.no_grad()
    def generate(self, batch: Any) -> Tensor:
        """Generate the most likely text of each sample token by token, `[B, T]` ids with the end
        of text at the end. Of sharded weights, `losses` must have been called before."""
        eos_id = eos_of(batch)
        media, *others = self._media(batch)
        with gathered(self.model) as is_sharded:
            found = generate(
                self.model,
                media=media,
                num_samples=others[0] if others else None,
                max_new_tokens=self.max_new_tokens,
                temperature=0.0,
                # The processes of sharded weights take equally many steps.
                stop_ids=() if is_sharded else (eos_id,),
            )
        is_after = (found == eos_id).cumsum(dim=1) > 0
        return found.masked_fill(is_after, eos_id)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return generated texts, `[B, max_new_tokens]` ids with the end of text at the end, and
        the negative log-likelihood of each sample's own text, `[B]` in nats."""
        nats = self.losses(batch).each.sum(dim=1)
        found = self.generate(batch)
        missing = self.max_new_tokens - found.shape[1]
        tokens = pad(found, (0, missing), value=eos_of(batch))
        return with_index(batch, tokens=tokens, nats=nats)

    def observe(self, batch: Any) -> None:
        self.losses(batch)

    def _media(self, batch: Any) -> list[Tensor]:
        """The media of a batch and, of sounds, their numbers of samples, if given."""
        return [batch[name] for name in self._inputs()[1:] if name in batch]

    def _batch_size(self, batch: Any) -> int:
        """The number of samples of a batch that is not the last one."""
        trainer = self.trainer
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        return getattr(loaders, "batch_size", None) or len(batch["tokens"])


@contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """Gather the weights outside the blocks of a model that is sharded by `shard`, whose forward
    pass has been called; blocks gather their own. Yields whether it is sharded."""
    if not isinstance(model, FSDPModule):
        yield False
        return
    model.unshard()
    try:
        yield True
    finally:
        model.reshard()


def eos_of(batch: Any) -> int:
    """The end-of-text id, the last token of each text."""
    return int(batch["tokens"][0, batch["num_tokens"][0] - 1])


def caption_losses(model: CaptioningModel, batch: Any) -> Losses:
    """The losses of all tokens of the texts of a batch (`diffmm.batch.PairBatch`), `[B, N]`, and
    their sum."""
    losses: Losses = model(
        *inputs_of(model, batch),
        document_ids=batch.get("document_ids"),
        media_documents=batch.get("media_documents"),
        targets=targets_of(batch),
    )
    return losses


def is_exact(found: Tensor, batch: Any) -> Tensor:
    """Whether generated texts, `[B, T]` ids with the end of text at the end, are those of a batch:
    `[B]` booleans."""
    eos_id = eos_of(batch)
    rows = [found, targets_of(batch, eos_id)]
    length = max(row.shape[1] for row in rows)
    one, other = (pad(row, (0, length - row.shape[1]), value=eos_id) for row in rows)
    return (one == other).all(dim=1)
