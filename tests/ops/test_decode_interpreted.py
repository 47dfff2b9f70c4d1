"""Decoding in the interpreter of the tests, for GPUs of several sizes: however the list of tiles is
divided among programs, the splits of every group are found and combined."""

import pytest
import torch

from diffmm.ops import AttentionMask
from diffmm.ops.diff_attention.reference import reference

triton = pytest.importorskip("triton", reason="needs the package triton")
pytest.importorskip("triton.experimental.gluon")


def attend(q, k, v, lam, mask, num_multiprocessors, monkeypatch):
    from gluon_interpreter import interpreted

    from diffmm.ops.diff_attention.triton import op
    from diffmm.ops.diff_attention.triton.tiles import GPU

    monkeypatch.setattr(op, "gpu_of", lambda tensor: GPU((9, 0), num_multiprocessors))
    with interpreted():
        return op._decode(
            q, k, v, lam, mask.causal, mask.window, mask.prefix_lengths, mask.document_ids,
            mask.key_padding, mask.num_keys, q.shape[-1] ** -0.5,
        )  # fmt: skip


def check(q, k, v, lam, mask, num_multiprocessors, monkeypatch, tolerance=1e-5):
    out = attend(q, k, v, lam, mask, num_multiprocessors, monkeypatch)
    scale = q.shape[-1] ** -0.5
    wanted = reference(*(x.double() for x in (q, k, v, lam)), mask=mask, scale=scale)
    torch.testing.assert_close(out.double(), wanted, rtol=10 * tolerance, atol=tolerance)


def make_inputs(B, N, M, H, G, C, D=32, E=64, dtype=torch.float32):
    shapes = (B, N, H, 2, D), (B, M, G, C, D), (B, M, G, E)
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    return q, k, v, torch.rand(B, N, H)


@pytest.mark.parametrize(("C", "padding"), [(1, False), (2, True)])
def test_many_splits(C, padding, monkeypatch):
    """More than one step of the second kernel; the first splits of the second sample have no
    visible keys."""
    M, first = 5000, torch.tensor([[0], [2000]])
    mask = AttentionMask(causal=True, key_padding=torch.arange(M) >= first if padding else None)
    check(*make_inputs(2, 1, M, 2, 1, C), mask, 200, monkeypatch)


@pytest.mark.parametrize("C", [2, 1])
@pytest.mark.parametrize("num_multiprocessors", [1, 2, 5, 9])
def test_more_groups_than_programs(num_multiprocessors, C, monkeypatch):
    mask = AttentionMask(causal=True, window=70)
    check(*make_inputs(7, 2, 150, 6, 3, C), mask, num_multiprocessors, monkeypatch)


@pytest.mark.parametrize("mask", [AttentionMask(causal=True), AttentionMask(window=3)], ids=str)
def test_more_queries_than_keys(mask, monkeypatch):
    check(*make_inputs(2, 9, 4, 2, 1, 2), mask, 2, monkeypatch)


@pytest.mark.parametrize("C", [2, 1])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("size", "num_keys"), [(150, 1), (150, 64), (150, 149), (5000, 3100)])
def test_keys_that_do_not_exist_are_not_read(size, num_keys, window, C, monkeypatch):
    """The work is divided by the number of keys that exist; the rest of the buffers is NaN."""
    from diffmm.ops.diff_attention.triton import decode

    q, k, v, lam = make_inputs(3, 1, size, 6, 3, C)
    padding = torch.arange(size) >= torch.tensor([[0], [0], [40]])
    if num_keys <= 40:
        padding = None
    k[:, num_keys:] = v[:, num_keys:] = torch.nan
    mask = AttentionMask(True, window, None, None, padding, torch.tensor(num_keys))
    real = None if padding is None else padding[:, :num_keys]
    few = AttentionMask(True, window, None, None, real)
    monkeypatch.setattr(decode, "FEW_KEYS", 1000)
    found = attend(q, k, v, lam, mask, 7, monkeypatch)
    wanted = reference(q, k[:, :num_keys], v[:, :num_keys], lam, mask=few, scale=32**-0.5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_half_precision(monkeypatch):
    inputs = make_inputs(2, 3, 300, 4, 2, 2, dtype=torch.float16)
    check(*inputs, AttentionMask(causal=True), 3, monkeypatch, tolerance=2e-3)


def test_strided_inputs(monkeypatch):
    q, k, v, lam = make_inputs(2, 3, 100, 4, 2, 2)
    k = torch.stack([k, k], dim=-1)[..., 0]
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    check(q.flip(1), k, v, lam[:, :1].expand_as(lam), AttentionMask(causal=True), 3, monkeypatch)
