"""State for bitwise identical resuming, in addition to what Lightning saves."""

import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffmm.training.resilience.checkpoints import progress
from diffmm.training.resilience.checkpoints.random_state import (
    branch_random_state,
    random_state,
    set_random_state,
)

EXACT_KEY = "exact_resume"
"""Checkpoint key of this state."""


SETTINGS = (
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "overfit_batches",
)
"""Trainer settings that affect the next steps."""


def exact_state(trainer: Trainer) -> dict[str, Any]:
    """Return the random states of every process, its accumulated gradients and losses, and the
    trainer settings that they depend on.

    Must be called on every process, after the same batch.
    """
    own: dict[str, Any] = {"random": random_state(trainer.strategy.root_device)}
    if not progress.is_step_boundary(trainer):
        own["gradients"] = {
            name: local(parameter.grad).to("cpu", copy=True)
            for name, parameter in trainer.lightning_module.named_parameters()
            if parameter.grad is not None
        }
        accumulated: Any = getattr(trainer.lightning_module, "accumulated", None)
        if accumulated is not None:
            own["accumulated"] = {k: v.cpu() for k, v in accumulated.state_dict().items()}
    return {
        "processes": gather(trainer, own),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "settings": {name: getattr(trainer, name) for name in SETTINGS},
        # A run stopped by a criterion stays stopped; one that reached its time limit may resume.
        "should_stop": trainer.should_stop and not is_out_of_time(trainer),
    }


def check_exact(trainer: Trainer, state: dict[str, Any]) -> None:
    """Check that a run can resume exactly, and warn about settings that change its next steps.

    Raises:
        ValueError: If it cannot; the message names the change.
    """
    then, now = state["accumulate_grad_batches"], trainer.accumulate_grad_batches
    if then != now:
        raise ValueError(
            f"the run was saved with accumulate_grad_batches={then}, which is now {now}: resume "
            f"with {then}"
        )
    for name, value in state.get("settings", {}).items():
        if value != getattr(trainer, name):
            rank_zero_warn(
                f"the run resumes with {name}={getattr(trainer, name)!r} instead of {value!r}: its "
                f"next steps differ from those of an uninterrupted run"
            )
    processes, world_size = state["processes"], trainer.world_size
    if hasattr(trainer.lightning_module, "accumulated") and (
        "gradients" in processes[0] and "accumulated" not in processes[0]
    ):
        raise ValueError(
            "the checkpoint was saved within an accumulated step by an earlier version, without "
            "the number of targets: resume from another checkpoint"
        )
    if len(processes) == world_size:
        return
    if "gradients" in processes[0]:
        raise ValueError(
            f"the checkpoint of {len(processes)} processes was saved within an accumulated step, "
            f"which {world_size} cannot finish exactly: resume with {len(processes)}"
        )
    rank_zero_warn(
        f"the run resumes with {world_size} processes instead of {len(processes)}: each step has "
        f"the same samples, distributed differently, but random draws per batch (dropout, mixing) "
        f"differ from those of an uninterrupted run"
    )


def restore_exact(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restore `state`, right before the next batch."""
    progress.end_epoch_if_over(trainer)
    trainer.should_stop = trainer.should_stop or state["should_stop"]
    processes, rank, device = state["processes"], trainer.global_rank, trainer.strategy.root_device
    if rank >= len(processes):
        branch_random_state(processes[0]["random"], rank, device)
        return
    set_random_state(processes[rank]["random"], device)
    if "accumulated" in processes[rank]:
        accumulated: Any = trainer.lightning_module.accumulated
        accumulated.load_state_dict(processes[rank]["accumulated"], device)
    gradients = processes[rank].get("gradients", {})
    for name, parameter in trainer.lightning_module.named_parameters():
        if name in gradients:
            parameter.grad = gradient_of(parameter, gradients[name])


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the whole tensor if it is not sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def gradient_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return a parameter's gradient from this process's shard of it.

    Raises:
        ValueError: If the parameter is sharded differently than when the gradient was saved.
    """
    share = local(parameter)
    if gradient.shape != share.shape:
        raise ValueError(
            "the checkpoint was saved within an accumulated step, which another strategy cannot "
            "finish exactly: resume with the strategy that it was saved under"
        )
    gradient = gradient.to(share)
    if not isinstance(parameter, DTensor):
        return gradient
    return DTensor.from_local(
        gradient,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def trust_data(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Silence Lightning's warning about a stateless data loader if the datamodule saves the
    position in the data."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is not None and checkpoint.get(type(datamodule).__qualname__):
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")


def gather(trainer: Trainer, own: Any) -> list[Any]:
    """Gather an object from all processes, in order of their ranks."""
    every = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(every, own)
    return every


def start_timers(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Restart time limits (`max_time`) on resuming: a limit that was already reached would stop the
    run before its first step."""
    for timer in timers(trainer):
        checkpoint.get("callbacks", {}).pop(timer.state_key, None)


def timers(trainer: Trainer) -> list[Timer]:
    """Return the trainer's `Timer` callbacks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]


def is_out_of_time(trainer: Trainer) -> bool:
    """Whether a time limit (`max_time`) has been reached."""
    remaining = [timer.time_remaining() for timer in timers(trainer)]
    return any(seconds is not None and seconds <= 0.0 for seconds in remaining)
