"""The metrics that torchmetrics lacks."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class RatioOfSums(Metric):
    """`sum(numerators) / sum(denominators)` over all batches and processes.

    A mean that is exact however samples fall into batches: nats a token, bits a byte. The sums of
    the batches are kept and added in float64 on the CPU, since not every device has float64.
    """

    full_state_update = False
    numerators: list[Tensor]
    denominator: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("numerators", default=[], dist_reduce_fx="cat")
        self.add_state("denominator", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, numerator: Tensor, denominator: Tensor | int) -> None:
        """Add the sums of a batch, a scalar and a count."""
        self.numerators.append(numerator.detach().reshape(1))
        self.denominator += denominator

    def compute(self) -> Tensor:
        """The ratio; infinite or NaN where nothing was counted."""
        total = dim_zero_cat(self.numerators).cpu().double().sum()
        return (total / self.denominator.cpu()).float().to(self.device)


class Perplexity(RatioOfSums):
    """`exp` of nats a target. (torchmetrics' own would take all logits a second time.)"""

    def compute(self) -> Tensor:
        return torch.exp(super().compute())
