"""Repeats the step at which a run stopped, and locates its non-finite numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor, nn

from diffmm.batch import samples_of, size_of
from diffmm.training.resilience.bad_steps import sample_ids
from diffmm.training.task import Task


@dataclass(frozen=True)
class MicroBatch:
    """Non-finite numbers in the forward and backward pass of a micro-batch.

    Attributes:
        loss: Loss of the micro-batch.
        fields: Batch fields that contain non-finite numbers.
        module: Name of the first submodule whose output is not finite, if any.
        samples: Samples whose individual loss is not finite, by their position in the dataset (or
            in the batch, if it has no `index`).
        gradients: Names of the parameters whose gradient is not finite.
    """

    loss: float
    fields: list[str]
    module: str | None
    samples: list[int]
    gradients: list[str]


def load_batches(path: str | Path) -> dict[str, Any]:
    """Read a file written by `NonFiniteGuard`, without running code from it.

    Raises:
        ValueError: If it is another kind of file.
        FileNotFoundError: If the file does not exist.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = torch.load(path, weights_only=True)
        if not {"step", "epoch", "batches", "batch_indices"} <= content.keys():
            raise KeyError
    except Exception as error:
        raise ValueError(
            f"{path} is not a batch saved by a stopped run: give a file bad_batch_step_*.pt"
        ) from error
    return content


def replay(trainer: Trainer, task: Task, content: dict[str, Any]) -> list[MicroBatch]:
    """Repeat the forward and backward passes of a step, with the current weights of `task`.

    Random numbers that the model draws (dropout) differ from those of the run. Mixtures of samples
    are the same if the run had one process.

    Args:
        trainer: Single-process trainer, which provides the device and the precision.
        task: Task with the weights of the checkpoint that was saved when the run stopped.
        content: Contents of the file, from `load_batches`.

    Returns:
        One result per micro-batch.
    """
    device = trainer.strategy.root_device
    task.trainer = trainer
    task.to(device).train()
    trainer.fit_loop.epoch_progress.current.completed = content["epoch"]
    return [
        _replay(trainer, task, move_data_to_device(batch, device), number)
        for number, batch in zip(content["batch_indices"], content["batches"], strict=True)
    ]


def _replay(trainer: Trainer, task: Task, batch: dict[str, Tensor], number: int) -> MicroBatch:
    with trainer.precision_plugin.forward_context():
        with _first_bad_output(task.model) as found:
            loss = task.training_loss(batch, number)
        loss.backward()
        gradients = [
            name
            for name, parameter in task.model.named_parameters()
            if parameter.grad is not None and not _is_finite(parameter.grad)
        ]
        task.zero_grad()
        samples = []
        with torch.no_grad():
            ids = sample_ids(batch) or list(range(size_of(batch)))
            for place, sample in enumerate(ids):
                alone = samples_of(batch, slice(place, place + 1))
                if not _is_finite(task.training_loss(alone, number)):
                    samples.append(sample)
    fields = [name for name, value in batch.items() if not _is_finite(value)]
    return MicroBatch(loss.item(), fields, next(iter(found), None), samples, gradients)


@contextmanager
def _first_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of submodules whose output is not finite, in execution order."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else (output,)
            if not all(_is_finite(each) for each in outputs if isinstance(each, Tensor)):
                found.append(name or type(module).__name__)

        return hook

    handles = [part.register_forward_hook(watch(name)) for name, part in model.named_modules()]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(value.isfinite().all())
