"""Shared state of a run's callbacks, with one all-reduce per optimizer step.

Nothing here waits for the GPU in a normal step. What the host needs to know about a step is copied
to it while the GPU works, and is received during the next step, when the copy has long arrived.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed import ReduceOp

from diffmm.models.host_copy import HostCopy

Question = Callable[[], Tensor | float]
"""Returns this process's answer, a number that is 0 in the normal case."""

Receiver = Callable[[list[float]], None]
"""Receives numbers that have been copied from the device."""


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
    needs an answer triggers one all-reduce of a small tensor, which answers all of them: with
    `agree`, immediately, or with `agree_later`, on the device now and on the host later.

    Attributes:
        norm: Norm of the step's gradients before clipping, once it is known.
        saver: Callback that saves a run before it stops.
        last_validation_follows: Whether a validation outside of the schedule follows the current
            batch, because it is the last of the run.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None
        self.saver: Saver | None = None
        self.last_validation_follows = False
        self._questions: dict[str, Question] = {}
        self._answers: dict[str, float] = {}
        self._batch = -1
        self._sent: deque[tuple[HostCopy, Receiver]] = deque()

    @staticmethod
    def of(trainer: Trainer) -> "Coordinator":
        """Return the coordinator of a trainer."""
        return _COORDINATORS.setdefault(trainer, Coordinator())

    def ask(self, name: str, question: Question) -> None:
        """Register a question that is answered at every `agree` and `agree_later`."""
        self._questions[name] = question

    def agree(self, trainer: Trainer, names: Sequence[str]) -> list[float]:
        """Return, for each named question, the largest answer of all processes.

        All registered questions are answered together, and the answers are cached for the current
        batch. Every process must call this at the same point of the batch. It synchronizes the GPU
        once.
        """
        if trainer.fit_loop.total_batch_idx != self._batch:
            self._batch = trainer.fit_loop.total_batch_idx
            found = self._ask_all()
            if trainer.world_size > 1 or any(isinstance(value, Tensor) for value in found):
                found = self._largest(trainer, found).tolist()
            self._answers = dict(zip(self._questions, map(float, found), strict=True))
        return [self._answers[name] for name in names]

    def agree_later(
        self, trainer: Trainer, receive: Callable[[dict[str, float]], None]
    ) -> dict[str, Tensor]:
        """Return the largest answers of all processes to all questions, as scalars on the device,
        and pass them to `receive` once they are on the host.

        Every process must call this at the same point of the batch, and before anything calls
        `agree`.
        """
        self._batch = trainer.fit_loop.total_batch_idx
        names = tuple(self._questions)
        answers = self._largest(trainer, self._ask_all())

        def receive_all(numbers: list[float]) -> None:
            self._answers = dict(zip(names, numbers, strict=True))
            receive(self._answers)

        self.send(answers, receive_all)
        return dict(zip(names, answers.unbind(), strict=True))

    def latest(self, trainer: Trainer, name: str) -> float:
        """Return the newest answer that the host has, the same on all processes: that of the
        current batch or, while it is still on the device, that of the batch before it."""
        if trainer.fit_loop.total_batch_idx != self._batch:
            return self.agree(trainer, [name])[0]
        return self._answers.get(name, 0.0)

    def send(self, numbers: Tensor, receive: Receiver) -> None:
        """Begin to copy a one-dimensional tensor to the host, and pass it to `receive` later."""
        self._sent.append((HostCopy(numbers), receive))

    def receive(self, *, all_but: int = 0) -> None:
        """Pass on what was sent, in that order, except the last `all_but` tensors. Waits for the
        device if it has not yet computed them."""
        while len(self._sent) > all_but:
            copy, receive = self._sent.popleft()
            receive(copy.wait().tolist())

    def _ask_all(self) -> list[Tensor | float]:
        return [question() for question in self._questions.values()]

    def _largest(self, trainer: Trainer, found: list[Tensor | float]) -> Tensor:
        device = trainer.strategy.root_device
        # `torch.tensor(0.0, device=device)` would wait for the device; filling does not.
        numbers = torch.stack(
            [
                v.to(device, torch.float32)
                if isinstance(v, Tensor)
                else torch.full((), v, device=device)
                for v in found
            ]
        )
        if trainer.world_size > 1:
            torch.distributed.all_reduce(numbers, ReduceOp.MAX)
        return numbers


_COORDINATORS: WeakKeyDictionary[Trainer, Coordinator] = WeakKeyDictionary()
