"""Simulated quantization of attention logits and of linear layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from diffmm.analysis.map_blocks import LayerInputs, combine, visit_layers
from diffmm.analysis.row_means import RowMeans
from diffmm.layers.attention import Attention
from diffmm.layers.block import Block
from diffmm.ops import AttentionMask
from diffmm.ops.softmax_attention.reference import masked_softmax

BITS = (8, 6, 4)
"""Default numbers of bits."""

THRESHOLD = 6.0
"""Default threshold of outliers of LLM.int8() (Dettmers et al. 2022, section 3.2)."""


def absmax(values: Tensor, bits: int, largest: Tensor) -> Tensor:
    """Round `values` to the `2 ** bits - 1` multiples of a step, the largest of them `largest`:

        round(x / step) step,   step = largest / (2^(bits - 1) - 1)

    Args:
        values: Values of any shape.
        bits: Number of bits, from 2 to 16.
        largest: The largest magnitude that is represented, broadcastable to `values`. Where it is
            0, the result is 0.

    Raises:
        ValueError: If `bits` is out of range.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be from 2 to 16, got {bits}")
    step = largest / (2 ** (bits - 1) - 1)
    return (values / step.clamp(min=torch.finfo(step.dtype).tiny)).round() * step


def largest_logits(layer: LayerInputs, *, max_bytes: int | None = None) -> Tensor:
    """The largest magnitude of the logits that a layer uses, per sample over all heads and both
    components, `[B, 1, 1, 1]`. Masked keys and padding do not count."""
    largest = layer.q.new_zeros(len(layer.q))
    for block in layer.blocks(max_bytes=max_bytes):
        unused = ~(block.visible & block.is_real[:, None, :, None])
        for scores in block.scores:
            sizes = scores.abs().masked_fill(unused, 0.0)
            largest = torch.maximum(largest, sizes.amax(dim=(1, 2, 3)))
    return largest[:, None, None, None]


