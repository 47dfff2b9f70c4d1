"""Decoding over more splits than one step of the join takes, in the tests' interpreter."""

import pytest
import torch

from diffmm.ops import AttentionMask
from diffmm.ops.diff_attention.reference import reference

triton = pytest.importorskip("triton", reason="needs the package triton")
pytest.importorskip("triton.experimental.gluon")


@pytest.mark.parametrize("C", [2, 1])
@pytest.mark.parametrize("padding", [False, True])
def test_many_splits(C, padding):
    from gluon_interpreter import interpreted

    from diffmm.ops.diff_attention.triton.decode import decode
    from diffmm.ops.diff_attention.triton.masking import KernelMask

    M, H, G, D, E = 2500, 2, 1, 32, 64
    q, k = torch.randn(2, 1, H, 2, D).bfloat16(), torch.randn(2, M, G, C, D).bfloat16()
    v, lam = torch.randn(2, M, G, E).bfloat16(), torch.rand(2, 1, H)
    # The second sample's first splits see nothing.
    first = torch.tensor([[0], [1000]])
    mask = AttentionMask(causal=True, key_padding=torch.arange(M) >= first if padding else None)
    with interpreted():
        out = decode(q, k, v, lam, KernelMask.of(mask, M), D**-0.5, num_programs=80)
    exact = [x.double() for x in (q, k, v, lam)]
    wanted = reference(*exact, mask=mask, scale=D**-0.5)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=2e-3)
