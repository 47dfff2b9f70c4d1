"""A callback that logs cheap measurements of attention during training."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from diffmm.analysis.batches import Batch, mask_of, seeded
from diffmm.analysis.concentration import ConcentrationMeter
from diffmm.analysis.map_blocks import LayerInputs, visit_layers
from diffmm.analysis.quantization import largest_logits
from diffmm.analysis.row_means import mean_over
from diffmm.batch import inputs_of, samples_of
from diffmm.training.lightning_internals import is_logging_step
from diffmm.training.resilience.checkpoints.progress import is_step_boundary
from diffmm.training.step_log import log_step

LOGGED = ("entropy", "first_share", "negative_share")
"""Measures of concentration that are logged."""


class AttentionMonitor(Callback):
    """Logs measurements of the maps on the same few samples throughout training:

    | name | meaning |
    |---|---|
    | `attention/entropy` | entropy of the maps, in nats |
    | `attention/first_share` | share of the attention to the first token |
    | `attention/negative_share` | share of negative weight |
    | `attention/top_logit` | the largest magnitude of an attention logit in any layer |

    The first three are means over queries, heads and layers of the map that multiplies the values,
    as in `diffmm.analysis.concentration`. The samples are the first ones of the first training
    batch. They are kept in checkpoints, so that a resumed run continues with them, and training
    draws the same random numbers with and without this callback. With several processes, they and
    the heads are those of the process that logs.

    Args:
        every_n_steps: Number of optimizer steps between measurements, a multiple of the trainer's
            `log_every_n_steps`.
        num_samples: Number of samples, at least 1.

    Raises:
        ValueError: If a number is below 1; or, when training starts, if `every_n_steps` is not a
            multiple of `log_every_n_steps`.
    """

    def __init__(self, every_n_steps: int = 100, num_samples: int = 1) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_samples", num_samples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.samples: dict[str, Tensor] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and self.every_n_steps % interval:
            raise ValueError(
                f"every_n_steps={self.every_n_steps} of AttentionMonitor must be a multiple of the "
                f"trainer's log_every_n_steps={interval}, because other steps are not logged"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.samples is None:
            few = samples_of(batch, slice(self.num_samples))
            self.samples = {k: v.cpu().clone() for k, v in few.items() if isinstance(v, Tensor)}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        is_due = trainer.global_step % self.every_n_steps == 0 and is_step_boundary(trainer)
        if not (is_due and is_logging_step(trainer)) or self.samples is None:
            return
        samples = {name: value.to(pl_module.device) for name, value in self.samples.items()}
        model: Any = pl_module.model
        with trainer.precision_plugin.forward_context(), seeded(0, pl_module.device):
            found = cheap_measures(model, samples)
        for name, value in found.items():
            log_step(pl_module, f"attention/{name}", value)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.samples is None else {"samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples = state_dict.get("samples")


@torch.no_grad()
def cheap_measures(model: nn.Module, batch: Batch) -> dict[str, float]:
    """The measures that `AttentionMonitor` logs, of a model on a batch."""
    meter, top = ConcentrationMeter(), 0.0

    def visit(layer: LayerInputs) -> None:
        nonlocal top
        meter.add(layer)
        top = max(top, float(largest_logits(layer).max()))

    visit_layers(model, *inputs_of(model, batch), visit=visit, mask=mask_of(model, batch))
    combined = [list(layer.maps.values())[-1] for layer in meter.layers()]
    found = {name: mean_over([measures[name] for measures in combined]) for name in LOGGED}
    return {**found, "top_logit": top}