@contextmanager
def quantized_attention(
    model: nn.Module, bits: int, *, max_bytes: int | None = None
) -> Iterator[None]:
    """Quantize the attention logits of `model` in the body of the `with` statement, by `absmax`
    with one step per sample and layer (Ye et al. 2025, section 3.7: dynamic quantization after
    training). Heads are computed from the layer's `components` and `lam`, in blocks, in float32.

    Args:
        model: Model with attention layers of this library; afterwards it is as before.
        bits: Number of bits, from 2 to 16.
        max_bytes: Memory of a block of maps, in bytes; see `LayerInputs.blocks`.

    Raises:
        ValueError: If the model has no attention layers, or `bits` is out of range.
    """
    absmax(torch.zeros(1), bits, torch.zeros(1))  # checks `bits`
    layers = [part for part in model.modules() if isinstance(part, Attention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} contains no attention layer of diffmm")

    def attend_of(layer: Attention) -> Callable[..., Tensor]:
        def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
            inputs = LayerInputs.projected(layer, x, q, k, mask=mask)
            largest = largest_logits(inputs, max_bytes=max_bytes)
            num_groups = v.shape[2]
            values = v.transpose(1, 2).to(inputs.q.dtype)  # [B, G, M, E]
            parts = []
            for block in inputs.blocks(max_bytes=max_bytes):
                maps = tuple(
                    masked_softmax(absmax(scores, bits, largest), block.visible)
                    for scores in block.scores
                )
                weights = combine(maps, block.lam)
                # As in `LayerInputs`, the heads of a group are further rows.
                heads = weights.unflatten(1, (num_groups, -1)).flatten(2, 3) @ values
                parts.append(heads.view(*weights.shape[:3], -1))
            return torch.cat(parts, dim=2).transpose(1, 2).to(q.dtype)

        return attend

    with _replacing("attend", {layer: attend_of(layer) for layer in layers}):
        yield


@dataclass
class ColumnCount:
    """Input columns of linear layers.

    Attributes:
        outliers: Number of columns that were computed in higher precision.
        total: Number of all columns.
    """

    outliers: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        """Share of the columns in higher precision, in [0, 1]."""
        return self.outliers / max(1, self.total)


@contextmanager
def quantized_linears(
    model: nn.Module, bits: int = 8, *, threshold: float | None = THRESHOLD
) -> Iterator[ColumnCount]:
    """Quantize the linear layers in the blocks of `model` in the body of the `with` statement, as
    LLM.int8() does (Dettmers et al. 2022):

        X Wᵀ = X_o W_oᵀ + Q(X_r) Q(W_r)ᵀ

    Columns `o` of the input in which any token of the batch exceeds `threshold` in size are
    multiplied in the model's own precision, all others `r` by `absmax` with one step per token and
    one per output. The products are those of integers, computed in floating point.

    Args:
        model: Model with blocks of this library; afterwards it is as before.
        bits: Number of bits, from 2 to 16; 8 in the paper.
        threshold: Threshold of outliers, at least 0; None quantizes all columns.

    Yields:
        The numbers of columns of all layers so far.

    Raises:
        ValueError: If the model has no blocks, or an argument is out of range.
    """
    absmax(torch.zeros(1), bits, torch.zeros(1))
    if threshold is not None and threshold < 0.0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    layers = [
        part
        for block in model.modules()
        if isinstance(block, Block)
        for part in block.modules()
        if isinstance(part, nn.Linear)
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layers in blocks of diffmm")
    count = ColumnCount()

    def forward_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            weight, limit = layer.weight, float("inf") if threshold is None else threshold
            is_outlier = x.detach().abs().flatten(0, -2).amax(dim=0) > limit
            count.outliers += int(is_outlier.sum())
            count.total += len(is_outlier)
            regular = linear(
                *(
                    absmax(part, bits, part.abs().amax(dim=-1, keepdim=True))
                    for part in (x.masked_fill(is_outlier, 0), weight.masked_fill(is_outlier, 0))
                )
            )
            return regular + linear(x.masked_fill(~is_outlier, 0), weight, layer.bias)

        return forward

    with _replacing("forward", {layer: forward_of(layer) for layer in layers}):
        yield count


@dataclass(frozen=True)
class Effect:
    """The effect of a quantization on a model.

    Attributes:
        method: What is quantized: `nothing`, `attention logits`, `linear layers`, or
            `linear layers but outliers`, the decomposition of LLM.int8().
        bits: Number of bits; None for `nothing`.
        metrics: Metrics of the quantized model, by name.
        outlier_columns: Share of columns in higher precision; None for other methods.
    """

    method: str
    bits: int | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    outlier_columns: float | None = None


def quantization_effects(
    model: nn.Module,
    evaluate: Callable[[], Mapping[str, float]],
    *,
    bits: Sequence[int] = BITS,
    threshold: float = THRESHOLD,
    max_bytes: int | None = None,
) -> list[Effect]:
    """Evaluate a model as it is, with quantized attention logits, with quantized linear layers, and
    with those of LLM.int8().

    Args:
        model: The model; afterwards it is as before.
        evaluate: Evaluates the model in its present form, such as its loss on some batches.
        bits: Numbers of bits.
        threshold: See `quantized_linears`.
        max_bytes: See `quantized_attention`.

    Raises:
        ValueError: As `quantized_attention` and `quantized_linears`.
    """
    found = [Effect("nothing", None, evaluate())]
    for number in bits:
        with quantized_attention(model, number, max_bytes=max_bytes):
            found.append(Effect("attention logits", number, evaluate()))
    for number in bits:
        with quantized_linears(model, number, threshold=None):
            found.append(Effect("linear layers", number, evaluate()))
    for number in bits:
        with quantized_linears(model, number, threshold=threshold) as count:
            metrics = evaluate()
        found.append(Effect("linear layers but outliers", number, metrics, count.share))
    return found


@dataclass(frozen=True)
class LayerMapErrors:
    """Errors of the maps of one layer with quantized logits.

    Attributes:
        name: Name of the layer in its model.
        errors: For each number of bits, the mean over queries of `sum|w' - w| / sum|w|` per head,
            `[H]` in float64, where `w'` is the map of the quantized logits; at least 0.
    """

    name: str
    errors: Mapping[int, Tensor]


class MapErrorMeter:
    """Accumulates the errors of maps over batches; a visitor of `visit_layers`.

    Args:
        bits: Numbers of bits.
        max_bytes: Memory of a block of maps, in bytes; see `LayerInputs.blocks`.
    """

    def __init__(self, *, bits: Sequence[int] = BITS, max_bytes: int | None = None) -> None:
        self.bits = tuple(bits)
        self.max_bytes = max_bytes
        self._means = RowMeans()
        self._names: dict[str, None] = {}

    def add(self, layer: LayerInputs) -> None:
        """Add the maps of one layer for one batch."""
        self._names[layer.name] = None
        largest = largest_logits(layer, max_bytes=self.max_bytes)
        for block in layer.blocks(max_bytes=self.max_bytes):
            weights = block.combined
            total = weights.abs().sum(dim=-1)
            counted = block.is_real[:, None] & (total > 0.0)
            for bits in self.bits:
                maps = tuple(
                    masked_softmax(absmax(scores, bits, largest), block.visible)
                    for scores in block.scores
                )
                change = (combine(maps, block.lam) - weights).abs().sum(dim=-1)
                self._means.add((layer.name, bits), change / total, counted)

    def layers(self) -> list[LayerMapErrors]:
        """The errors of all layers so far."""
        return [
            LayerMapErrors(name, {bits: self._means.mean((name, bits)) for bits in self.bits})
            for name in self._names
        ]


def map_errors(
    model: nn.Module,
    *inputs: Tensor | None,
    mask: AttentionMask | None = None,
    bits: Sequence[int] = BITS,
    max_bytes: int | None = None,
) -> list[LayerMapErrors]:
    """Measure how much quantized logits change the map of each layer, given the inputs that the
    layer has in the model without quantization.

    Args:
        model: See `diffmm.analysis.map_blocks.visit_layers`.
        inputs: See `diffmm.analysis.map_blocks.visit_layers`.
        mask: See `diffmm.analysis.map_blocks.visit_layers`.
        bits: Numbers of bits, each from 2 to 16.
        max_bytes: Memory of a block of maps, in bytes; see `LayerInputs.blocks`.

    Raises:
        ValueError: If the model has no attention layers, or a number of bits is out of range.
    """
    meter = MapErrorMeter(bits=bits, max_bytes=max_bytes)
    visit_layers(model, *inputs, visit=meter.add, mask=mask)
    return meter.layers()


@contextmanager
def _replacing(
    method: str, replacements: Mapping[nn.Module, Callable[..., Tensor]]
) -> Iterator[None]:
    """Replace a method of some modules in the body of the `with` statement, uncompiled and without
    gradients."""
    before = {module: vars(module).get(method) for module in replacements}
    for module, replacement in replacements.items():
        setattr(module, method, replacement)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, old in before.items():
            if old is None:
                delattr(module, method)
            else:
                setattr(module, method, old)
