"""The Hopper kernels on a CPU, in an interpreter that detects races."""

import pytest
import torch
from attention_checks import (
    BATCH,
    MASKS,
    check,
    check_one_map,
    far_apart,
    make_inputs,
    masks,
)

from diffmm.ops import AttentionMask

triton = pytest.importorskip("triton", reason="needs the package triton")

if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernels are for Triton 3.6", allow_module_level=True)

WIDE, ODD, SHARED_KEY = (128, 256, 2), (96, 192, 2), (128, 256, 1)  # D, E, C
V1, V2, SMALL = (64, 128, 2), (128, 128, 1), (48, 64, 1)
# The single largest error of such a small sample is random, so that several are compared.
FEW = 8


@pytest.fixture(autouse=True)
def _poisoned():
    """Fill every uninitialized allocation with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _served(monkeypatch):
    """Let the public function use the Hopper kernels here."""
    from diffmm.ops.diff_attention.triton import hopper, op

    monkeypatch.setattr(op, "INTERPRETED", True)
    monkeypatch.setattr(hopper, "serves_forward", lambda q, v: True)
    monkeypatch.setattr(hopper, "serves_backward", lambda q, v: True)


def check_here(N, M, H, G, widths, mask, *, dtype=torch.bfloat16, seed=0, num_largest=1):
    from gluon_interpreter import interpreted

    with interpreted(seed):
        inputs = make_inputs(N, M, H, G, widths, dtype, device="cpu")
        check(inputs, mask, num_largest=num_largest)


def check_softmax(N, M, H, G, width, mask, seed=0):
    from gluon_interpreter import interpreted

    with interpreted(seed):
        check_one_map(N, M, H, G, width, mask, device="cpu")


@pytest.mark.parametrize("name", MASKS)
def test_one_map_with_every_mask(name):
    index = MASKS.index(name)
    width = (128, 64, 96)[index % 3]
    check_softmax(200, 200, 2, 1 + index % 2, width, masks(200, "cpu")[name], seed=index)
    check_softmax(65, 197, 2, 1, width, masks(197, "cpu")[name], seed=index)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_between_the_ends_of_a_range_may_be_unwritten(causal):
    """A document in two parts has another one between them: the range of its keys includes those of
    the other, whose dS is written for other queries only."""
    documents = torch.tensor([0] * 290 + [1] * 300 + [0] * 50).repeat(BATCH, 1)
    documents[1] = documents[0].roll(100)
    mask = AttentionMask(causal=causal, document_ids=documents)
    if causal:
        check_softmax(640, 640, 1, 1, 64, mask)
    else:
        check_here(640, 640, 1, 1, SMALL, mask, num_largest=FEW)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name):
    index = MASKS.index(name)
    wide, narrow = ((WIDE, ODD, SHARED_KEY)[index % 3], 1), ((V1, V2)[index // 2 % 2], FEW)
    # Equal lengths for one kind of widths and fewer queries than keys for the other, by turns.
    of_equal, of_fewer = (wide, narrow) if index % 2 else (narrow, wide)
    how = {"seed": index, "num_largest": of_equal[1]}
    check_here(150, 150, 2, 1, of_equal[0], masks(150, "cpu")[name], **how)
    how["num_largest"] = of_fewer[1]
    check_here(65, 197, 1, 1, of_fewer[0], masks(197, "cpu")[name], **how)


@pytest.mark.parametrize("widths", [WIDE, ODD, SHARED_KEY, V1, V2, SMALL], ids=str)
def test_every_width(widths):
    how = {"dtype": torch.float16, "num_largest": FEW}
    check_here(400, 400, 1, 1, widths, AttentionMask(causal=True), **how)
    check_here(1, 1, 2, 2, widths, AttentionMask(causal=True), **how)


@pytest.mark.parametrize(
    ("widths", "num_bytes", "causal"),
    [(WIDE, 1, True), (WIDE, 200_000, False), (V1, 1, False), (V1, 200_000, True)],
    ids=str,
)
def test_little_memory(monkeypatch, widths, num_bytes, causal):
    """Heads are processed in turn, and bands of keys if one head is too large; all pairs of the
    three parameters."""
    from diffmm.ops.diff_attention.triton.hopper import backward

    monkeypatch.setattr(backward, "SCRATCH_BYTES", num_bytes)
    check_here(150, 150, 4, 2, widths, AttentionMask(causal=causal))


@pytest.mark.parametrize(("widths", "parts"), [(V1, 1), (V1, 2), (WIDE, 2), (V2, 3)], ids=str)
def test_heads_of_a_group_are_divided(monkeypatch, widths, parts):
    """Also unevenly: two heads for one program and one for the other."""
    from diffmm.ops.diff_attention.triton.hopper import backward

    monkeypatch.setattr(backward, "num_parts", lambda programs, heads_per_group: parts)
    check_here(130, 130, 3, 1, widths, AttentionMask(causal=True), num_largest=FEW)


def test_no_part_is_without_a_head():
    from diffmm.ops.diff_attention.triton.hopper.backward import ENOUGH_PROGRAMS, num_parts

    for heads in range(1, 20):
        for programs in (1, 100, 300, ENOUGH_PROGRAMS, 10 * ENOUGH_PROGRAMS):
            parts = num_parts(programs, heads)
            each = -(-heads // parts)
            assert (parts - 1) * each < heads <= parts * each
            enough = parts * programs >= ENOUGH_PROGRAMS
            assert enough or parts == heads or each == -(-heads // (parts + 1))
    assert num_parts(256, 5) == 2
    assert num_parts(ENOUGH_PROGRAMS, 5) == 1


@pytest.mark.parametrize("axis", [1, 2], ids=["tokens", "heads"])
def test_lambda_further_apart_than_32_bits(axis, tmp_path):
    from gluon_interpreter import interpreted

    with interpreted(0):
        *inputs, lam = make_inputs(3, 3, 3, 3, V1, torch.bfloat16, device="cpu")
        lam = far_apart(lam.detach(), axis, tmp_path / "lam").requires_grad_()
        check([*inputs, lam], AttentionMask(), num_largest=FEW)
