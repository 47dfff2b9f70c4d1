"""What the second map cancels of the first, and whether that is a modality's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmm.analysis.map_blocks import LayerInputs, MapBlock, visit_layers
from diffmm.ops import AttentionMask


@dataclass(frozen=True)
class LayerCancellation:
    """What the second map of one layer cancels, per sample.

    Attributes:
        name: Name of the layer in its model, in the part that has run it.
        weights: Name of its weights: equal for layers that several parts share.
        cancelled: Share of the attention of `A1` that is cancelled, the mean over the queries of
            each sample, `[S, H]` in float64.
        correlation: Correlation of `A1` and `A2`, likewise; NaN where no query counts.
    """

    name: str
    weights: str
    cancelled: Tensor
    correlation: Tensor


class CancellationMeter:
    """Accumulates cancellation over batches; a visitor of `visit_layers`. Layers without lambda are
    skipped.

    Args:
        max_bytes: Memory of a block of maps, in bytes; see `LayerInputs.blocks`.
    """

    def __init__(self, *, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._found: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}

    def add(self, layer: LayerInputs) -> None:
        """Add the maps of one layer for one batch."""
        if layer.lam is None:
            return
        sums = layer.lam.new_zeros(2, *layer.lam.shape[:2], dtype=torch.float64, device="cpu")
        counts = torch.zeros_like(sums)
        for block in layer.blocks(max_bytes=self.max_bytes):
            for number, (values, counted) in enumerate(measures_of(block)):
                sums[number] += values.masked_fill(~counted, 0.0).cpu().double().sum(dim=2)
                counts[number] += counted.expand_as(values).sum(dim=2).cpu()
        cancelled, correlation = sums / counts
        key = layer.name, layer.weights or layer.name
        self._found.setdefault(key, []).append((cancelled, correlation))

    def layers(self) -> list[LayerCancellation]:
        """The cancellation of all differential layers so far, in the order in which they ran."""
        return [
            LayerCancellation(*key, *map(torch.cat, zip(*parts, strict=True)))
            for key, parts in self._found.items()
        ]


def cancellation(
    model: nn.Module,
    *inputs: Tensor | None,
    mask: AttentionMask | None = None,
    max_bytes: int | None = None,
) -> list[LayerCancellation]:
    """Measure what the second map of each layer cancels, for one batch.

    For each query, with its weights `a1` and `a2` and its lambda:

    * `cancelled`: `sum_j min(a1_j, lam a2_j)`, the overlap of the two maps: the share of the
      attention of the first map that the second takes away, from 0 (they attend to different keys)
      to `min(1, lam)`. The rest of the second map, `lam` minus the overlap, makes weights negative.
      0 where lambda is negative.
    * `correlation`: Pearson's correlation of `a1` and `a2` over the keys that the query attends to,
      in [-1, 1]. Unlike the overlap, it depends neither on lambda nor, by chance, on the number of
      keys: maps of few keys overlap more. Queries with a constant map, such as those with a single
      key, do not count.

    Padding and queries that attend to no key do not count.

    Args:
        model: See `diffmm.analysis.map_blocks.visit_layers`.
        inputs: See `diffmm.analysis.map_blocks.visit_layers`.
        mask: See `diffmm.analysis.map_blocks.visit_layers`.
        max_bytes: Memory of a block of maps, in bytes; see `LayerInputs.blocks`.

    Raises:
        ValueError: If the model has no attention layers.
    """
    meter = CancellationMeter(max_bytes=max_bytes)
    visit_layers(model, *inputs, visit=meter.add, mask=mask)
    return meter.layers()


def measures_of(block: MapBlock) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`cancelled` and `correlation` of the queries of a differential layer's block: for each, the
    values, `[B, H, R]`, and whether they count, broadcastable to that shape."""
    assert block.lam is not None
    first, second = block.components
    counted = block.is_real[:, None]
    weighted = block.lam.clamp(min=0.0).unsqueeze(-1) * second
    cancelled = torch.minimum(first, weighted).sum(dim=-1)
    count = block.visible.sum(dim=-1, keepdim=True).clamp(min=1)
    x, y = (
        (weights - weights.sum(dim=-1, keepdim=True) / count).masked_fill(~block.visible, 0.0)
        for weights in (first, second)
    )
    norms = x.norm(dim=-1), y.norm(dim=-1)
    # Rounding errors of a constant map are no variation of it.
    least = torch.finfo(first.dtype).eps
    varies = (norms[0] > least) & (norms[1] > least)
    correlation = (x * y).sum(dim=-1) / (norms[0] * norms[1]).clamp(min=least**2)
    return (cancelled, counted), (correlation, counted & varies)


def variance_by_modality(parts: Sequence[Tensor]) -> Tensor:
    """The share of the variance of a measure that is between modalities, per head:

        between / (between + within)

    where `between` is the variance of the means of the modalities and `within` the mean of the
    variances in them (the correlation ratio, with equal weights of the modalities). 0 means that
    all modalities have the same mean, and 1 that samples of one modality do not differ. By chance
    it is about `1 / S` for `S` samples of each.

    Args:
        parts: For each modality, the values of its samples, `[S, H]`.

    Returns:
        `[H]`, in [0, 1]; NaN for a head whose values are all equal.
    """
    means = torch.stack([part.mean(dim=0) for part in parts])
    between = means.var(dim=0, correction=0)
    within = torch.stack([part.var(dim=0, correction=0) for part in parts]).mean(dim=0)
    return between / (between + within)


def specialization(parts: Sequence[Tensor]) -> float:
    """How much heads have modalities of their own: the share of the variance of a measure's means
    over modalities and heads that is neither that of the modalities nor that of the heads:

        sum_mh (x_mh - x_m - x_h + x)² / sum_mh (x_mh - x)²

    with the mean `x_mh` of each modality and head, those of modalities `x_m` and of heads `x_h`,
    and that of all, `x` (the interaction in an analysis of variance). 0 means that heads differ in
    the same way in all modalities, whatever their levels, and 1 that each head is as high in one
    modality as it is low in another.

    Args:
        parts: For each modality, the values of its samples, `[S, H]`.

    Returns:
        A number in [0, 1]; NaN if all means are equal.
    """
    means = torch.stack([part.mean(dim=0) for part in parts])
    centered = means - means.mean()
    rest = centered - centered.mean(dim=0) - centered.mean(dim=1, keepdim=True)
    return float(rest.square().sum() / centered.square().sum())


def shared_layers(layers: Sequence[LayerCancellation]) -> Mapping[str, list[LayerCancellation]]:
    """The layers that several parts of a model share, as they ran in each, by the name of their
    weights."""
    found: dict[str, list[LayerCancellation]] = {}
    for layer in layers:
        found.setdefault(layer.weights, []).append(layer)
    return {name: parts for name, parts in found.items() if len(parts) > 1}
