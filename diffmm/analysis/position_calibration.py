"""Calibration of attention by position: softmax attention less what its positions alone explain."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmm.analysis.map_blocks import LayerInputs, visit_layers
from diffmm.layers.attention import Attention, SoftmaxAttention
from diffmm.ops import AttentionMask

OUTSIDE = -1
"""Document of the tokens whose attention is not calibrated."""


@dataclass(frozen=True)
class PositionBias:
    """The attention to each position that does not depend on the content of the context.

    Attributes:
        rows: Indices of the queries, `[R]`.
        layers: By name of the layer, the mean attention of these queries to each position of dummy
            contexts, `[H, R, M]`.
    """

    rows: Tensor
    layers: dict[str, Tensor]


def position_bias(
    model: nn.Module,
    dummies: Iterable[Tensor],
    *,
    rows: Tensor,
    max_bytes: int | None = None,
) -> PositionBias:
    """Measure the attention to each position of dummy contexts (Hsieh et al. 2024, "Found in
    the Middle", section 3).

    The paper inserts one dummy document at each position among real ones, which takes a forward
    pass per document. Here all documents of a context are dummies, and one pass measures all
    positions; the mean over several dummies removes what their content adds.

    Args:
        model: A causal text model with softmax attention.
        dummies: Batches of token ids, `[B, N]`, of one length: the real layout, such as the same
            question after a context of filler.
        rows: Indices of the queries to calibrate, `[R]`, such as those that predict answers.
        max_bytes: Memory of a block of maps, in bytes; see
            `diffmm.analysis.map_blocks.LayerInputs.blocks`.

    Raises:
        ValueError: If a layer is not softmax attention, there are no dummies, their lengths differ,
            or `rows` has no queries or ones that are not in them.
    """
    softmax_layers(model)
    device = next(model.parameters()).device
    rows = rows.to(device)
    sums: dict[str, Tensor] = {}
    num_samples, length = 0, None

    def visit(layer: LayerInputs) -> None:
        blocks = layer.blocks(rows=rows, max_bytes=max_bytes)
        total = torch.cat([block.combined.sum(dim=0) for block in blocks], dim=1)
        sums[layer.name] = sums.get(layer.name, 0.0) + total

    for tokens in dummies:
        length = length or tokens.shape[1]
        if tokens.shape[1] != length:
            raise ValueError(f"dummies must have one length, got {length} and {tokens.shape[1]}")
        if not len(rows) or not 0 <= int(rows.min()) <= int(rows.max()) < length:
            raise ValueError(f"rows must be queries in 0:{length}, got {rows.tolist()}")
        num_samples += len(tokens)
        visit_layers(model, tokens.to(device), visit=visit)
    if not num_samples:
        raise ValueError("dummies is empty, so that there is no bias to measure")
    return PositionBias(rows, {name: total / num_samples for name, total in sums.items()})


def calibrate(weights: Tensor, bias: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """Calibrate the attention to documents (Hsieh et al. 2024, sections 3 and 4).

        rel_k = a_k - b_k,   alpha = softmax(rel / t),   w'_i = alpha_k C w_i / sum_{j in k} w_j

    for token `i` of document `k`, where `a_k` and `b_k` are the mean weight and the mean bias over
    the tokens of the document, and `C` is the weight of all documents together, which is unchanged.
    Where a document has no weight at all, its new weight is uniform. With `documents` from 0 to
    `M - 1`, every token is a document.

    Args:
        weights: Softmax attention, `[B, H, R, M]`.
        bias: Attention to the same positions of dummies, `[H, R, M]`.
        documents: Document of each token, `[M]` or `[B, M]` integers from 0; `OUTSIDE` where there
            is none. Weights there are unchanged.
        temperature: `t`, in units of attention; the smaller, the more goes to the document with the
            most attention beyond its bias.
    """
    index = (documents + 1).expand(len(weights), -1)[:, None, None].expand_as(weights)
    num_documents = int(documents.max()) + 1

    def per_document(values: Tensor) -> Tensor:
        sums = values.new_zeros(*values.shape[:-1], num_documents + 1)
        return sums.scatter_add(-1, index, values)[..., 1:]

    count = per_document(torch.ones_like(weights))
    mass = per_document(weights)
    relevance = (mass - per_document(bias.expand_as(weights))) / count.clamp(min=1.0)
    alpha = (relevance / temperature).masked_fill(count == 0.0, -torch.inf).softmax(dim=-1)
    wanted = alpha * mass.sum(dim=-1, keepdim=True)

    def per_token(values: Tensor) -> Tensor:
        return values.gather(-1, (index - 1).clamp(min=0))

    share = torch.where(per_token(mass) > 0.0, weights / per_token(mass), 1.0 / per_token(count))
    return torch.where(index > 0, per_token(wanted) * share, weights)


@contextmanager
def calibrated(
    model: nn.Module,
    bias: PositionBias,
    *,
    documents: Tensor,
    temperature: float,
    num_layers: int | None = None,
    max_bytes: int | None = None,
) -> Iterator[None]:
    """Calibrate the attention of a model's last layers to documents, within a `with` block.

    Every head is calibrated by its own bias with `calibrate`; the paper averages relevance over
    layers and heads. The model is unchanged afterwards. It runs uncompiled, without gradients for
    the calibrated queries, and on whole sequences, without a key-value cache.

    Args:
        model: A causal text model with softmax attention.
        bias: Its bias by position; sequences must have the length of its dummies.
        documents: Document of each token; see `calibrate`. With `[B, M]`, batches have `B` samples.
            The queries of the bias come after all documents.
        temperature: See `calibrate`.
        num_layers: Number of layers, the last ones; by default half of them, rounded up, as in the
            paper, where a calibration of early layers made generation unstable.
        max_bytes: Memory of a block of maps, in bytes; see
            `diffmm.analysis.map_blocks.LayerInputs.blocks`.

    Raises:
        ValueError: If a layer is not softmax attention, an argument is out of range, no token or
            one after a query is in a document, or the bias is of another model; within the block,
            if a sequence has another length than the dummies, or a mask that is not causal.

    >>> bias = position_bias(model, [dummies], rows=torch.tensor([30]))
    >>> with calibrated(model, bias, documents=torch.arange(31), temperature=0.02):
    ...     logits = model(tokens)
    """
    layers = softmax_layers(model)
    number = (len(layers) + 1) // 2 if num_layers is None else num_layers
    if not 1 <= number <= len(layers):
        raise ValueError(f"num_layers must be in [1, {len(layers)}], got {num_layers}")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if list(layers) != list(bias.layers):
        raise ValueError(
            f"the bias is of layers {', '.join(bias.layers)}, but the model has "
            f"{', '.join(layers)}: measure the bias of this model"
        )
    in_document = (documents != OUTSIDE).expand(1, -1) if documents.ndim == 1 else documents >= 0
    if int(documents.min()) < OUTSIDE or not in_document.any(dim=1).all():
        raise ValueError(f"documents must be from 0, or {OUTSIDE}, and every sample needs one")
    last = int(in_document.any(dim=0).nonzero().max())
    if last > int(bias.rows.min()):
        raise ValueError(
            f"query {int(bias.rows.min())} does not see all documents, whose last token is {last}"
        )
    some = list(layers.items())[-number:]
    try:
        for name, layer in some:
            layer.attend = calibrated_attend(  # type: ignore[method-assign]
                layer, bias.rows, bias.layers[name], documents, temperature, max_bytes
            )
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for _, layer in some:
            layer.__dict__.pop("attend", None)


def calibrated_attend(
    layer: SoftmaxAttention,
    rows: Tensor,
    bias: Tensor,
    documents: Tensor,
    temperature: float,
    max_bytes: int | None,
) -> Callable[..., Tensor]:
    """The layer's `attend`, with calibrated weights for some queries."""
    plain = layer.attend

    def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        num_tokens = bias.shape[-1]
        if q.shape[1] != num_tokens or k.shape[1] != num_tokens:
            raise ValueError(
                f"the bias is of {num_tokens} tokens, got {q.shape[1]} queries and {k.shape[1]} "
                f"keys: calibrate sequences of that length, without a cache"
            )
        if not mask.is_causal:
            raise ValueError(f"calibration needs the mask AttentionMask(causal=True), got {mask}")
        heads = plain(x, q, k, v, mask).clone()
        inputs = LayerInputs.projected(layer, x, q, k, mask=mask)
        values = v.transpose(1, 2).repeat_interleave(q.shape[2] // v.shape[2], dim=1)
        start = 0
        for block in inputs.blocks(rows=rows.to(q.device), max_bytes=max_bytes):
            own = bias[:, start : start + len(block.rows)].to(block.combined)
            start += len(block.rows)
            weights = calibrate(block.combined, own, documents.to(q.device), temperature)
            new = (weights @ values.to(weights.dtype)).transpose(1, 2)
            heads[:, block.rows] = new.detach().to(heads.dtype)
        return heads

    return attend


def softmax_layers(model: nn.Module) -> dict[str, SoftmaxAttention]:
    """The attention layers of a model, by name.

    Raises:
        ValueError: If it has none, or one is not softmax attention: weights of differential
            attention are signed, so that they are no shares that could be given to other tokens.
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, Attention)}
    if not found:
        raise ValueError(f"{type(model).__name__} contains no attention layer of diffmm")
    layers = {}
    for name, part in found.items():
        if type(part) is not SoftmaxAttention:
            raise ValueError(
                f"calibration by position needs softmax attention, but {name} is "
                f"{type(part).__name__}: calibrate the softmax twin of this model"
            )
        layers[name] = part
    return layers
