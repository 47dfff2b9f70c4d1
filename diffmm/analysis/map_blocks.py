"""Attention maps in blocks of query rows, for sequences whose whole maps do not fit in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.layers.attention import Attention
from diffmm.layers.rope import Rotation
from diffmm.models.modes import evaluating
from diffmm.models.text import TextModel
from diffmm.ops import AttentionMask
from diffmm.ops.softmax_attention.reference import capped, masked_softmax

MAX_BYTES = 2**30
"""Default memory of a block, in bytes, except on CUDA devices."""

CUDA_SHARE = 8
"""Part of the memory of a CUDA device that is the default memory of a block: one in this many."""

NUM_COPIES = 6
"""Number of tensors as large as one map that are in memory at once for each component."""


@dataclass(frozen=True)
class MapBlock:
    """The attention of some queries of one layer.

    Attributes:
        rows: Indices of the queries, `[R]`.
        scores: Logits of each component, `scale * Qi Kiᵀ`, `[B, H, R, M]` each, not masked.
        visible: `[1 or B, 1, R, M]` booleans, true where a query attends to a key.
        lam: The factor of the second map, `[B, H, R]`; None for softmax attention.
        is_real: `[B, R]` booleans, true where the query is no padding and attends to a key.
        first_key: Index of the first key of each query's document, `[B, R]`: the first real token,
            whatever the window.
    """

    rows: Tensor
    scores: tuple[Tensor, ...]
    visible: Tensor
    lam: Tensor | None
    is_real: Tensor
    first_key: Tensor

    @cached_property
    def components(self) -> tuple[Tensor, ...]:
        """The maps, `[B, H, R, M]` each, as in `diffmm.analysis.attention_maps.LayerMaps`."""
        return tuple(masked_softmax(scores, self.visible) for scores in self.scores)

    @property
    def combined(self) -> Tensor:
        """The map that multiplies the values, `A` or `A1 - lam A2`, `[B, H, R, M]`."""
        return combine(self.components, self.lam)

    def maps(self) -> Iterator[tuple[str, Tensor]]:
        """The maps by name: `A`, or `A1`, `A2` and `A1 - lam A2`."""
        if self.lam is None:
            yield "A", self.components[0]
            return
        yield from zip(("A1", "A2"), self.components, strict=True)
        yield "A1 - lam A2", self.combined


@dataclass(frozen=True)
class LayerInputs:
    """All that determines the maps of one attention layer for one batch, in float32 (float64 in a
    float64 model).

    Attributes:
        index: Number of the layer in the order in which they run, from 0.
        name: Name of the layer in its model, such as `backbone.blocks.0.attention`; of a layer that
            several parts of a model share, that in the part that runs it.
        q: Queries by component, `[B, N, H, C, D]`.
        k: Keys by component, `[B, M, G, C, D]`, or `[B, M, G, 1, D]` if the components share them.
        lam: The factor of the second map, `[B, H, N]`; None for softmax attention.
        scale: Factor of the scores before the softmax.
        mask: Which keys each query attends to.
        softcap: Bound of the scores; None means no bound.
        weights: Name of the layer in the first of the parts that share it.
        is_cross: Whether the keys are those of other tokens than the queries (cross-attention).
    """

    index: int
    name: str
    q: Tensor
    k: Tensor
    lam: Tensor | None
    scale: float
    mask: AttentionMask
    softcap: float | None = None
    weights: str = ""
    is_cross: bool = False

    @classmethod
    def of(
        cls,
        layer: Attention,
        x: Tensor,
        *,
        mask: AttentionMask,
        rope: Rotation | None = None,
        keys_and_values: tuple[Tensor, Tensor] | None = None,
        index: int = 0,
        name: str = "",
        weights: str = "",
    ) -> "LayerInputs":
        """The queries, keys and lambda of `layer` for its input `x`, `[B, N, dim]`, with the keys
        and values of other tokens if given, as in `Attention.forward`."""
        if keys_and_values is None:
            q, k, _ = layer.project(x, rope)
        else:
            q, (k, _) = layer.queries(x), keys_and_values
        found = cls.projected(layer, x, q, k, mask=mask, index=index, name=name, weights=weights)
        return replace(found, is_cross=keys_and_values is not None)

    @classmethod
    def projected(
        cls,
        layer: Attention,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        *,
        mask: AttentionMask,
        index: int = 0,
        name: str = "",
        weights: str = "",
    ) -> "LayerInputs":
        """As `of`, with the queries and keys of `layer.project`."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k = layer.components(q.to(dtype), k.to(dtype))
        lam = layer.lam(x)
        if lam is not None:
            lam = lam.to(dtype).expand(q.shape[:3]).transpose(1, 2)
        narrowed = layer.narrowed(mask)
        return cls(index, name, q, k, lam, layer.scale, narrowed, layer.softcap, weights)

    @property
    def query_padding(self) -> Tensor | None:
        """`[B, N]` booleans, true where a query is no padding; None if all count as real, as in
        cross-attention, whose mask is that of other tokens."""
        padding = self.mask.key_padding
        return None if padding is None or self.is_cross else padding[:, -self.q.shape[1] :]

    def blocks(
        self, *, rows: Tensor | None = None, max_bytes: int | None = None
    ) -> Iterator[MapBlock]:
        """Yield the maps of all queries, or of those in `rows`, block by block.

        Args:
            rows: Indices of queries, `[R]`; all by default.
            max_bytes: Approximate memory of a block and of what is computed from it, in bytes; by
                default an eighth of the memory of a CUDA device, and 1 GiB elsewhere. A block has
                at least one row, which takes about `24 B H C M` bytes in float32.

        Raises:
            ValueError: If `max_bytes` is below 1.
        """
        if max_bytes is None:
            max_bytes = default_bytes(self.q.device)
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        batch, num_queries, num_heads, num_components, _ = self.q.shape
        num_keys = self.k.shape[1]
        if rows is None:
            rows = torch.arange(num_queries, device=self.q.device)
        bytes_per_row = batch * num_heads * num_components * num_keys * self.q.element_size()
        for some in rows.split(max(1, max_bytes // (NUM_COPIES * bytes_per_row))):
            yield self._block(some)

    def _block(self, rows: Tensor) -> MapBlock:
        num_queries, num_keys, device = self.q.shape[1], self.k.shape[1], self.q.device
        visible = self.mask.to_bool(num_queries, num_keys, device, rows=rows)
        unlimited = AttentionMask(
            document_ids=self.mask.document_ids, key_padding=self.mask.key_padding
        ).to_bool(num_queries, num_keys, device, rows=rows)
        batch = len(self.q)
        is_real = visible.any(dim=-1)[:, 0].expand(batch, -1)
        if self.query_padding is not None:
            is_real = is_real & self.query_padding[:, rows]
        return MapBlock(
            rows=rows,
            scores=self._scores(self.q[:, rows]),
            visible=visible,
            lam=None if self.lam is None else self.lam[:, :, rows],
            is_real=is_real,
            first_key=unlimited.int().argmax(dim=-1)[:, 0].expand(batch, -1),
        )

    def _scores(self, q: Tensor) -> tuple[Tensor, ...]:
        num_groups, num_keys = self.k.shape[2], self.k.shape[3]
        found = []
        for i in range(q.shape[3]):
            query = q[:, :, :, i].transpose(1, 2)  # [B, H, R, D]
            key = self.k[:, :, :, min(i, num_keys - 1)].permute(0, 2, 3, 1)  # [B, G, D, M]
            # The heads of a group are further rows, so that its keys are not copied.
            scores = query.unflatten(1, (num_groups, -1)).flatten(2, 3) @ key
            found.append(capped(self.scale * scores.view(*query.shape[:3], -1), self.softcap))
        return tuple(found)


def default_bytes(device: torch.device) -> int:
    """Default memory of a block on a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // CUDA_SHARE
    return MAX_BYTES


def combine(components: tuple[Tensor, ...], lam: Tensor | None) -> Tensor:
    """The map that multiplies the values, `A`, or `A1 - lam A2` for lam `[B, H, N]`."""
    if lam is None:
        return components[0]
    first, second = components
    return first - lam.unsqueeze(-1) * second


@torch.no_grad()
def visit_layers(
    model: nn.Module,
    *inputs: Tensor | None,
    visit: Callable[[LayerInputs], None],
    mask: AttentionMask | None = None,
) -> None:
    """Call `visit` with the inputs of each attention layer while `model` processes `inputs`.

    Runs one forward pass in evaluation mode, uncompiled and without gradients. No map is computed
    before `visit` asks for it, and none is ever in memory as a whole: with 65,536 tokens one row of
    maps takes megabytes. A text model stops before its head.

    Args:
        model: A model of this library, or a module that contains its attention layers.
        inputs: Positional arguments of the model's `forward`: tokens; images; or waveforms and
            the number of samples (`diffmm.batch.inputs_of` returns them for a batch).
        visit: Called once per layer, in the order in which they run.
        mask: For text models, a mask that replaces the default.

    Raises:
        ValueError: If the model has no attention layers.
    """
    found: dict[Attention, list[str]] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, Attention):
            found.setdefault(part, []).append(name)
    if not found:
        raise ValueError(f"{type(model).__name__} contains no attention layer of diffmm")
    count = 0
    running = ""  # the part of the model that runs, of those that share layers

    def enter(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal running
            running = part

        return hook

    def hook_of(names: Sequence[str]) -> Callable[..., None]:
        def hook(layer: Attention, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            nonlocal count
            index, count = count, count + 1
            name = next((name for name in names if name.startswith(running)), names[0])
            visit(
                LayerInputs.of(
                    layer,
                    args[0],
                    mask=kwargs["mask"],
                    rope=kwargs.get("rope"),
                    keys_and_values=kwargs.get("keys_and_values"),
                    index=index,
                    name=name,
                    weights=names[0],
                )
            )

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_of(names), with_kwargs=True)
        for layer, names in found.items()
    ]
    sharing = {name.partition(".")[0] for names in found.values() if names[1:] for name in names}
    handles += [
        model.get_submodule(part).register_forward_pre_hook(enter(f"{part}.")) for part in sharing
    ]
    try:
        run_model(model, *inputs, mask=mask)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_model(model: nn.Module, *inputs: Tensor | None, mask: AttentionMask | None) -> None:
    """Run a model for its hooks: in evaluation mode, uncompiled, a text model without its head."""
    call: Callable[..., Any] = model.forward_features if isinstance(model, TextModel) else model
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        if mask is None:
            call(*inputs)
        else:
            call(*inputs, mask=mask)
