"""Attention maps of a model, which the fused kernels do not materialize."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.layers.attention import Attention
from diffmm.layers.rope import Rotation
from diffmm.models.modes import evaluating
from diffmm.ops import AttentionMask
from diffmm.ops.softmax_attention.reference import attention_map


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
        if self.lam is None:
            return self.components[0]
        first, second = self.components
        return first - self.lam.unsqueeze(-1) * second


@torch.no_grad()
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
    norms) with the layer's mask. Memory is proportional to `B H N M` per layer.

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
    found = {name: part for name, part in model.named_modules() if isinstance(part, Attention)}
    if not found:
        raise ValueError(f"{type(model).__name__} contains no attention layer of diffmm")
    maps: list[LayerMaps] = []
    handles = [
        layer.register_forward_pre_hook(_recorder(name, maps), with_kwargs=True)
        for name, layer in found.items()
    ]
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            if mask is None:
                model(*inputs)
            else:
                model(*inputs, mask=mask)
    finally:
        for handle in handles:
            handle.remove()
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
    q, k, _ = layer.project(x, rope)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    q, k = layer.components(q, k)
    lam = layer.lam(x)
    if lam is not None:
        lam = lam.to(dtype).expand(q.shape[:3]).transpose(1, 2)
    visible = mask.to_bool(q.shape[1], k.shape[1], q.device)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2).permute(3, 0, 2, 1, 4)
    components = tuple(
        attention_map(q[:, :, :, i].transpose(1, 2), k[min(i, len(k) - 1)], visible, layer.scale)
        for i in range(q.shape[3])
    )
    return LayerMaps(name, components, lam)


def _recorder(name: str, maps: list[LayerMaps]) -> Callable[..., None]:
    """A hook that appends the maps of each call to `maps`."""

    def hook(layer: Attention, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        maps.append(layer_maps(name, layer, args[0], mask=kwargs["mask"], rope=kwargs.get("rope")))

    return hook
