"""The fused kernels on a GPU: at most twice the error of plain low precision."""

from functools import partial

import attention_checks
import pytest
import torch
from attention_checks import BATCH, MASKS, NAMES, check, kernels, plain, run
from torch.utils.checkpoint import checkpoint

from diffmm.ops import AttentionMask

pytestmark = pytest.mark.gpu

V1, V2, WIDE = (64, 128, 2), (128, 128, 1), (128, 256, 2)  # D, E, C
masks = partial(attention_checks.masks, device="cuda")
make_inputs = partial(attention_checks.make_inputs, device="cuda")


@pytest.fixture(autouse=True)
def _poisoned():
    """Fill every uninitialized allocation with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("widths", [V1, V2, WIDE], ids=str)
def test_every_mask(widths, name):
    for N, M in ((333, 333), (65, 197)):
        check(make_inputs(N, M, 4, 2, widths, torch.bfloat16), masks(M)[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "widths",
    [(32, 64, 2), (64, 128, 2), (96, 192, 2), (128, 256, 2), (64, 64, 1), (96, 96, 1),
     (128, 128, 1), (128, 256, 1), (64, 64, 2)],
    ids=str,
)  # fmt: skip
def test_every_width(widths, dtype):
    for length in (1, 63, 65, 197, 1023):
        check(make_inputs(length, length, 2, 2, widths, dtype), AttentionMask(causal=True))
    check(make_inputs(100, 300, 3, 1, widths, dtype), AttentionMask(causal=True))


@pytest.mark.parametrize("shape", [(), (3,), (1, 100, 1)], ids=str)
def test_a_lambda_that_is_shared_gets_the_sum_of_the_gradients(shape):
    # The error of a single number is random; its gradient is a sum of those that `check` compares.
    mask = AttentionMask(causal=True)
    inputs = make_inputs(100, 300, 3, 1, V1, torch.bfloat16, lam_shape=shape)
    each = [*inputs[:3], inputs[3].detach().expand(BATCH, 100, 3).contiguous().requires_grad_()]
    shared, found = run(kernels(mask), inputs)[-1], run(kernels(mask), each)[-1]
    torch.testing.assert_close(shared, found.sum_to_size(shape), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_bytes", [1, 200_000, 700_000])
def test_wide_values_in_little_memory(monkeypatch, num_bytes, causal):
    """Heads are processed in turn, and bands of keys if one head is too large."""
    from diffmm.ops.diff_attention.triton.hopper import backward

    monkeypatch.setattr(backward, "SCRATCH_BYTES", num_bytes)
    for N, M in ((333, 333), (100, 300)):
        check(make_inputs(N, M, 4, 2, WIDE, torch.bfloat16), AttentionMask(causal=causal))


@pytest.mark.parametrize("widths", [V1, (128, 256, 2)], ids=str)
def test_float32(widths):
    check(make_inputs(197, 197, 2, 1, widths, torch.float32), AttentionMask(causal=True))


def test_strided_inputs():
    D, H = 64, 3
    mask = AttentionMask(causal=True)
    packed = torch.randn(BATCH, 130, H * 6 * D, device="cuda", dtype=torch.bfloat16)
    lam = torch.rand(H, device="cuda").requires_grad_()
    inputs = [packed.requires_grad_(), lam]

    def views(op):
        def call(packed, lam):
            q, k, v = (part.unflatten(-1, (H, 2, D)) for part in packed.chunk(3, dim=-1))
            # Neither view can be described to the copy engine.
            q = q[..., :1, :].expand(-1, -1, -1, 2, -1)
            v = v.transpose(-1, -2).reshape(BATCH, 130, H, 2 * D).flip(1)
            return op(q, k, v, lam)

        return call

    truth = run(views(plain(mask, upcast=True)), [x.detach().double().requires_grad_()
                                                  for x in inputs])  # fmt: skip
    low = run(views(plain(mask, upcast=False)), inputs)
    found = run(views(kernels(mask)), inputs)
    for f, p, t in zip(found, low, truth, strict=True):
        assert (f - t).norm() <= 2 * (p - t).norm()


@pytest.mark.parametrize("name", ["full", "causal", "causal window", "left padding", "everything"])
@pytest.mark.parametrize("widths", [V1, V2, (128, 256, 2)], ids=str)
def test_decoding(widths, name):
    for (N, H, G), M in zip(((1, 8, 8), (1, 8, 2), (4, 8, 1), (16, 2, 2)), (65, 1023, 700, 300),
                            strict=True):  # fmt: skip
        mask = masks(M)[name]
        inputs = [x.detach() for x in make_inputs(N, M, H, G, widths, torch.bfloat16)]
        truth = plain(mask, upcast=True)(*(x.double() for x in inputs))
        error = (kernels(mask)(*inputs) - truth).norm()
        assert error <= 2 * (plain(mask, upcast=False)(*inputs) - truth).norm() + 1e-4


def test_gradients_are_the_same_bits_every_time():
    inputs = make_inputs(1000, 1000, 8, 4, V1, torch.bfloat16)
    op = kernels(AttentionMask(causal=True))
    first, second = run(op, inputs), run(op, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("widths", [V1, V2], ids=str)
def test_compiled(widths):
    inputs = make_inputs(197, 197, 4, 2, widths, torch.bfloat16)
    op = kernels(AttentionMask(causal=True))

    def layer(q, k, v, lam):
        return op(q * 1.5, k, v, lam.sigmoid()) * 2

    wanted = run(layer, inputs)
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        for _ in range(3):
            found = [x.clone() for x in run(compiled, inputs)]
        for what, f, w in zip(NAMES, found, wanted, strict=True):
            assert (f - w).norm() <= 2e-2 * w.norm(), (mode, what)


def test_checkpointed():
    inputs = make_inputs(197, 197, 4, 2, V1, torch.bfloat16)
    op = kernels(AttentionMask(causal=True))
    found = run(lambda *x: checkpoint(op, *x, use_reentrant=False), inputs)
    for f, w in zip(found, run(op, inputs), strict=True):
        assert torch.equal(f, w)


def test_in_a_cuda_graph():
    inputs = [x.detach() for x in make_inputs(100, 100, 4, 2, V1, torch.bfloat16)]
    op = kernels(AttentionMask(causal=True))
    op(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(*inputs)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, op(*inputs))


def test_operator_is_well_formed():
    from diffmm.ops.diff_attention.triton.op import _attend

    q, k, v, lam = make_inputs(50, 70, 4, 2, V1, torch.bfloat16)
    padding = torch.rand(BATCH, 70, device="cuda") > 0.2
    args = (q, k, v, lam, True, 40, None, None, padding, 0.125, True)
    torch.library.opcheck(_attend, args, atol=1e-2, rtol=1e-2)
