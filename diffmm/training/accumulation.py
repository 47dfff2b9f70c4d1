"""Gradients of one large batch, however it is divided into micro-batches and processes.

Lightning adds up the gradients of `loss / accumulate_grad_batches`, and every strategy takes their
mean over processes. Were each loss the mean over its own targets, a micro-batch with few of them
would count as much as one with many, and the last step of an epoch, with fewer micro-batches, would
be too small. So the losses of a step are sums, all over one `reference`, and when its gradients
are complete they are multiplied by

    accumulate_grad_batches * reference / count

where `count` is how many targets the step has, a mean over processes. A step of one micro-batch
has its own count for a reference, and nothing is multiplied.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmm.training.sharding import by_mesh


class LossSum(NamedTuple):
    """The loss of a batch, over all that is predicted in it."""

    total: Tensor
    """The sum of the losses of all targets, a scalar with its graph."""
    num_targets: Tensor
    """How many there are, a scalar in float32."""

    def mean(self) -> Tensor:
        """The loss of this batch alone; 0 if it has no target."""
        return self.total / self.num_targets.clamp(min=1.0)


class AccumulatedLoss:
    """The loss of the micro-batches of one optimizer step, as far as they have come."""

    def __init__(self) -> None:
        self.total = self.count = self.reference = torch.zeros(())
        self._least = 1.0

    def add(self, loss: LossSum, count: Tensor, *, is_first: bool, least: float) -> Tensor:
        """Add a micro-batch, and return what to descend on.

        Args:
            loss: of the micro-batch in this process.
            count: its targets, as a mean over processes.
            is_first: whether a new step begins.
            least: what stands for a count of 0: one target of all processes.
        """
        self._least = least
        if is_first:
            self.total, self.count = loss.total.detach(), count
            self.reference = count.clamp(min=least)
        else:
            # Without any target so far there is no gradient yet that another one would not suit.
            self.reference = torch.where(self.count > 0, self.reference, count.clamp(min=least))
            self.total, self.count = self.total + loss.total.detach(), self.count + count
        return loss.total / self.reference

    def mean(self) -> Tensor:
        """The loss of the step; its mean over processes is that of all of them."""
        return self.total / self.count.clamp(min=self._least)

    def complete(self, parameters: Iterable[nn.Parameter], num_micro_batches: int) -> None:
        """Make the gradients, which have been added up, those of one batch.

        Args:
            parameters: whose gradients are changed.
            num_micro_batches: by which each loss has been divided.
        """
        factor = num_micro_batches * self.reference / self.count.clamp(min=self._least)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for group in by_mesh(gradients):
            torch._foreach_mul_(group, factor)

    def state_dict(self) -> dict[str, Tensor]:
        return {"total": self.total, "count": self.count, "reference": self.reference}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        self.total, self.count, self.reference = (
            state[name].to(device) for name in ("total", "count", "reference")
        )
