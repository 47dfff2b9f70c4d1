"""Make the step again that a run stopped at, and see where its numbers go bad."""

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
from diffmm.training.resilience.non_finite import sample_ids
from diffmm.training.task import Task


@dataclass(frozen=True)
class MicroBatch:
    """What a micro-batch does to a model.

    Attributes:
        loss: of the whole micro-batch.
        fields: of the batch, that hold numbers that are not finite.
        module: the first part of the model whose output is not finite, by name, if any is.
        samples: whose loss is not finite where each is alone, by their numbers in the dataset (or
            in the batch, if it has no `index`).
        gradients: that are not finite, by the names of their parameters.
    """

    loss: float
    fields: list[str]
    module: str | None
    samples: list[int]
    gradients: list[str]


def load_batches(path: str | Path) -> dict[str, Any]:
    """Read a file that `NonFiniteGuard` has written; no code in it is run.

    Raises:
        ValueError: if it is another file.
        FileNotFoundError: if there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = torch.load(path, weights_only=True)
        if not {"step", "epoch", "batches", "batch_indices"} <= content.keys():
            raise KeyError
    except Exception as error:
        raise ValueError(
            f"{path} is no batch that a run left behind: give a file bad_batch_step_*.pt"
        ) from error
    return content


def replay(trainer: Trainer, task: Task, content: dict[str, Any]) -> list[MicroBatch]:
    """Make a step's forward and backward passes again, with the weights that `task` has.

    Where the model draws random numbers (dropout), they are other ones than in the run; mixtures of
    samples are the same if the run had one process.

    Args:
        trainer: of one process, for its device and precision.
        task: in the state of the checkpoint that was saved when the run stopped.
        content: from `load_batches`.
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
    """Names of the parts whose output is not finite, in the order in which they come to it."""
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
