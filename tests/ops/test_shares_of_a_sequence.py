"""A contiguous share of the queries needs the keys up to its end only (docs/scaling.md, "Context
parallelism")."""

import pytest
import torch

from diffmm.ops import AttentionMask, diff_attention, softmax_attention

N = 12
MASKS = {
    "causal": {},
    "window": {"window": 5},
    "documents": {"document_ids": torch.tensor([[0] * 5 + [1] * 7])},
}


def operators():
    """Each operator with its inputs, all of which have the positions in the second axis."""
    q, k, v = torch.randn(1, N, 4, 2, 8), torch.randn(1, N, 2, 2, 8), torch.randn(1, N, 2, 16)
    return {
        "diff_attention": (diff_attention, (q, k, v, torch.rand(1, N, 4))),
        "softmax_attention": (softmax_attention, (q[:, :, :, 0], k[:, :, :, 0], v)),
    }


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["diff_attention", "softmax_attention"])
def test_shares_make_up_the_whole(name, mask):
    operator, inputs = operators()[name]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    whole = operator(*inputs, mask=AttentionMask(causal=True, **MASKS[mask]))
    out_grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, inputs, out_grad)
    shares = []
    for start, end in ((0, 4), (4, 7), (7, N)):
        own, seen = slice(start, end), slice(0, end)
        q, k, v, *lam = inputs
        settings = dict(MASKS[mask])
        if "document_ids" in settings:
            settings["document_ids"] = settings["document_ids"][:, seen]
        shares.append(
            operator(
                q[:, own],
                k[:, seen],
                v[:, seen],
                *(each[:, own] for each in lam),
                mask=AttentionMask(causal=True, **settings),
            )
        )
    torch.testing.assert_close(torch.cat(shares, dim=1), whole)
    torch.testing.assert_close(
        torch.autograd.grad(torch.cat(shares, 1), inputs, out_grad), expected
    )
