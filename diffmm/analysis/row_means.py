"""Means over the rows of attention maps."""

from collections.abc import Hashable

import torch
from torch import Tensor


class RowMeans:
    """Means over queries of values per head, added block by block in float64 on the CPU."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, Tensor] = {}
        self._counts: dict[Hashable, Tensor] = {}

    def add(self, key: Hashable, values: Tensor, counted: Tensor) -> None:
        """Add the values of some queries to those under `key`.

        Args:
            key: Name of the mean.
            values: `[B, H, R]`.
            counted: Booleans that broadcast to `[B, H, R]`, true where a value counts.
        """
        counted = counted.expand_as(values)
        total = values.masked_fill(~counted, 0.0).cpu().double().sum(dim=(0, 2))
        count = counted.sum(dim=(0, 2)).cpu()
        self._sums[key] = self._sums.get(key, 0.0) + total
        self._counts[key] = self._counts.get(key, 0) + count

    def mean(self, key: Hashable) -> Tensor:
        """The mean of each head, `[H]` in float64; NaN for a head without counted queries."""
        return self._sums[key] / self._counts[key]


def mean_over(values: list[Tensor]) -> float:
    """The mean over layers and heads, without those that are NaN; NaN if all are."""
    return float(torch.cat(values).nanmean())
