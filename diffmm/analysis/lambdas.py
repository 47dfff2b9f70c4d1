"""Lambda by layer: of a model on a batch, and over training."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from diffmm.analysis.map_blocks import LayerInputs

LOGGED = re.compile(r"lambda/layer_(\d+)")
"""Name of the metric that `diffmm.training.callbacks.LambdaMonitor` logs for a layer."""

Points = TypeVar("Points", bound=Sequence[tuple[float, float]])


@dataclass(frozen=True)
class LayerLambda:
    """Lambda of one layer over heads and real queries.

    Attributes:
        name: Name of the layer in its model.
        mean: Mean.
        smallest: Minimum.
        largest: Maximum.
        above_one: Share of values above 1, at which the weights of `A1 - lam A2` sum to less than
            0; in [0, 1].
    """

    name: str
    mean: float
    smallest: float
    largest: float
    above_one: float


class LambdaMeter:
    """Accumulates lambda over batches; a visitor of `diffmm.analysis.map_blocks.visit_layers`.
    Layers without lambda are skipped."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[int, float, float, float, int]]] = {}

    def add(self, layer: LayerInputs) -> None:
        """Add lambda of one layer for one batch."""
        if layer.lam is None:
            return
        real = layer.lam
        padding = layer.query_padding
        if padding is not None:
            real = real[padding[:, None].expand_as(real)]
        self._found.setdefault(layer.name, []).append(_summary(real))

    def layers(self) -> list[LayerLambda]:
        """Lambda of all differential layers so far."""
        found = []
        for name, parts in self._found.items():
            counts, sums, smallest, largest, above = zip(*parts, strict=True)
            count = sum(counts)
            mean, share = sum(sums) / count, sum(above) / count
            found.append(LayerLambda(name, mean, min(smallest), max(largest), share))
        return found


def lambda_curves(curves: Mapping[str, Points]) -> dict[int, Points]:
    """The curves of lambda among the curves of a run, by the index of the layer, in order.

    Args:
        curves: Curves by the names of their metrics, as `diffmm.runs.metrics.read_curves` returns.
    """
    found = {
        int(match[1]): curve
        for name, curve in curves.items()
        if (match := LOGGED.fullmatch(name)) is not None
    }
    return dict(sorted(found.items()))


def mean_lambda_curve(curves: Mapping[str, Points]) -> list[tuple[float, float]]:
    """The mean over layers of the curves of `lambda_curves`, at the steps that all of them have."""
    layers = [dict(curve) for curve in lambda_curves(curves).values()]
    shared = sorted(set.intersection(*map(set, layers))) if layers else []
    return [(step, sum(layer[step] for layer in layers) / len(layers)) for step in shared]


def _summary(lam: Tensor) -> tuple[int, float, float, float, int]:
    total = float(lam.cpu().double().sum())
    return lam.numel(), total, float(lam.min()), float(lam.max()), int((lam > 1.0).sum())
