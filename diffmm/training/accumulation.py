"""Gradient accumulation that does not depend on how a batch is divided.

Lightning accumulates the gradients of `loss / accumulate_grad_batches`, and every strategy averages
them over processes. If each loss were the mean over its own targets, a micro-batch with few targets
would count as much as one with many, and the last step of an epoch, with fewer micro-batches, would
be too small. Therefore each loss of a step is a sum divided by one common `reference`, and the
accumulated gradients are multiplied by

    accumulate_grad_batches * reference / count

where `count` is the number of targets in the step, averaged over processes. For a step of a single
micro-batch the reference is its own count, and no multiplication is needed.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmm.training.sharding import by_mesh


class LossSum(NamedTuple):
    """The summed loss of a batch and its number of targets."""

    total: Tensor
    """Sum of the losses of all targets, a scalar attached to the autograd graph."""
    num_targets: Tensor
    """Number of targets, a float32 scalar."""

    def mean(self) -> Tensor:
        """Return the mean loss of this batch; 0 if it has no targets."""
        return self.total / self.num_targets.clamp(min=1.0)


class AccumulatedLoss:
    """Running loss over the micro-batches of one optimizer step."""

    def __init__(self) -> None:
        self.total = self.count = self.reference = torch.zeros(())
        self._least = 1.0

    def add(self, loss: LossSum, count: Tensor, *, is_first: bool, least: float) -> Tensor:
        """Add a micro-batch, and return the loss to backpropagate.

        Args:
            loss: Loss of the micro-batch in this process.
            count: Number of targets of the micro-batch, averaged over processes.
            is_first: Whether the micro-batch is the first of an optimizer step.
            least: Replacement for a count of 0: one target among all processes.
        """
        self._least = least
        if is_first:
            self.total, self.count = loss.total.detach(), count
            self.reference = count.clamp(min=least)
        else:
            # Until the first target, all gradients are zero and any reference is correct.
            self.reference = torch.where(self.count > 0, self.reference, count.clamp(min=least))
            self.total, self.count = self.total + loss.total.detach(), self.count + count
        return loss.total / self.reference

    def mean(self) -> Tensor:
        """Return the loss of the step; its mean over processes is the global loss."""
        return self.total / self.count.clamp(min=self._least)

    def complete(self, parameters: Iterable[nn.Parameter], num_micro_batches: int) -> None:
        """Rescale the accumulated gradients, in place, to those of one large batch.

        Args:
            parameters: Parameters whose gradients are rescaled.
            num_micro_batches: Number of micro-batches by which each loss was divided.
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
