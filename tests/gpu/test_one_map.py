"""Softmax attention by the fused kernels: errors are at most twice those of plain low precision."""

import pytest
import torch
from attention_checks import BATCH, MASKS, masks, upstream

from diffmm.ops import softmax_attention
from diffmm.ops.softmax_attention.reference import reference

pytestmark = pytest.mark.gpu


def check(N, M, H, G, width, dtype, mask):
    def run(inputs, backend=None, **settings):
        if backend is None:
            out = reference(*inputs, mask=mask, scale=width**-0.5, **settings)
        else:
            out = softmax_attention(*inputs, mask=mask, backend=backend)
        return out, *torch.autograd.grad(out, inputs, upstream(out))

    shapes = (BATCH, N, H, width), (BATCH, M, G, width), (BATCH, M, G, width)
    inputs = [torch.randn(s, device="cuda", dtype=dtype).requires_grad_() for s in shapes]
    truth = run([x.detach().double().requires_grad_() for x in inputs])
    low, found = run(inputs, upcast=False), run(inputs, "triton")
    for what, f, p, t in zip(("out", "q", "k", "v"), found, low, truth, strict=True):
        assert f.isfinite().all(), what
        error, of_plain = (f - t).norm(), (p - t).norm()
        # The rounding of the stored output is in delta, which plain code computes exactly.
        assert error <= 2 * of_plain + 4e-3 * t.norm() + 1e-6, (
            f"{what}: {error:.2e}, {of_plain:.2e}"
        )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("width", [64, 128])
def test_every_mask(width, name):
    check(700, 700, 4, 2, width, torch.bfloat16, masks(700, "cuda")[name])
    check(197, 300, 4, 4, width, torch.bfloat16, masks(300, "cuda")[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 40, 96, 128])
def test_every_width(width, dtype):
    check(300, 300, 4, 1, width, dtype, masks(300, "cuda")["documents"])


@pytest.mark.parametrize("name", MASKS)
def test_decoding(name):
    for N, M in ((1, 1023), (4, 700)):
        mask = masks(M, "cuda")[name]
        q, k, v = (
            torch.randn(BATCH, n, h, 64, device="cuda", dtype=torch.bfloat16)
            for n, h in ((N, 8), (M, 2), (M, 2))
        )
        found = softmax_attention(q, k, v, mask=mask, backend="triton")
        exact = (x.double() for x in (q, k, v))
        truth = reference(*exact, mask=mask, scale=0.125)
        plain = reference(q, k, v, mask=mask, scale=0.125, upcast=False)
        assert (found - truth).norm() <= 2 * (plain - truth).norm() + 1e-4
