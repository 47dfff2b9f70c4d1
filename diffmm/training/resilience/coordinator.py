"""What the callbacks of a run share: one agreement of all processes in every optimizer step."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed import ReduceOp

Question = Callable[[], Tensor | float]
"""What a process knows, as one number that is 0 where all is well."""


class Saver(Protocol):
    """What keeps a run's checkpoints."""

    dirpath: Path | None
    """Where, once it is known."""

    def rest(self) -> None:
        """Wait until no checkpoint is being written."""

    def save_now(self, trainer: Trainer, *, reason: str) -> Path:
        """Save at once, on all processes together."""


class Coordinator:
    """One per trainer: callbacks put their questions to it, and the first that wants to know asks
    all processes about all of them, by one all-reduce of one small tensor.

    Attributes:
        norm: The norm of the step's gradients before clipping, once it is known.
        saver: What saves a run that is about to end.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None
        self.saver: Saver | None = None
        self._questions: dict[str, Question] = {}
        self._answers: dict[str, float] = {}
        self._batch = -1

    @staticmethod
    def of(trainer: Trainer) -> "Coordinator":
        """The trainer's own."""
        return _COORDINATORS.setdefault(trainer, Coordinator())

    def ask(self, name: str, question: Question) -> None:
        """Have a question put to all processes whenever they agree."""
        self._questions[name] = question

    def agree(self, trainer: Trainer, names: Sequence[str]) -> list[float]:
        """The largest answers of all processes to these questions. All that have been asked are
        answered at the same time, and then known for as long as the batch is the same.

        Every process calls this at the same place of its batch. It waits for the GPU once.
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
