"""How concentrated attention is: entropy, top share, Hoyer sparsity, negative weight, sinks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmm.analysis.map_blocks import LayerInputs, MapBlock, visit_layers
from diffmm.analysis.row_means import RowMeans
from diffmm.ops import AttentionMask

MEASURES = ("entropy", "top_share", "hoyer", "negative_share", "first_share")

TOP_K = 10
"""Default number of keys of `top_share`."""


@dataclass(frozen=True)
class LayerConcentration:
    """The concentration of the maps of one layer.

    Attributes:
        name: Name of the layer in its model.
        maps: For each map (`A`, or `A1`, `A2` and `A1 - lam A2`) and each of `MEASURES`, the mean
            over queries per head, `[H]` in float64. NaN where no query counts.
    """

    name: str
    maps: Mapping[str, Mapping[str, Tensor]]


class ConcentrationMeter:
    """Accumulates the concentration of maps over batches; a visitor of `visit_layers`.

    Args:
        top_k: Number of keys of `top_share`, at least 1.
        max_bytes: Memory of a block of maps, in bytes; see `LayerInputs.blocks`.

    Raises:
        ValueError: If `top_k` is below 1.
    """

    def __init__(self, *, top_k: int = TOP_K, max_bytes: int | None = None) -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.top_k = top_k
        self.max_bytes = max_bytes
        self._means = RowMeans()
        self._maps: dict[str, list[str]] = {}

    def add(self, layer: LayerInputs) -> None:
        """Add the maps of one layer for one batch."""
        for block in layer.blocks(max_bytes=self.max_bytes):
            names = self._maps.setdefault(layer.name, [])
            for name, weights in block.maps():
                if name not in names:
                    names.append(name)
                for measure, (values, counted) in measures_of(weights, block, self.top_k).items():
                    self._means.add((layer.name, name, measure), values, counted)

    def layers(self) -> list[LayerConcentration]:
        """The means of all layers so far, in the order in which they ran."""
        return [
            LayerConcentration(
                layer,
                {name: {m: self._means.mean((layer, name, m)) for m in MEASURES} for name in names},
            )
            for layer, names in self._maps.items()
        ]


def concentration(
    model: nn.Module,
    *inputs: Tensor | None,
    mask: AttentionMask | None = None,
    top_k: int = TOP_K,
    max_bytes: int | None = None,
) -> list[LayerConcentration]:
    """Measure how concentrated the maps of each layer are, for one batch.

    With `p = |w| / sum|w|` over the `n` keys that a query attends to:

    * `entropy`: `-sum p log p`, in nats, from 0 (one key) to `log n` (all keys alike);
    * `top_share`: sum of the `top_k` largest `p`, in [0, 1];
    * `hoyer`: `(sqrt(n) - |w|_1 / |w|_2) / (sqrt(n) - 1)`, from 0 (all keys alike) to 1 (one key)
      (Hoyer 2004); queries with a single key do not count;
    * `negative_share`: sum of `p` where `w < 0`, in [0, 1];
    * `first_share`: `p` of the first token of the query's document, the attention sink of Xiao et
      al. (2024).

    The weights of `A1 - lam A2` have both signs and sum to `1 - lam`, so that entropy and shares of
    `w` itself are not defined: logarithms of negative numbers, and quotients by a sum that may
    vanish. Absolute values, normalized to sum 1, take their place here; for softmax maps they are
    the weights themselves. An equal measure of `A` and of `A1 - lam A2` thus means equally uneven
    magnitudes, whatever their signs. Queries whose weights are all 0 (`A1 = lam A2`), padding and
    queries that attend to no key do not count.

    Args:
        model: See `diffmm.analysis.map_blocks.visit_layers`.
        inputs: See `diffmm.analysis.map_blocks.visit_layers`.
        mask: See `diffmm.analysis.map_blocks.visit_layers`.
        top_k: Number of keys of `top_share`, at least 1.
        max_bytes: Memory of a block of maps, in bytes; see `LayerInputs.blocks`.

    Raises:
        ValueError: If the model has no attention layers, or `top_k` is below 1.
    """
    meter = ConcentrationMeter(top_k=top_k, max_bytes=max_bytes)
    visit_layers(model, *inputs, visit=meter.add, mask=mask)
    return meter.layers()


def measures_of(
    weights: Tensor, block: MapBlock, top_k: int = TOP_K
) -> dict[str, tuple[Tensor, Tensor]]:
    """The measures of a map of `block`, `[B, H, R, M]`: for each, its values, `[B, H, R]`, and
    whether they count, broadcastable to that shape. See `concentration`."""
    sizes = weights.abs()
    total = sizes.sum(dim=-1)
    counted = block.is_real[:, None] & (total > 0.0)
    shares = sizes / total.clamp(min=torch.finfo(total.dtype).tiny).unsqueeze(-1)
    root = block.visible.sum(dim=-1).to(total.dtype).sqrt()
    hoyer = (root - shares.square().sum(dim=-1).rsqrt()) / (root - 1.0)
    first = block.first_key[:, None, :, None].expand(*total.shape, 1)
    return {
        "entropy": (torch.special.entr(shares).sum(dim=-1), counted),
        "top_share": (shares.topk(min(top_k, shares.shape[-1])).values.sum(dim=-1), counted),
        "hoyer": (hoyer, counted & (root > 1.0)),
        "negative_share": (shares.masked_fill(weights >= 0.0, 0.0).sum(dim=-1), counted),
        "first_share": (shares.gather(-1, first).squeeze(-1), counted),
    }
