"""The Hopper kernels on a CPU, in an interpreter that stops at their races."""

import pytest
import torch
from attention_checks import MASKS, check, make_inputs, masks

from diffmm.ops import AttentionMask

triton = pytest.importorskip("triton", reason="needs the package triton")

if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernels are for Triton 3.6", allow_module_level=True)

WIDE, ODD, SHARED_KEY = (128, 256, 2), (96, 192, 2), (128, 256, 1)  # D, E, C
V1, V2, SMALL = (64, 128, 2), (128, 128, 1), (48, 64, 1)
FEW = (
    8  # Of one largest error in so small a sample it is chance whether plain code's is half of it.
)


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


@pytest.fixture(params=["by_columns", "backward"])
def gradients(request, monkeypatch):
    """The module that the backward pass is taken from."""
    from diffmm.ops.diff_attention.triton.hopper import backward, by_columns

    module = {"by_columns": by_columns, "backward": backward}[request.param]
    monkeypatch.setattr(by_columns, "gradients", module.gradients)
    return module


@pytest.fixture
def role_by_role(monkeypatch):
    from diffmm.ops.diff_attention.triton.hopper import backward, by_columns

    monkeypatch.setattr(by_columns, "gradients", backward.gradients)


def check_here(N, M, H, G, widths, mask, *, dtype=torch.bfloat16, seed=0, num_largest=1):
    from gluon_interpreter import interpreted

    with interpreted(seed):
        inputs = make_inputs(N, M, H, G, widths, dtype, device="cpu")
        check(inputs, mask, num_largest=num_largest)


def check_mask(name, widths, num_largest=1):
    how = {"seed": MASKS.index(name), "num_largest": num_largest}
    check_here(150, 150, 2, 1, widths, masks(150, "cpu")[name], **how)
    check_here(65, 197, 1, 1, widths, masks(197, "cpu")[name], **how)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_with_wide_values(name):
    check_mask(name, (WIDE, ODD, SHARED_KEY)[MASKS.index(name) % 3])


@pytest.mark.usefixtures("role_by_role")
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name):
    check_mask(name, (V1, V2)[MASKS.index(name) % 2], FEW)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("widths", [WIDE, ODD, SHARED_KEY], ids=str)
def test_wide_values(widths):
    check_here(200, 200, 2, 2, widths, AttentionMask(causal=True), dtype=torch.float16)
    check_here(1, 1, 2, 2, widths, AttentionMask(causal=True), dtype=torch.float16)


@pytest.mark.usefixtures("role_by_role")
@pytest.mark.parametrize("widths", [V1, V2, SMALL], ids=str)
def test_every_width(widths):
    how = {"dtype": torch.float16, "num_largest": FEW}
    check_here(400, 400, 2, 2, widths, AttentionMask(causal=True), **how)
    check_here(1, 1, 2, 2, widths, AttentionMask(causal=True), **how)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_bytes", [1, 200_000])
def test_little_memory(gradients, monkeypatch, num_bytes, causal):
    """Heads take turns, and bands of keys where one head is too much."""
    monkeypatch.setattr(gradients, "SCRATCH_BYTES", num_bytes)
    check_here(130, 130, 4, 2, WIDE, AttentionMask(causal=causal))


@pytest.mark.usefixtures("role_by_role")
@pytest.mark.parametrize("num_bytes", [1, 400_000])
def test_little_memory_for_two_tiles_at_once(monkeypatch, num_bytes):
    from diffmm.ops.diff_attention.triton.hopper import backward

    monkeypatch.setattr(backward, "SCRATCH_BYTES", num_bytes)
    check_here(330, 330, 4, 2, V1, AttentionMask(causal=True))
