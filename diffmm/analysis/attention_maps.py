"""Attention maps of a model, which the fused kernels do not materialize."""

import sys
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from diffmm.analysis.map_blocks import LayerInputs, combine, visit_layers
from diffmm.layers.attention import Attention
from diffmm.layers.rope import Rotation
from diffmm.ops import AttentionMask


@dataclass(frozen=True)
class LayerMaps:
    """The maps of one attention layer for one batch, in float32 (float64 in a float64 model).

    Attributes:
        name: Name of the layer in its model, such as `backbone.blocks.0.attention`.
        components: `(A,)` for softmax attention, `(A1, A2)` for differential attention, each
            `[B, H, N, M]`. Each row sums to 1, or is zero if the query attends to no key. Masked
            keys have exactly 0.
        lam: The factor of the second map, `[B, H, N]` (negative with `combine="add"`); None for
            softmax attention.
    """

    name: str
    components: tuple[Tensor, ...]
    lam: Tensor | None

    @property
    def combined(self) -> Tensor:
        """The map that multiplies the values, `[B, H, N, M]`: `A`, or `A1 - lam A2`, whose rows
        sum to `1 - lam` and whose entries may be negative."""
        return combine(self.components, self.lam)


def attention_maps(
    model: nn.Module,
    *inputs: Tensor | None,
    mask: AttentionMask | None = None,
    layers: Collection[int] | None = None,
) -> list[LayerMaps]:
    """Compute the attention maps of `model` for `inputs`, one entry per layer, in order.

        Ai = softmax(scale * Qi Kiᵀ + mask),   combined = A1 - lam A2     (Ye et al. 2025, eq. 1)

    Runs one forward pass in evaluation mode, uncompiled and without gradients. Hooks compute the
    maps from the queries and keys of each layer (including rotary positions, key sharing and query
    norms) with the layer's mask. Memory is proportional to `B H N M` per layer; for long sequences,
    `diffmm.analysis.map_blocks.visit_layers` has the maps in blocks.

    Args:
        model: A model of this library, or a module that contains its attention layers.
        inputs: Positional arguments of the model's `forward`: tokens; images; or waveforms and
            the number of samples (`diffmm.batch.inputs_of` returns them for a batch).
        mask: For text models, a mask that replaces the default.
        layers: Indices of the attention layers in the order in which they run, counted from the
            end if negative; all by default.

    Raises:
        ValueError: If the model has no attention layers, or an index is out of range.
    """
    maps: list[LayerMaps] = []
    visit_layers(model, *inputs, visit=lambda layer: maps.append(_whole(layer)), mask=mask)
    if layers is None:
        return maps
    for index in layers:
        if not -len(maps) <= index < len(maps):
            raise ValueError(
                f"layers contains {index}, but {type(model).__name__} has {len(maps)} attention "
                f"layers, 0 to {len(maps) - 1}"
            )
    wanted = {index % len(maps) for index in layers}
    return [layer for index, layer in enumerate(maps) if index in wanted]


def layer_maps(
    name: str, layer: Attention, x: Tensor, *, mask: AttentionMask, rope: Rotation | None = None
) -> LayerMaps:
    """Compute the maps of one layer for its input `x`, `[B, N, dim]`; see `attention_maps`."""
    return _whole(LayerInputs.of(layer, x, mask=mask, rope=rope, name=name))


def _whole(layer: LayerInputs) -> LayerMaps:
    (block,) = layer.blocks(max_bytes=sys.maxsize)
    return LayerMaps(layer.name, block.components, layer.lam)
