"""Checks that weights are finite before they are saved."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor

from diffmm.checkpoint_folders import DIRECTORY_NAME, checkpoints
from diffmm.training.resilience.coordinator import Coordinator


class NonFiniteWeightsError(RuntimeError):
    """Some of the weights are NaN or infinite."""


def check_weights(trainer: Trainer, step: int | None = None) -> None:
    """Check that all weights are finite. All processes must call it at the same step, within `fit`.

    Args:
        trainer: Trainer that runs `fit`.
        step: Step after which the weights were first used, for the message; by default the last.

    Raises:
        NonFiniteWeightsError: On every process, if any weight is not finite; the message names the
            first such weight and the last checkpoint.
    """
    if step is None:
        Coordinator.of(trainer).receive()  # An earlier step may have met them already.
    weights = dict(trainer.lightning_module.named_parameters())
    largest = largest_magnitude(weights.values())
    if trainer.world_size > 1:
        torch.distributed.all_reduce(largest, ReduceOp.MAX)
    if largest.isfinite():
        return
    step = trainer.global_step if step is None else step
    bad = [name for name, weight in weights.items() if not largest_magnitude([weight]).isfinite()]
    saver = Coordinator.of(trainer).saver
    directory = Path(trainer.default_root_dir) / DIRECTORY_NAME
    if saver is not None:
        saver.rest()  # The last checkpoint may still be being written.
        directory = saver.dirpath or directory
    kept = checkpoints(directory)
    last = f"the last good one is {kept[-1].path}" if kept else "and there is no earlier one"
    what = f"{len(bad)} of {len(weights)} weights (the first is {bad[0]})" if bad else "weights"
    where = "" if bad else " in another process"
    raise NonFiniteWeightsError(
        f"{what} are not finite{where} after step {step}: they are not saved in a "
        f"checkpoint, {last}. The step that caused this had a finite gradient: lower the learning "
        f"rate, raise the optimizer's eps, or train in another precision"
    )


def largest_magnitude(tensors: Iterable[Tensor]) -> Tensor:
    """Return the largest magnitude in all tensors, a float32 scalar; infinite if any number is not
    finite. If any are sharded, all processes must call it with the same ones."""
    tensors = [tensor.detach() for tensor in tensors]
    shares = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    # A weight with fewer rows than there are processes has none on some of them.
    norm = nn.utils.get_total_norm([share for share in shares if share.numel()], math.inf)
    # A maximum over processes may ignore NaN, so NaN is mapped to infinity.
    largest = norm.float().to(tensors[0].device).nan_to_num(math.inf, math.inf)
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        torch.distributed.all_reduce(largest, ReduceOp.MAX)
    return largest
