"""The Hopper kernels on a CPU, in an interpreter that stops at their races."""

import pytest
import torch
from attention_checks import MASKS, check, make_inputs, masks

from diffmm.ops import AttentionMask

triton = pytest.importorskip("triton", reason="needs the package triton")

if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernels are for Triton 3.6", allow_module_level=True)

WIDE, NARROWER, SHARED_KEY = (128, 256, 2), (96, 192, 2), (128, 256, 1)  # D, E, C


@pytest.fixture(autouse=True)
def _poisoned():
    """Every uninitialized allocation holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _served(monkeypatch):
    """The public function takes the Hopper kernels, here."""
    from diffmm.ops.diff_attention.triton import hopper, op

    monkeypatch.setattr(op, "INTERPRETED", True)
    monkeypatch.setattr(hopper, "serves", lambda q, v: True)


def check_here(N, M, H, G, widths, mask, *, dtype=torch.bfloat16, seed=0):
    from gluon_interpreter import interpreted

    with interpreted(seed):
        check(make_inputs(N, M, H, G, widths, dtype, device="cpu"), mask)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name):
    seed = MASKS.index(name)
    widths = (WIDE, NARROWER, SHARED_KEY)[seed % 3]
    check_here(150, 150, 2, 1, widths, masks(150, "cpu")[name], seed=seed)
    check_here(65, 197, 1, 1, widths, masks(197, "cpu")[name], seed=seed)


@pytest.mark.parametrize("widths", [WIDE, NARROWER, SHARED_KEY], ids=str)
def test_every_width(widths):
    check_here(200, 200, 2, 2, widths, AttentionMask(causal=True), dtype=torch.float16)
    check_here(1, 1, 2, 2, widths, AttentionMask(causal=True), dtype=torch.float16)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_bytes", [1, 200_000])
def test_little_memory(monkeypatch, num_bytes, causal):
    """Heads take turns, and bands of keys where one head is too much."""
    from diffmm.ops.diff_attention.triton import wide_backward

    monkeypatch.setattr(wide_backward, "SCRATCH_BYTES", num_bytes)
    check_here(130, 130, 4, 2, WIDE, AttentionMask(causal=causal))
