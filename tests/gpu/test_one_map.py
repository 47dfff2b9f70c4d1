"""Softmax attention by the fused kernels: errors are at most twice those of plain low precision."""

from functools import partial

import pytest
import torch
from attention_checks import BATCH, MASKS, check_one_map, masks

from diffmm.ops import softmax_attention
from diffmm.ops.softmax_attention.reference import reference

pytestmark = pytest.mark.gpu


check = partial(check_one_map, device="cuda")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("width", [64, 128])
def test_every_mask(width, name):
    check(700, 700, 4, 2, width, masks(700, "cuda")[name])
    check(197, 300, 4, 4, width, masks(300, "cuda")[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 40, 96, 128])
def test_every_width(width, dtype):
    check(300, 300, 4, 1, width, masks(300, "cuda")["documents"], dtype)


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
