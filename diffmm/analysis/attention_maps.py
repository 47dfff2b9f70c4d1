"""What a model attends to: the maps that the fused kernels never write down."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.layers.attention import Attention
from diffmm.layers.rope import Rotation
from diffmm.ops import AttentionMask
from diffmm.ops.softmax_attention.reference import attention_map


@dataclass(frozen=True)
class LayerMaps:
    """The maps of one attention layer for one batch, in float32 (float64 in a float64 model).

    Attributes:
        name: of the layer in its model, such as `backbone.blocks.0.attention`.
        components: `[B, H, N, M]` each: `(A,)` for softmax attention, `(A1, A2)` for differential.
            A row of each sums to 1, or is zero where a query sees no key. Keys that a query does
            not see have exactly 0.
        lam: `[B, H, N]`, what the second map is multiplied by before it is subtracted (negative
            under `combine="add"`); None for softmax attention.
    """

    name: str
    components: tuple[Tensor, ...]
    lam: Tensor | None

    @property
    def combined(self) -> Tensor:
        """`[B, H, N, M]`, what multiplies the values: `A`, or `A1 - lam A2`, whose rows sum to
        `1 - lam` and which may be negative."""
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
    """The attention maps of `model` for `inputs`, one entry a layer, from first to last.

        Ai = softmax(scale * Qi Kiᵀ + mask),   combined = A1 - lam A2     (Ye et al. 2025, eq. 1)

    One forward pass in evaluation mode, eager and without gradients; hooks on the layers compute
    the maps from the queries and keys that the layer itself projects (rotary positions, key
    sharing, query norms included) under the mask it was given. Memory grows with `B H N M` a layer.

    Args:
        model: any of this library's models, or a module with its attention layers inside.
        inputs: the positional arguments of the model's `forward`: tokens; images; waveforms and
            the number of samples (`diffmm.batch.inputs_of` has them for a batch).
        mask: for a text model, what each token sees, in place of its default.
        layers: which attention layers, counted from 0 in the order they run, from the end if
            negative; all by default.

    Raises:
        ValueError: if the model has no attention layer, or not the one asked for.
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, Attention)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layer of diffmm in it")
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
                f"layers has {index}, but {type(model).__name__} has {len(maps)} attention "
                f"layers, 0 to {len(maps) - 1}"
            )
    wanted = {index % len(maps) for index in layers}
    return [layer for index, layer in enumerate(maps) if index in wanted]


def layer_maps(
    name: str, layer: Attention, x: Tensor, *, mask: AttentionMask, rope: Rotation | None = None
) -> LayerMaps:
    """The maps of one layer for its input `x`, `[B, N, dim]`; see `attention_maps`."""
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
    """A hook that adds the maps of a call to `maps`."""

    def hook(layer: Attention, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        maps.append(layer_maps(name, layer, args[0], mask=kwargs["mask"], rope=kwargs.get("rope")))

    return hook


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every part then has the mode it had."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
