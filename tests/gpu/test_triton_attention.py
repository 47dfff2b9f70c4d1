"""The fused kernels on a GPU: never further from float64 than twice plain low precision."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffmm.ops import AttentionMask, diff_attention
from diffmm.ops.diff_attention.reference import reference

pytestmark = pytest.mark.gpu

BATCH = 2
V1, V2, WIDE = (64, 128, 2), (128, 128, 1), (128, 256, 2)  # D, E, C
MASKS = (
    "full", "causal", "window", "causal window", "prefix", "documents", "shuffled documents",
    "padding", "left padding", "everything",
)  # fmt: skip
NAMES = ("out", "q", "k", "v", "lam")


@pytest.fixture(autouse=True)
def _poisoned():
    """Every uninitialized allocation holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def masks(num_keys):
    """Every field and combinations, with rows and tiles that see nothing."""
    keys = torch.arange(num_keys, device="cuda")
    lengths = torch.randint(1, num_keys + 1, (BATCH, 1), device="cuda")
    packed = torch.stack([keys // 50, keys // 130])
    padding, left = keys < lengths, keys >= num_keys - lengths
    return {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(window=40),
        "causal window": AttentionMask(causal=True, window=100),
        "prefix": AttentionMask(causal=True, prefix_lengths=lengths[:, 0]),
        "documents": AttentionMask(causal=True, document_ids=packed),
        "shuffled documents": AttentionMask(document_ids=packed[:, torch.randperm(num_keys)]),
        "padding": AttentionMask(key_padding=padding),
        "left padding": AttentionMask(causal=True, key_padding=left),
        "everything": AttentionMask(True, 90, lengths[:, 0], packed, padding),
    }


def make_inputs(N, M, H, G, widths, dtype, lam_shape=None):
    D, E, C = widths
    shapes = (BATCH, N, H, 2, D), (BATCH, M, G, C, D), (BATCH, M, G, E)
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    lam = torch.randn((BATCH, N, H) if lam_shape is None else lam_shape, device="cuda")
    return [x.requires_grad_() for x in (*inputs, lam)]


def upstream(out):
    """The same gradient for every output of a shape: random, rounded to the output's dtype."""
    generator = torch.Generator(out.device).manual_seed(1)
    return torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype)


def run(op, inputs):
    out = op(*inputs)
    return out, *torch.autograd.grad(out, inputs, upstream(out))


def kernels(mask):
    return lambda q, k, v, lam: diff_attention(q, k, v, lam, mask=mask, backend="triton")


def plain(mask, *, upcast):
    def op(q, k, v, lam):
        scale = q.shape[-1] ** -0.5
        return reference(q, k, v, lam.expand(q.shape[:3]), mask=mask, scale=scale, upcast=upcast)

    return op


def errors_of_stored_outputs(exact, mask, dtype):
    """How far rounding of the stored outputs alone takes each of `NAMES` from exact arithmetic.

    A fused backward takes `delta_i = rowsum(P_i * dP)` as `dO·O_i` from outputs stored in `dtype`,
    and so `dS_i = P_i * (dP - delta_i)` is off by `P_i` times what that rounds. Plain code is not:
    a row that sees one key has dS = 0, which plain code finds exactly and fused code to rounding.
    """
    q, k, v, lam = exact
    weight, scale = lam.detach().expand(q.shape[:3]), q.shape[-1] ** -0.5

    def op(weight):
        return reference(q, k, v, weight, mask=mask, scale=scale)

    with torch.no_grad():
        out, second = op(weight), op(torch.zeros_like(weight)) - op(torch.ones_like(weight))
        grad = upstream(out.to(dtype)).double()
        delta2 = (grad * (second.to(dtype) - second)).sum(-1)
        delta1 = (grad * (out.to(dtype) - out)).sum(-1) + weight * delta2
    # The gradient of a log-sum-exp is P: that of these weighted ones is the error looked for.
    keys = k.expand(-1, -1, -1, 2, -1).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bnhcd,bmhcd->cbnhm", q, keys) * scale
    sees = mask.to_bool(q.shape[1], k.shape[1], device=q.device).transpose(1, 2)
    lse = scores.masked_fill(~sees, -1e30).logsumexp(-1) * sees.any(-1)
    dq, dk = torch.autograd.grad((weight * delta2 * lse[1] - delta1 * lse[0]).sum(), (q, k))
    return out.to(dtype) - out, dq, dk, torch.zeros_like(v), torch.zeros_like(lam)


def check(inputs, mask):
    """Never further from float64 than twice plain low precision and the stored outputs' rounding.

    Sums are float32 in the end, and so an error may also be eight float32 roundings of the largest
    entry: plain float32 splits its sums, the kernels add them up in one chain.
    """
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = run(plain(mask, upcast=True), exact)
    low = run(plain(mask, upcast=False), inputs)
    found = run(kernels(mask), inputs)
    stored = errors_of_stored_outputs(exact, mask, inputs[0].dtype)
    for what, f, p, s, t in zip(NAMES, found, low, stored, truth, strict=True):
        assert f.isfinite().all(), what
        rounding = 1e-6 * (1 + t.abs().max())
        for measure, size, count in (
            ("norm", torch.Tensor.norm, t.numel() ** 0.5),
            ("max", lambda x: x.abs().max(), 1.0),
        ):
            error, allowed = size(f - t), size(p - t) + size(s)
            assert error <= 2 * allowed + rounding * count, (
                f"{what}, {measure}: {error:.2e}, plain {size(p - t):.2e}, stored {size(s):.2e}"
            )


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
    # Of one number the error is chance; its gradient is a sum of those that `check` holds.
    mask = AttentionMask(causal=True)
    inputs = make_inputs(100, 300, 3, 1, V1, torch.bfloat16, lam_shape=shape)
    each = [*inputs[:3], inputs[3].detach().expand(BATCH, 100, 3).contiguous().requires_grad_()]
    shared, found = run(kernels(mask), inputs)[-1], run(kernels(mask), each)[-1]
    torch.testing.assert_close(shared, found.sum_to_size(shape), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_bytes", [1, 200_000, 700_000])
def test_wide_values_in_little_memory(monkeypatch, num_bytes, causal):
    """Heads take turns, and bands of keys where one head is too much."""
    from diffmm.ops.diff_attention.triton import wide_backward

    monkeypatch.setattr(wide_backward, "SCRATCH_BYTES", num_bytes)
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
