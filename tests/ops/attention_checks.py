"""Checks of fused differential attention: its error relative to float64 is at most twice that of
plain low precision."""

import math

import torch

from diffmm.ops import AttentionMask, diff_attention, softmax_attention
from diffmm.ops.diff_attention.reference import reference
from diffmm.ops.softmax_attention.reference import reference as softmax_reference

BATCH = 2
MASKS = (
    "full", "causal", "window", "causal window", "prefix", "documents", "shuffled documents",
    "padding", "left padding", "everything",
)  # fmt: skip
NAMES = ("out", "q", "k", "v", "lam")


def masks(num_keys, device):
    """Every field and combinations, including rows and tiles without visible keys."""
    keys = torch.arange(num_keys, device=device)
    lengths = torch.randint(1, num_keys + 1, (BATCH, 1), device=device)
    packed = torch.stack([keys // 50, keys // 130])
    padding, left = keys < lengths, keys >= num_keys - lengths
    return {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(window=40),
        "causal window": AttentionMask(causal=True, window=100),
        "prefix": AttentionMask(causal=True, prefix_lengths=lengths[:, 0]),
        "documents": AttentionMask(causal=True, document_ids=packed),
        "shuffled documents": AttentionMask(document_ids=packed[:, torch.randperm(num_keys)]),
        "padding": AttentionMask(key_padding=padding),
        "left padding": AttentionMask(causal=True, key_padding=left),
        "everything": AttentionMask(True, 90, lengths[:, 0], packed, padding),
    }


def make_inputs(N, M, H, G, widths, dtype, lam_shape=None, *, device):
    D, E, C = widths
    shapes = (BATCH, N, H, 2, D), (BATCH, M, G, C, D), (BATCH, M, G, E)
    inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    lam = torch.randn((BATCH, N, H) if lam_shape is None else lam_shape, device=device)
    return [x.requires_grad_() for x in (*inputs, lam)]


def upstream(out):
    """The same gradient for every output of a shape: random, rounded to the output's dtype."""
    generator = torch.Generator(out.device).manual_seed(1)
    return torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype)


def run(op, inputs):
    out = op(*inputs)
    return out, *torch.autograd.grad(out, inputs, upstream(out))


def kernels(mask):
    return lambda q, k, v, lam: diff_attention(q, k, v, lam, mask=mask, backend="triton")


def plain(mask, *, upcast):
    def op(q, k, v, lam):
        scale = q.shape[-1] ** -0.5
        return reference(q, k, v, lam.expand(q.shape[:3]), mask=mask, scale=scale, upcast=upcast)

    return op


def errors_of_stored_outputs(exact, mask, dtype):
    """The errors of each of `NAMES` that are caused only by the rounding of stored outputs.

    A fused backward pass computes `delta_i = rowsum(P_i * dP)` as `dO·O_i` from outputs stored in
    `dtype`, so that `dS_i = P_i * (dP - delta_i)` has an error of `P_i` times that rounding. Plain
    code does not: a row with one visible key has dS = 0, which plain code computes exactly, and
    fused code only up to rounding.
    """
    q, k, v, lam = exact
    weight, scale = lam.detach().expand(q.shape[:3]), q.shape[-1] ** -0.5

    def op(weight):
        return reference(q, k, v, weight, mask=mask, scale=scale)

    with torch.no_grad():
        out, second = op(weight), op(torch.zeros_like(weight)) - op(torch.ones_like(weight))
        grad = upstream(out.to(dtype)).double()
        delta2 = (grad * (second.to(dtype) - second)).sum(-1)
        delta1 = (grad * (out.to(dtype) - out)).sum(-1) + weight * delta2
    # The gradient of a log-sum-exp is P, so that of these weighted ones is the required error.
    keys = k.expand(-1, -1, -1, 2, -1).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bnhcd,bmhcd->cbnhm", q, keys) * scale
    sees = mask.to_bool(q.shape[1], k.shape[1], device=q.device).transpose(1, 2)
    lse = scores.masked_fill(~sees, -1e30).logsumexp(-1) * sees.any(-1)
    dq, dk = torch.autograd.grad((weight * delta2 * lse[1] - delta1 * lse[0]).sum(), (q, k))
    return out.to(dtype) - out, dq, dk, torch.zeros_like(v), torch.zeros_like(lam)


def check(inputs, mask, *, num_largest=1):
    """Check that errors relative to float64 are at most twice those of plain low precision plus
    those of rounding stored outputs, in the norm of all errors and in that of the largest.

    Sums are accumulated in float32, so an error may also be eight float32 roundings of the largest
    entry: plain float32 splits its sums, while the kernels add them sequentially.
    """
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = run(plain(mask, upcast=True), exact)
    low = run(plain(mask, upcast=False), inputs)
    found = run(kernels(mask), inputs)
    stored = errors_of_stored_outputs(exact, mask, inputs[0].dtype)
    for what, f, p, s, t in zip(NAMES, found, low, stored, truth, strict=True):
        assert f.isfinite().all(), what
        rounding = 1e-6 * (1 + t.abs().max())
        for measure, most in (("norm", t.numel()), ("largest", min(num_largest, t.numel()))):
            error, of_plain, of_stored = (
                x.abs().flatten().topk(most).values.norm() for x in (f - t, p - t, s)
            )
            assert error <= 2 * (of_plain + of_stored) + rounding * most**0.5, (
                f"{what}, {measure}: {error:.2e}, plain {of_plain:.2e}, stored {of_stored:.2e}"
            )


def check_one_map(N, M, H, G, width, mask, dtype=torch.bfloat16, *, device):
    """Check softmax attention by the fused kernels like `check`."""

    def run(inputs, backend=None, **settings):
        if backend is None:
            out = softmax_reference(*inputs, mask=mask, scale=width**-0.5, **settings)
        else:
            out = softmax_attention(*inputs, mask=mask, backend=backend)
        return out, *torch.autograd.grad(out, inputs, upstream(out))

    shapes = (BATCH, N, H, width), (BATCH, M, G, width), (BATCH, M, G, width)
    inputs = [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]
    truth = run([x.detach().double().requires_grad_() for x in inputs])
    low, found = run(inputs, upcast=False), run(inputs, "triton")
    for what, f, p, t in zip(("out", "q", "k", "v"), found, low, truth, strict=True):
        assert f.isfinite().all(), what
        error, of_plain = (f - t).norm(), (p - t).norm()
        # The rounding of the stored output is in delta, which plain code computes exactly.
        most = 2 * of_plain + 4e-3 * t.norm() + 1e-6
        assert error <= most, f"{what}: {error:.2e}, plain {of_plain:.2e}"


def far_apart(tensor, axis, file):
    """Copy `tensor` with a stride of over 2³⁰ numbers along `axis`, so that the offset of the third
    entry exceeds 32 bits. The memory is a sparse `file`, which only stores the written parts."""
    step = 2**30 + 64
    others = [size if other != axis else 1 for other, size in enumerate(tensor.shape)]
    strides = [math.prod(others[other + 1 :]) for other in range(tensor.dim())]
    strides[axis] = step
    size = step * tensor.shape[axis]
    far = torch.from_file(str(file), shared=True, size=size, dtype=tensor.dtype)
    far = far.as_strided(tensor.shape, strides)
    with torch.no_grad():
        far.copy_(tensor)
    return far
