"""The metrics that torchmetrics lacks."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat


class ExactMetric(Metric):
    """A metric whose states stay float32 and int64, whatever its task is cast to."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the state of a process without any sample, when processes put theirs together."""
        return torch.float32


class RatioOfSums(ExactMetric):
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
        if not len(self.numerators):
            return torch.tensor(torch.nan, device=self.device)
        total = dim_zero_cat(self.numerators).cpu().double().sum()
        return (total / self.denominator.cpu()).float().to(self.device)


class Perplexity(RatioOfSums):
    """`exp` of nats a target. (torchmetrics' own would take all logits a second time.)"""

    def compute(self) -> Tensor:
        return torch.exp(super().compute())


class MeanAveragePrecision(ExactMetric):
    """The mean over classes of the average precision, `sum_n (R_n - R_(n-1)) P_n`, where precision
    `P_n` and recall `R_n` are those of the samples that score at least the `n`-th highest score.

    Scores may be logits of any size: only their order counts, and they are kept as they come, so
    that neither batches nor a saturated sigmoid change the result. Samples with the same score
    come in together. Classes without a positive sample have no recall and are left out of the mean;
    it is NaN if no class has one, or if a score is NaN.

    It keeps 8 bytes per sample and class: 84 MB for AudioSet's 20,000 clips of 527 classes.

    Args:
        num_classes: at least 1.
    """

    full_state_update = False
    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        # Flat, as torchmetrics takes the states of a process without any sample to be.
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add a batch: `[B, num_classes]` scores, and as many zeros and ones."""
        self.scores.append(scores.detach().float().flatten())
        self.targets.append(targets.float().flatten())

    def compute(self) -> Tensor:
        """The mean, in [0, 1] or NaN."""
        values, num_positive = self.of_classes()
        return values[num_positive > 0].mean().float().to(self.device)

    def of_classes(self) -> tuple[Tensor, Tensor]:
        """The average precision of each class, `[num_classes]` float64 on the CPU, NaN where it has
        no positive sample (and everywhere if a score is NaN), and how many it has."""
        num_positive = torch.zeros(self.num_classes, dtype=torch.long)
        values = torch.full((self.num_classes,), torch.nan, dtype=torch.float64)
        if not len(self.scores):
            return values, num_positive
        scores, targets = (
            dim_zero_cat(state).cpu().view(-1, self.num_classes)
            for state in (self.scores, self.targets)
        )
        num_positive = targets.long().sum(dim=0)
        is_present = num_positive > 0
        if is_present.any() and not scores.isnan().any():
            values[is_present] = multilabel_average_precision(
                ranks(scores[:, is_present]),
                targets[:, is_present].long(),
                num_labels=int(is_present.sum()),
                average="none",
                validate_args=False,
            ).double()
        return values, num_positive


class AveragePrecision(MeanAveragePrecision):
    """The average precision of each class by itself."""

    def compute(self) -> Tensor:
        """`[2, num_classes]`: the average precision, in [0, 1] or NaN, and how many positive
        samples there are."""
        return torch.stack([values.double() for values in self.of_classes()])


def ranks(scores: Tensor) -> Tensor:
    """Numbers in [0, 1) that are ordered within each column as the scores `[N, K]` are: what
    torchmetrics takes for probabilities, however large the scores."""
    ordered, places = scores.sort(dim=0)
    is_higher = torch.zeros_like(ordered, dtype=torch.bool)
    is_higher[1:] = ordered[1:] > ordered[:-1]
    rank = is_higher.cumsum(dim=0)
    return torch.zeros_like(rank).scatter(0, places, rank).double() / len(scores)
