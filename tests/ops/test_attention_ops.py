"""The ops against independent float64 references, with every backend, mask and dtype."""

import itertools
import subprocess
import sys

import pytest
import torch

from diffmm.ops import AttentionMask, diff_attention, softmax_attention
from diffmm.ops.diff_attention.reference import reference

BATCH, HEADS, GROUPS, DIM = 2, 4, 2, 8


def make_masks(num_keys: int) -> dict[str, AttentionMask]:
    """One mask of every kind, and combinations; in some, rows have no visible keys."""
    keys = torch.arange(num_keys)
    documents = torch.stack([keys // 3, keys // 5])
    padding = torch.stack([keys < num_keys - 2, keys >= 2])
    prefix = torch.tensor([0, min(4, num_keys)])
    return {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(window=3),
        "causal window": AttentionMask(causal=True, window=3),
        "prefix": AttentionMask(causal=True, prefix_lengths=prefix),
        "documents": AttentionMask(document_ids=documents),
        "padding": AttentionMask(key_padding=padding),
        "causal padding": AttentionMask(causal=True, key_padding=padding),
        "everything": AttentionMask(
            causal=True,
            window=4,
            prefix_lengths=prefix,
            document_ids=documents,
            key_padding=padding,
        ),
        "nothing": AttentionMask(key_padding=torch.zeros(BATCH, num_keys, dtype=torch.bool)),
    }


MASK_NAMES = list(make_masks(6))


def make_inputs(
    num_queries=9, num_keys=9, num_components=2, width=2 * DIM, dtype=torch.float64, lam="map"
):
    """Queries, keys, values and lambda that require gradients."""
    shapes = [
        (BATCH, num_queries, HEADS, 2, DIM),
        (BATCH, num_keys, GROUPS, num_components, DIM),
        (BATCH, num_keys, GROUPS, width),
    ]
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs.append(torch.rand((BATCH, num_queries, HEADS) if lam == "map" else (), dtype=wide))
    return [x.requires_grad_() for x in inputs]


def by_hand(q, k, v, lam, mask):
    """Equation 1, one head and one row at a time."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    visible = mask.to_bool(num_queries, num_keys).expand(BATCH, 1, num_queries, num_keys)
    lam = lam.expand(BATCH, num_queries, HEADS)
    out = q.new_zeros(BATCH, num_queries, HEADS, v.shape[-1])
    for b, n, h in itertools.product(range(BATCH), range(num_queries), range(HEADS)):
        seen = visible[b, 0, n].nonzero().flatten()
        if len(seen) == 0:
            continue
        group = h // (HEADS // GROUPS)
        keys, values = k[b, seen, group], v[b, seen, group]
        maps = [(keys[:, c % k.shape[3]] @ q[b, n, h, c] / DIM**0.5).softmax(0) for c in (0, 1)]
        out[b, n, h] = (maps[0] - lam[b, n, h] * maps[1]) @ values
    return out


def results(op, inputs):
    """The output and all gradients for a fixed output gradient."""
    out = op(*inputs)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)
    return dict(
        zip(
            ("out", "q", "k", "v", "lam"),
            (out, *torch.autograd.grad(out, inputs, grad)),
            strict=True,
        )
    )


@pytest.mark.parametrize("name", MASK_NAMES)
@pytest.mark.parametrize(
    ("num_components", "width"), [(2, 2 * DIM), (1, DIM), (1, 2 * DIM), (2, 5)]
)
@pytest.mark.parametrize("lengths", [(9, 9), (3, 9), (1, 9)])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_equals_the_equation(backend, lengths, num_components, width, name):
    inputs = make_inputs(*lengths, num_components=num_components, width=width)
    mask = make_masks(lengths[1])[name]
    torch.testing.assert_close(
        diff_attention(*inputs, mask=mask, backend=backend), by_hand(*inputs, mask)
    )


@pytest.mark.parametrize("name", MASK_NAMES)
@pytest.mark.parametrize(("num_components", "width"), [(2, 2 * DIM), (1, DIM)])
@pytest.mark.parametrize("lengths", [(9, 9), (3, 9), (1, 9), (1, 1)])
@pytest.mark.parametrize("lam", ["map", "scalar"])
def test_backends_agree_in_all_gradients(lam, lengths, num_components, width, name):
    inputs = make_inputs(*lengths, num_components=num_components, width=width, lam=lam)
    mask = make_masks(lengths[1])[name]
    truth = results(lambda *x: diff_attention(*x, mask=mask, backend="reference"), inputs)
    found = results(lambda *x: diff_attention(*x, mask=mask, backend="sdpa"), inputs)
    for what in truth:
        torch.testing.assert_close(found[what], truth[what], msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
@pytest.mark.parametrize("num_components", [1, 2])
def test_no_samples_queries_or_keys(backend, empty, num_components):
    batch, N, M = 0 if empty == "batch" else 2, 5 * (empty != "queries"), 5 * (empty != "keys")
    q = torch.randn(batch, N, 4, 2, 8, requires_grad=True)
    k, v = torch.randn(batch, M, 2, num_components, 8), torch.randn(batch, M, 2, 16)
    mask = AttentionMask(causal=True)
    out = diff_attention(q, k, v, 0.8, mask=mask, backend=backend)
    assert out.equal(torch.zeros(batch, N, 4, 16))
    out.sum().backward()
    assert q.grad.equal(torch.zeros_like(q))


def test_more_queries_than_keys():
    inputs = make_inputs(5, 3)
    mask = AttentionMask(causal=True)
    for backend in ("reference", "sdpa"):
        found = results(lambda *x, b=backend: diff_attention(*x, mask=mask, backend=b), inputs)
        assert not found["out"][:, :2].any()
        assert not found["q"][:, :2].any()
        torch.testing.assert_close(found["out"], by_hand(*inputs, mask))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradients_by_finite_differences(backend):
    inputs = make_inputs(3, 4)
    mask = make_masks(4)["everything"]
    assert torch.autograd.gradcheck(
        lambda *x: diff_attention(*x, mask=mask, backend=backend), inputs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_error_is_at_most_twice_that_of_plain_low_precision(name, dtype):
    """In the norm of all errors and in that of the eight largest, because the rounding error of a
    single entry is random."""
    inputs = make_inputs(33, 33, dtype=dtype)
    mask = make_masks(33)[name]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    plain = {"mask": mask, "scale": DIM**-0.5, "upcast": False}
    truth = results(lambda *x: reference(*x, **plain), exact)
    low = results(lambda *x: reference(*x, **plain), inputs)
    for backend in ("reference", "sdpa"):
        found = results(lambda *x, b=backend: diff_attention(*x, mask=mask, backend=b), inputs)
        assert found["out"].dtype == dtype
        for what, true in truth.items():
            floor = 4 * torch.finfo(torch.float32).eps * true.abs().max()
            for most in (min(8, true.numel()), true.numel()):
                error, allowed = (
                    (x[what] - true).abs().flatten().topk(most).values.norm() for x in (found, low)
                )
                assert error <= 2 * allowed + floor * most**0.5, (
                    f"{backend} {what}, {most} largest: {error:.1e}, {allowed:.1e}"
                )


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_lam_zero_is_softmax_attention(backend):
    q, k, v, _ = make_inputs()
    mask = AttentionMask(causal=True)
    torch.testing.assert_close(
        diff_attention(q, k, v, 0.0, mask=mask, backend=backend),
        softmax_attention(q[..., 0, :], k[..., 0, :], v, mask=mask, backend=backend),
    )


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_equal_components_and_lam_one_cancel(backend):
    q, k, v, _ = make_inputs(num_components=1)
    q = q[..., :1, :].expand(-1, -1, -1, 2, -1)
    out = diff_attention(q, k, v, 1.0, mask=AttentionMask(), backend=backend)
    torch.testing.assert_close(out, torch.zeros_like(out), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lambda_is_not_rounded_to_half_precision(backend, dtype):
    """With values of one, the output is 1 - lam, which both backends compute accurately enough."""
    q, k = (torch.randn(1, 5, 2, 2, 16).to(dtype) for _ in range(2))
    v = torch.ones(1, 5, 2, 16, dtype=dtype)
    lam = torch.tensor(0.998, requires_grad=True)
    out = diff_attention(q, k, v, lam, mask=AttentionMask(causal=True), backend=backend)
    torch.testing.assert_close(out.float(), torch.full_like(out, 0.002).float(), rtol=0.01, atol=0)
    out.float().sum().backward()
    assert lam.grad.item() == pytest.approx(-out.numel())


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_future_has_no_gradient(backend):
    inputs = make_inputs()
    out = diff_attention(*inputs, mask=AttentionMask(causal=True), backend=backend)
    grad_k, grad_v = torch.autograd.grad(out[:, 4].sum(), inputs[1:3])
    assert not grad_k[:, 5:].any()
    assert not grad_v[:, 5:].any()
    assert grad_k[:, :5].any()
    assert grad_v[:, :5].any()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_rows_that_see_nothing_are_zero_and_spoil_nothing(backend):
    inputs = make_inputs()
    padding = torch.ones(BATCH, 9, dtype=torch.bool)
    padding[0, :4] = False
    mask = AttentionMask(causal=True, key_padding=padding)
    found = results(lambda *x: diff_attention(*x, mask=mask, backend=backend), inputs)
    assert not found["out"][0, :4].any()
    assert not found["q"][0, :4].any()
    assert not found["lam"][0, :4].any()
    assert not found["k"][0, :4].any()
    assert all(x.isfinite().all() for x in found.values())


def test_scale_is_of_the_head_dim_and_not_of_the_values():
    inputs = make_inputs(width=2 * DIM)
    mask = AttentionMask()
    torch.testing.assert_close(
        diff_attention(*inputs, mask=mask), diff_attention(*inputs, mask=mask, scale=DIM**-0.5)
    )
    assert not torch.allclose(
        diff_attention(*inputs, mask=mask), diff_attention(*inputs, mask=mask, scale=0.1)
    )


@pytest.mark.parametrize("name", ["causal", "everything"])
@pytest.mark.parametrize("num_components", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic, name, num_components):
    inputs = make_inputs(num_components=num_components)
    mask = make_masks(9)[name]

    def op(*x):
        return diff_attention(*x, mask=mask, backend="sdpa")

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found, truth = results(compiled, inputs), results(op, inputs)
    for what in truth:
        torch.testing.assert_close(found[what], truth[what])


def test_softmax_backends_agree():
    q, k, v, _ = make_inputs()
    q, k = q[..., 0, :], k[..., 0, :]
    for mask in make_masks(9).values():
        truth = softmax_attention(q, k, v, mask=mask, backend="reference")
        torch.testing.assert_close(softmax_attention(q, k, v, mask=mask, backend="sdpa"), truth)


def bad(**changes):
    """Arguments of `diff_attention`, with some replaced."""
    q, k, v, lam = make_inputs()
    return {"q": q, "k": k, "v": v, "lam": lam, "mask": AttentionMask()} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 9, 4, 8)}, r"q must be \[B, N, H, 2, D\], got shape \(2, 9, 4, 8\)"),
        ({"q": torch.zeros(2, 9, 4, 3, 8)}, r"q must be \[B, N, H, 2, D\].*\(2, 9, 4, 3, 8\)"),
        ({"k": torch.zeros(2, 9, 2, 3, 8)}, "C 1 or 2.*3, 8"),
        ({"v": torch.zeros(2, 9, 16)}, r"v must be \[B, M, G, E\], got shape \(2, 9, 16\)"),
        ({"v": torch.zeros(2, 8, 2, 16)}, r"must have the same batch size.*v \(2, 8, 2, 16\)"),
        ({"k": torch.zeros(2, 9, 2, 2, 6).double()}, "same head dimension D, got 8 and 6"),
        (
            {"k": torch.zeros(2, 9, 3, 2, 8), "v": torch.zeros(2, 9, 3, 16)},
            "3 groups and 4 heads",
        ),
        ({"v": torch.zeros(2, 9, 2, 16)}, "v is torch.float32 on cpu, but q is torch.float64"),
        ({"lam": torch.zeros(9, 3)}, r"lam of shape \(9, 3\) does not broadcast.*\(2, 9, 4\)"),
        ({"backend": "flash"}, r"unknown backend 'flash': choose one of \['auto', 'reference'"),
        (
            {"mask": None},
            "mask must be an AttentionMask, got None",
        ),
        (
            {"mask": torch.ones(9, 9, dtype=torch.bool)},
            "mask must be an AttentionMask, got a tensor of torch.bool",
        ),
        (
            {"mask": AttentionMask(key_padding=torch.ones(2, 8, dtype=torch.bool))},
            r"key_padding has shape \(2, 8\), but the keys need \(2, 9\)",
        ),
        (
            {"mask": AttentionMask(causal=True, prefix_lengths=torch.tensor([1]))},
            r"prefix_lengths has shape \(1,\), but the keys need \(2,\)",
        ),
    ],
)
def test_bad_calls_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        diff_attention(**bad(**changes))


def test_integer_queries_are_refused():
    integers = [x.detach().long() for x in make_inputs()]
    with pytest.raises(
        ValueError, match=r"q has dtype torch\.int64, but attention supports float32"
    ):
        diff_attention(*integers, mask=AttentionMask())


def test_softmax_refuses_differential_shapes():
    q, k, v, _ = make_inputs()
    with pytest.raises(ValueError, match=r"q and k must be \[B, N, H, D\]"):
        softmax_attention(q, k, v, mask=AttentionMask())


def test_importing_the_library_is_light():
    code = (
        "import sys, diffmm, diffmm.ops, diffmm.layers, diffmm.models\n"
        "heavy = {'triton', 'lightning', 'timm', 'torchaudio', 'torchvision', 'torchmetrics'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert loaded.stdout.split() == []
