"""What a run needs, besides what Lightning keeps, to go on with the same bits."""

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
"""Where a checkpoint keeps it."""


SETTINGS = (
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "overfit_batches",
)
"""Of a trainer: they decide what the next steps are."""


def exact_state(trainer: Trainer) -> dict[str, Any]:
    """Random states of every process, gradients and losses that no step has taken yet, and what
    they are of.

    To be called on every process, after the same batch.
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
        # A run that a criterion has ended does not begin again; one that ran out of time may.
        "should_stop": trainer.should_stop and not is_out_of_time(trainer),
    }


def check_exact(trainer: Trainer, state: dict[str, Any]) -> None:
    """Refuse to go on where it could not be exact, or say what differs.

    Raises:
        ValueError: naming what was changed.
    """
    then, now = state["accumulate_grad_batches"], trainer.accumulate_grad_batches
    if then != now:
        raise ValueError(
            f"the run took steps of {then} batches each, accumulate_grad_batches is now {now}: "
            f"resume with {then}"
        )
    for name, value in state.get("settings", {}).items():
        if value != getattr(trainer, name):
            rank_zero_warn(
                f"the run goes on with {name}={getattr(trainer, name)!r} in place of {value!r}: "
                f"its next steps are not what they would have been"
            )
    processes, world_size = state["processes"], trainer.world_size
    if hasattr(trainer.lightning_module, "accumulated") and (
        "gradients" in processes[0] and "accumulated" not in processes[0]
    ):
        raise ValueError(
            "the checkpoint stands within an accumulated step and does not know how many targets "
            "that has had, as those of earlier versions: go on from another one"
        )
    if len(processes) == world_size:
        return
    if "gradients" in processes[0]:
        raise ValueError(
            f"the checkpoint of {len(processes)} processes stands within an accumulated step, "
            f"which {world_size} cannot finish exactly: resume with {len(processes)}"
        )
    rank_zero_warn(
        f"the run goes on with {world_size} processes in place of {len(processes)}: each step "
        f"takes the same samples, dealt out anew, but what is drawn for a batch (dropout, mixing) "
        f"is not what it would have been"
    )


def restore_exact(trainer: Trainer, state: dict[str, Any]) -> None:
    """Go on from `state`, right before the next batch."""
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
    """This process's share of a tensor; all of it where it is not sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def gradient_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A parameter's gradient from this process's share of it.

    Raises:
        ValueError: if the parameter is sharded in another way than it was.
    """
    share = local(parameter)
    if gradient.shape != share.shape:
        raise ValueError(
            "the checkpoint stands within an accumulated step, which another strategy cannot "
            "finish exactly: resume with the one it was saved under"
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
    """Keep Lightning from warning of a loader that does not know its place, where the datamodule
    has kept it."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is not None and checkpoint.get(type(datamodule).__qualname__):
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")


def gather(trainer: Trainer, own: Any) -> list[Any]:
    """What each process has, in order of their ranks."""
    every = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(every, own)
    return every


def start_timers(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a time limit (`max_time`) be that of each start: one that was used up would end a run
    that goes on before its first step."""
    for timer in timers(trainer):
        checkpoint.get("callbacks", {}).pop(timer.state_key, None)


def timers(trainer: Trainer) -> list[Timer]:
    """What watches the time."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]


def is_out_of_time(trainer: Trainer) -> bool:
    """Whether a time limit (`max_time`) has been reached."""
    remaining = [timer.time_remaining() for timer in timers(trainer)]
    return any(seconds is not None and seconds <= 0.0 for seconds in remaining)
