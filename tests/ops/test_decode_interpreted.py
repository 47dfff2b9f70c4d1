"""Decoding over more splits than one step of the join takes, in the tests' interpreter."""

import pytest
import torch

from diffmm.ops import AttentionMask
from diffmm.ops.diff_attention.reference import reference

triton = pytest.importorskip("triton", reason="needs the package triton")
pytest.importorskip("triton.experimental.gluon")


@pytest.mark.parametrize("C", [2, 1])
@pytest.mark.parametrize("padding", [False, True])
def test_many_splits(C, padding, monkeypatch):
    from gluon_interpreter import interpreted

    from diffmm.ops.diff_attention.triton import op
    from diffmm.ops.diff_attention.triton.tiles import GPU

    monkeypatch.setattr(op, "gpu_of", lambda tensor: GPU((9, 0), 200))

    M, H, G, D, E = 5000, 2, 1, 32, 64
    q, k = torch.randn(2, 1, H, 2, D), torch.randn(2, M, G, C, D)
    v, lam = torch.randn(2, M, G, E), torch.rand(2, 1, H)
    # The second sample's first splits see nothing.
    first = torch.tensor([[0], [2000]])
    mask = AttentionMask(causal=True, key_padding=torch.arange(M) >= first if padding else None)
    with interpreted():
        out = op._decode(q, k, v, lam, True, None, None, None, mask.key_padding, D**-0.5)
    exact = [x.double() for x in (q, k, v, lam)]
    wanted = reference(*exact, mask=mask, scale=D**-0.5)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
