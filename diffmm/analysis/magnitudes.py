"""Statistics of values that arrive in parts: largest magnitudes, median, kurtosis."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TOP = 100
"""Default number of the largest magnitudes that are kept."""

DROPPED_BITS = 14
"""Bits of a float32 that the histogram for the median ignores: its bins are `2 ** -9` wide,
relative to their values."""


@dataclass(frozen=True)
class Magnitudes:
    """Statistics of values.

    Attributes:
        count: Number of values.
        top: The largest magnitudes in descending order, `[K]` in float64 on the CPU.
        median: Median of the magnitudes, with a relative error of at most `2 ** -9`.
        kurtosis: `E[(x - mean)^4] / E[(x - mean)^2]^2` of the signed values: 3 for a normal
            distribution, larger with outliers; NaN if all values are equal.
    """

    count: int
    top: Tensor
    median: float
    kurtosis: float


class MagnitudeMeter:
    """Accumulates `Magnitudes`.

    Args:
        num_top: Number of the largest magnitudes to keep.
    """

    def __init__(self, num_top: int = NUM_TOP) -> None:
        self.num_top = num_top
        self._top = torch.empty(0, dtype=torch.float64)
        self._histogram = torch.zeros(2 ** (31 - DROPPED_BITS), dtype=torch.int64)
        self._moments = _Moments(0, 0.0, 0.0, 0.0, 0.0)

    def add(self, values: Tensor) -> None:
        """Add values of any shape."""
        values = values.detach().flatten()
        if not len(values):
            return
        values = values if values.dtype == torch.float64 else values.float()
        sizes = values.abs()
        top = sizes.topk(min(self.num_top, len(sizes))).values.cpu().double()
        self._top = torch.cat([self._top, top]).sort(descending=True).values[: self.num_top]
        # The bits of positive floats, read as integers, are in the order of the floats.
        bins = sizes.float().view(torch.int32) >> DROPPED_BITS
        self._histogram += bins.bincount(minlength=len(self._histogram)).cpu()
        self._moments = self._moments.merged(_Moments.of(values))

    def result(self) -> Magnitudes:
        """The statistics of all values so far; NaN without any."""
        count, _, second, _, fourth = self._moments
        kurtosis = count * fourth / second**2 if second else math.nan
        return Magnitudes(count, self._top, self._median(), kurtosis)

    def _median(self) -> float:
        count = int(self._histogram.sum())
        if not count:
            return math.nan
        bin = int(torch.searchsorted(self._histogram.cumsum(0), (count + 1) // 2))
        edges = torch.tensor([bin, bin + 1]) << DROPPED_BITS
        return float(edges.to(torch.int32).view(torch.float32).double().mean()) if bin else 0.0


class _Moments(tuple[int, float, float, float, float]):
    """Count, mean, and sums of the second, third and fourth powers of deviations from the mean."""

    def __new__(
        cls, count: int, mean: float, second: float, third: float, fourth: float
    ) -> "_Moments":
        return super().__new__(cls, (count, mean, second, third, fourth))

    @classmethod
    def of(cls, values: Tensor) -> "_Moments":
        mean = values.mean()
        deviation = values - mean
        square = deviation.square()
        sums = (square.sum(), (square * deviation).sum(), square.square().sum())
        return cls(len(values), float(mean), *map(float, sums))

    def merged(self, other: "_Moments") -> "_Moments":
        """Combine the moments of two sets of values (Pébay 2008, eqs. 2.1 to 2.3)."""
        (n, mean, second, third, fourth), (m, other_mean, *others) = self, other
        total, gap = n + m, other_mean - mean
        share = gap / total
        return _Moments(
            total,
            mean + m * share,
            second + others[0] + n * m * gap * share,
            third
            + others[1]
            + n * m * (n - m) * gap * share**2
            + 3.0 * share * (n * others[0] - m * second),
            fourth
            + others[2]
            + n * m * (n * n - n * m + m * m) * gap * share**3
            + 6.0 * share**2 * (n * n * others[0] + m * m * second)
            + 4.0 * share * (n * others[1] - m * third),
        )
