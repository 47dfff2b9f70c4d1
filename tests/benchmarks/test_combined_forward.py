"""The forward pass with one value product, in the interpreter of the tests."""

import pytest
import torch

from diffmm.ops import AttentionMask
from diffmm.ops.diff_attention.reference import reference

pytest.importorskip("triton", reason="needs the package triton")
pytest.importorskip("triton.experimental.gluon")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("C", "E"), [(2, 64), (1, 32)])
def test_combined_forward(C, E, causal):
    from gluon_interpreter import interpreted

    from benchmarks.combined_forward import combined_forward
    from diffmm.ops.diff_attention.triton.tiles import Tile

    B, N, M, H, G, D = 2, 37, 75, 2, 1, 32
    q, k, v = torch.randn(B, N, H, 2, D), torch.randn(B, M, G, C, D), torch.randn(B, M, G, E)
    lam = torch.rand(B, N, H)
    with interpreted():
        out = combined_forward(q, k, v, lam, causal=causal, scale=D**-0.5, tile=Tile(16, 32, 4, 2))
    exact = (x.double() for x in (q, k, v, lam))
    wanted = reference(*exact, mask=AttentionMask(causal=causal), scale=D**-0.5)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
