"""Grouped differential attention on a GPU, with every backend, against the reference."""

import pytest
import torch

from diffmm.ops import AttentionMask, grouped_diff_attention
from diffmm.ops.grouped_diff_attention import reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["full", "causal", "documents", "padding"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
def test_error_is_at_most_twice_that_of_eager_low_precision(name, backend, compiled):
    torch.manual_seed(0)
    batch, length, noise, signals, groups, dim = 2, 197, 4, 4, 2, 64
    keys = torch.arange(length, device="cuda")
    mask = {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "documents": AttentionMask(causal=True, document_ids=keys.repeat(batch, 1) // 50),
        "padding": AttentionMask(key_padding=keys >= torch.tensor([[3], [90]], device="cuda")),
    }[name]
    shapes = (
        (batch, length, noise, signals + 1, dim),
        (batch, length, groups, dim),
        (batch, length, groups, dim),
    )
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    inputs.append(torch.rand(batch, length, noise * signals, device="cuda"))
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def run(op, tensors):
        out = op(*tensors)
        grad = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=out.dtype).view_as(out)
        return [out, *torch.autograd.grad(out, tensors, grad)]

    def fast(*tensors):
        return grouped_diff_attention(*tensors, mask=mask, backend=backend)

    def plain(*tensors, upcast=False):
        return reference(*tensors, mask=mask, scale=dim**-0.5, upcast=upcast)

    truth, low = run(plain, exact), run(plain, inputs)
    found = run(torch.compile(fast) if compiled else fast, inputs)
    for ours, rough, true in zip(found, low, truth, strict=True):
        assert ours.isfinite().all()
        assert (ours - true).norm() <= 2 * (rough - true).norm() + 1e-6 * true.numel() ** 0.5
