"""Cross-entropy of a linear layer's outputs, which are never in memory as a whole."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmm.batch import IGNORE_INDEX

MAX_LOGITS = 1 << 28
"""Number of logits in memory at a time: 1 GiB in float32."""


class Losses(NamedTuple):
    """Cross-entropies, in nats."""

    total: Tensor
    """Sum of all losses, a scalar in float32 that is attached to the autograd graph."""
    each: Tensor
    """Loss of each target, in float32 and detached; 0 where there is no target."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    max_logits: int = MAX_LOGITS,
) -> Losses:
    """Cross-entropy of `logits = x Wᵀ + b`:

        loss = log(sum_j exp(logits_j)) - sum_j t_j logits_j

    where `t` is `1 - label_smoothing` at the target plus `label_smoothing / V` everywhere.

    It equals `cross_entropy(linear(x, weight, bias).float(), targets, reduction="sum")` in value
    and gradients, with logits in x's dtype (that of autocast, where it is enabled) and everything
    else in float32 (float64 for float64 inputs). Tokens are processed in chunks. If gradients are
    needed, each chunk computes its own in the forward pass, while its logits exist, so that no
    product is computed twice; the backward pass only scales them. It supports reverse mode only,
    and no second derivatives.

    Args:
        x: Features, `[..., D]`.
        weight: Weight of the linear layer, `[V, D]`.
        targets: Class indices, `[...]` int64; `diffmm.batch.IGNORE_INDEX` where there is none.
        bias: Bias of the linear layer, `[V]`.
        label_smoothing: Fraction of a target that is spread evenly over all classes, in [0, 1).
        max_logits: Maximum number of logits in memory at a time.

    Raises:
        ValueError: If shapes do not match, or `label_smoothing` or `max_logits` is out of range.

    >>> x, weight = torch.randn(2, 10, 16), torch.randn(100, 16)
    >>> losses = linear_cross_entropy(x, weight, torch.randint(100, (2, 10)))
    >>> losses.total.shape, losses.each.shape
    (torch.Size([]), torch.Size([2, 10]))
    """
    if x.shape[:-1] != targets.shape or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., D], weight [V, D] and targets [...], got {tuple(x.shape)}, "
            f"{tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if max_logits < 1:
        raise ValueError(f"max_logits must be at least 1, got {max_logits}")
    rows = max(1, max_logits // len(weight))
    inputs = x.flatten(0, -2), weight, bias, targets.flatten()
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in inputs[:3]
    )
    if needs_grad:
        total, each = _ChunkedCrossEntropy.apply(*inputs, label_smoothing, rows)
    else:
        total, each, *_ = _in_chunks(*inputs, label_smoothing, rows, (False, False, False))
    return Losses(total, each.view(targets.shape))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        label_smoothing: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[:3]
        total, each, *grads = _in_chunks(x, weight, bias, targets, label_smoothing, rows, needed)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dx, dw, db = (
            None if each is None else (each * grad).to(each.dtype) for each in ctx.saved_tensors
        )
        return dx, dw, db, None, None, None


def _in_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    rows: int,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the sum of the losses, each loss, and the gradients of the sum that are needed."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        dx = torch.empty_like(x) if needed[0] else None
        dw = torch.zeros_like(weight, dtype=exact) if needed[1] else None
        db = torch.zeros_like(bias, dtype=exact) if bias is not None and needed[2] else None
        each = []
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            losses, grad = _chunk(x[part].to(dtype), w, b, targets[part], label_smoothing)
            each.append(losses)
            if dx is not None:
                dx[part] = grad @ w
            if dw is not None:
                dw += grad.mT @ x[part].to(dtype)
            if db is not None:
                db += grad.sum(dim=0, dtype=exact)
        losses = torch.cat(each) if each else x.new_zeros(0, dtype=exact)
        dw = None if dw is None else dw.to(weight.dtype)
        db = None if bias is None or db is None else db.to(bias.dtype)
        return losses.sum(), losses, dx, dw, db


def _chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute the losses of a chunk, and the gradients of its logits in x's dtype."""
    logits = torch.nn.functional.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_target = targets != IGNORE_INDEX
    index = targets.clamp(min=0).unsqueeze(1)
    log_sum = logits.logsumexp(dim=1, keepdim=True)
    own = (1.0 - label_smoothing) * logits.gather(1, index)
    if label_smoothing:
        own = own + label_smoothing * logits.mean(dim=1, keepdim=True)
    losses = torch.where(is_target, (log_sum - own).squeeze(1), 0.0)

    classes = torch.arange(len(weight), device=x.device)
    grad = (logits - log_sum).exp() - (1.0 - label_smoothing) * (classes == index).to(logits.dtype)
    grad = torch.where(is_target.unsqueeze(1), grad - label_smoothing / len(weight), 0.0)
    return losses, grad.to(x.dtype)
