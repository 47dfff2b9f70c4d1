"""Shared state of a run's callbacks, with one all-reduce per optimizer step."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed import ReduceOp

Question = Callable[[], Tensor | float]
"""Returns this process's answer, a number that is 0 in the normal case."""


class Saver(Protocol):
    """Interface of the callback that saves a run's checkpoints."""

    dirpath: Path | None
    """Folder of the checkpoints, once it is known."""

    def rest(self) -> None:
        """Wait until no checkpoint is being written."""

    def save_now(self, trainer: Trainer, *, reason: str) -> Path:
        """Save immediately, on all processes together."""


class Coordinator:
    """Collects the questions of all callbacks of a trainer. The first callback in a batch that
    needs an answer triggers one all-reduce of a small tensor, which answers all of them.

    Attributes:
        norm: Norm of the step's gradients before clipping, once it is known.
        saver: Callback that saves a run before it stops.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None
        self.saver: Saver | None = None
        self._questions: dict[str, Question] = {}
        self._answers: dict[str, float] = {}
        self._batch = -1

    @staticmethod
    def of(trainer: Trainer) -> "Coordinator":
        """Return the coordinator of a trainer."""
        return _COORDINATORS.setdefault(trainer, Coordinator())

    def ask(self, name: str, question: Question) -> None:
        """Register a question that is answered at every `agree`."""
        self._questions[name] = question

    def agree(self, trainer: Trainer, names: Sequence[str]) -> list[float]:
        """Return, for each named question, the largest answer of all processes.

        All registered questions are answered together, and the answers are cached for the current
        batch. Every process must call this at the same point of the batch. It synchronizes the GPU
        once.
        """
        batch = trainer.fit_loop.total_batch_idx
        if batch != self._batch:
            found = [question() for question in self._questions.values()]
            device = trainer.strategy.root_device
            if trainer.world_size > 1 or any(isinstance(value, Tensor) for value in found):
                numbers = torch.stack([torch.as_tensor(v, device=device).float() for v in found])
                if trainer.world_size > 1:
                    torch.distributed.all_reduce(numbers, ReduceOp.MAX)
                found = numbers.tolist()
            self._answers = dict(zip(self._questions, map(float, found), strict=True))
            self._batch = batch
        return [self._answers[name] for name in names]


_COORDINATORS: WeakKeyDictionary[Trainer, Coordinator] = WeakKeyDictionary()
