"""The sdpa backend on a GPU against the reference, with any kernel that torch selects."""

import pytest
import torch

from diffmm.ops import AttentionMask, diff_attention
from diffmm.ops.diff_attention.reference import reference

pytestmark = pytest.mark.gpu


def masks(batch: int, length: int) -> dict[str, AttentionMask]:
    lengths = torch.randint(1, length, (batch, 1), device="cuda")
    return {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(causal=True, window=17),
        "prefix": AttentionMask(causal=True, prefix_lengths=lengths[:, 0]),
        "documents": AttentionMask(
            causal=True, document_ids=torch.arange(length, device="cuda").repeat(batch, 1) // 50
        ),
        "padding": AttentionMask(key_padding=torch.arange(length, device="cuda") >= lengths),
        "left padding": AttentionMask(
            causal=True, key_padding=torch.arange(length, device="cuda") >= lengths
        ),
    }


@pytest.mark.parametrize(
    "name", ["full", "causal", "window", "prefix", "documents", "padding", "left padding"]
)
@pytest.mark.parametrize(("num_components", "wide"), [(2, True), (1, False)])
@pytest.mark.parametrize("compiled", [False, True])
def test_error_is_at_most_twice_that_of_eager_low_precision(name, num_components, wide, compiled):
    torch.manual_seed(0)
    batch, length, heads, groups, dim = 2, 197, 4, 2, 64
    mask = masks(batch, length)[name]
    shapes = (
        (batch, length, heads, 2, dim),
        (batch, length, groups, num_components, dim),
        (batch, length, groups, 2 * dim if wide else dim),
    )
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    inputs.append(torch.rand(batch, length, heads, device="cuda"))
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def run(op, tensors):
        out = op(*tensors)
        grad = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=out.dtype).view_as(out)
        return [out, *torch.autograd.grad(out, tensors, grad)]

    def sdpa(*tensors):
        return diff_attention(*tensors, mask=mask, backend="sdpa")

    def plain(*tensors, upcast=False):
        return reference(*tensors, mask=mask, scale=dim**-0.5, upcast=upcast)

    truth = run(plain, exact)
    low = run(plain, inputs)
    found = run(torch.compile(sdpa) if compiled else sdpa, inputs)
    for what, f, p, t in zip(("out", "q", "k", "v", "lam"), found, low, truth, strict=True):
        error, allowed = (f - t).abs().max(), (p - t).abs().max()
        assert error <= 2 * allowed + 1e-5, f"{what}: {error:.2e}, plain bfloat16 {allowed:.2e}"
