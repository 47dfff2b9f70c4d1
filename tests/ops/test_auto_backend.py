"""The choice of `backend="auto"`, for tensors of a GPU that is not present."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from diffmm.ops import AttentionMask, diff_attention
from diffmm.ops.diff_attention import choose_backend
from diffmm.ops.softmax_attention import choose_backend as choose_for_softmax

pytest.importorskip("triton", reason="without Triton, there is only one backend to choose")

BUFFER = {"causal": True, "num_keys": torch.tensor(100)}
HOPPER, AMPERE = 9, 8
LONG = {"C": 1, "D": 64, "E": 64, "N": 8192, "M": 8192}


@pytest.fixture(autouse=True)
def built_for_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def choice(
    monkeypatch, *, major=HOPPER, device="cuda", dtype=torch.bfloat16, N=256, M=256, D=64, E=128,
    C=2, B=2, scale=0.125, grad=False, **mask,
):  # fmt: skip
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with FakeTensorMode():
        q = torch.empty(B, N, 4, 2, D, dtype=dtype, device=device)
        k = torch.empty(B, M, 2, C, D, dtype=dtype, device=device)
        v = torch.empty(B, M, 2, E, dtype=dtype, device=device)
    with torch.set_grad_enabled(grad):
        return choose_backend(q, k, v, AttentionMask(**mask), scale)


@pytest.mark.parametrize(
    "case",
    [{}, {"dtype": torch.float16}, {"D": 128, "E": 256}, {"D": 32, "E": 64}, {"N": 128},
     {"D": 96, "E": 192}, {"N": 200, "M": 300}, {"C": 1}, {"C": 1, "E": 64}, {"grad": True},
     {"N": 1, "B": 1}, {"N": 32, "M": 33}, {"N": 1, "M": 1 << 16}, {"N": 32, "B": 128, "M": 1024},
     LONG | {"C": 2}, LONG | {"E": 128}, LONG | {"N": 8191, "M": 8191}, LONG | {"D": 32},
     LONG | {"D": 72}, LONG | {"causal": True, "N": 8191}, LONG | {"window": 128},
     LONG | {"causal": True, "prefix_lengths": torch.ones(2, dtype=torch.long)},
     LONG | {"document_ids": torch.ones(2, 8192, dtype=torch.long)},
     LONG | {"key_padding": torch.ones(2, 8192, dtype=torch.bool)}, BUFFER | {"N": 1},
     BUFFER | {"N": 32, "C": 1}, BUFFER | {"N": 1, "M": 1 << 16, "C": 1}],
    ids=str,
)  # fmt: skip
def test_where_the_kernels_win(case, monkeypatch):
    assert choice(monkeypatch, **case) == "triton"


@pytest.mark.parametrize(
    "case",
    [{"major": AMPERE}, {"device": "cpu"}, {"dtype": torch.float32}, {"N": 127},
     {"N": 1, "M": 1 << 16, "C": 1}, {"N": 1, "dtype": torch.float32}, {"N": 32, "M": 32},
     {"N": 1, "M": 1 << 16, "grad": True}, {"N": 33, "M": 1 << 16}, {"N": 300, "M": 256},
     {"D": 160, "E": 256}, {"D": 128, "E": 264}, {"D": 60, "E": 120}, {"D": 16, "E": 32},
     {"scale": -1.0}, BUFFER, BUFFER | {"N": 1, "grad": True},
     BUFFER | {"N": 1, "document_ids": torch.ones(2, 256, dtype=torch.long)},
     LONG, LONG | {"causal": True}, LONG | {"D": 40}, LONG | {"N": 8191}],
    ids=str,
)  # fmt: skip
def test_where_they_do_not_or_cannot(case, monkeypatch):
    assert choice(monkeypatch, **case) == "sdpa"


@pytest.mark.parametrize("N", [1, 31, 32, 33, 64])
def test_decoding_is_where_its_kernels_serve(N, monkeypatch):
    from diffmm.ops.diff_attention.triton.decode import decodes

    assert (choice(monkeypatch, N=N) == "triton") == decodes(N, H=4, G=2)


def test_elsewhere_than_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choice(monkeypatch) == "sdpa"


def test_the_docstring_says_where():
    assert "Hopper" in diff_attention.__doc__
    assert "Hopper" in choose_backend.__doc__


def test_forward_mode_derivatives_are_no_kernels(monkeypatch):
    assert choice(monkeypatch) == "triton"
    q, k, v = torch.randn(1, 2, 2, 2, 8), torch.randn(1, 2, 2, 2, 8), torch.randn(1, 2, 2, 16)
    with torch.autograd.forward_ad.dual_level():
        assert choice(monkeypatch) == "sdpa"
        with pytest.raises(
            ValueError, match="backend 'triton' does not support forward-mode differentiation"
        ):
            diff_attention(q, k, v, 0.5, mask=AttentionMask(), backend="triton")


def softmax_choice(
    monkeypatch, *, N=256, M=256, B=2, G=2, grad=False, dtype=torch.bfloat16, **mask
):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=HOPPER)
    )
    with FakeTensorMode():
        q = torch.empty(B, N, 4, 64, dtype=dtype, device="cuda")
        k = torch.empty(B, M, G, 64, dtype=dtype, device="cuda")
    with torch.set_grad_enabled(grad):
        return choose_for_softmax(q, k, k, AttentionMask(**mask), 0.125)


PADDING = {"key_padding": torch.ones(2, 256, dtype=torch.bool)}
DOCUMENTS = {"causal": True, "document_ids": torch.ones(2, 256, dtype=torch.long)}


@pytest.mark.parametrize(
    "case",
    [PADDING, DOCUMENTS, {"window": 9}, {"causal": True, "window": 9}, DOCUMENTS | {"grad": True},
     {"causal": True, "N": 130}, PADDING | {"N": 1}, PADDING | {"N": 32}, BUFFER | {"N": 1},
     BUFFER | PADDING | {"N": 32}],
    ids=str,
)  # fmt: skip
def test_masks_that_torch_would_need_in_memory(case, monkeypatch):
    assert softmax_choice(monkeypatch, **case) == "triton"


@pytest.mark.parametrize(
    "case",
    [{}, {"causal": True}, {"causal": True, "N": 1}, {"N": 64}, PADDING | {"N": 127, "G": 1},
     PADDING | {"N": 1, "grad": True}, {"N": 1, "window": 9}, {"N": 300, "window": 9},
     PADDING | {"dtype": torch.float32}, BUFFER, BUFFER | DOCUMENTS | {"N": 1},
     BUFFER | {"N": 1, "grad": True}],
    ids=str,
)  # fmt: skip
def test_masks_that_torch_has_kernels_for(case, monkeypatch):
    assert softmax_choice(monkeypatch, **case) == "sdpa"
