"""Grouped differential attention against differential attention with copied noise heads."""

import pytest
import torch

from diffmm.ops import AttentionMask, diff_attention, grouped_diff_attention
from diffmm.ops.diff_attention.reference import reference as pair_reference
from diffmm.ops.grouped_diff_attention import paired

BATCH, NOISE, GROUPS, DIM = 2, 4, 2, 8


def make_masks(num_keys: int) -> dict[str, AttentionMask]:
    keys = torch.arange(num_keys)
    documents = torch.stack([keys // 3, keys // 5])
    padding = torch.stack([keys < num_keys - 2, keys >= 2])
    prefix = torch.tensor([0, min(4, num_keys)])
    return {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "causal window": AttentionMask(causal=True, window=3),
        "everything": AttentionMask(True, 4, prefix, documents, padding),
        "nothing": AttentionMask(key_padding=torch.zeros(BATCH, num_keys, dtype=torch.bool)),
    }


def make_inputs(num_queries, num_keys, num_signals, *, width=DIM, dtype=torch.float64):
    """Queries, keys, values and lambda that require gradients."""
    shapes = [
        (BATCH, num_queries, NOISE, num_signals + 1, DIM),
        (BATCH, num_keys, GROUPS, DIM),
        (BATCH, num_keys, GROUPS, width),
    ]
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs.append(torch.rand(BATCH, num_queries, NOISE * num_signals, dtype=wide))
    return [x.requires_grad_() for x in inputs]


def results(op, inputs):
    out = op(*inputs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def by_pairs(mask, **options):
    def op(q, k, v, lam):
        scale = DIM**-0.5
        return pair_reference(paired(q), k.unsqueeze(3), v, lam, mask=mask, scale=scale, **options)

    return op


@pytest.mark.parametrize("name", list(make_masks(6)))
@pytest.mark.parametrize("num_signals", [2, 3])
@pytest.mark.parametrize("lengths", [(9, 9), (3, 9), (1, 9)])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_equals_pairs_with_copied_noise_in_all_gradients(backend, lengths, num_signals, name):
    inputs = make_inputs(*lengths, num_signals, width=5)
    mask = make_masks(lengths[1])[name]
    found = results(lambda *x: grouped_diff_attention(*x, mask=mask, backend=backend), inputs)
    for ours, truth in zip(found, results(by_pairs(mask), inputs), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_one_signal_head_is_diff_attention_to_the_bit(backend):
    q, k, v, lam = make_inputs(7, 7, 1)
    mask = AttentionMask(causal=True)
    options = {"mask": mask, "backend": backend}
    found = results(lambda *x: grouped_diff_attention(*x, **options), [q, k, v, lam])
    truth = results(
        lambda q, k, v, lam: diff_attention(q, k.unsqueeze(3), v, lam, **options), [q, k, v, lam]
    )
    for ours, theirs in zip(found, truth, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_error_is_at_most_twice_that_of_plain_low_precision(name, dtype):
    inputs = make_inputs(33, 33, 3, dtype=dtype)
    mask = make_masks(33)[name]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth, low = results(by_pairs(mask), exact), results(by_pairs(mask, upcast=False), inputs)
    for backend in ("reference", "sdpa"):
        found = results(
            lambda *x, b=backend: grouped_diff_attention(*x, mask=mask, backend=b), inputs
        )
        assert found[0].dtype == dtype
        for ours, plain, true in zip(found, low, truth, strict=True):
            floor = 4 * torch.finfo(torch.float32).eps * true.abs().max() * true.numel() ** 0.5
            assert (ours - true).norm() <= 2 * (plain - true).norm() + floor


def test_lambda_broadcasts_and_stays_float32():
    q, k, v, _ = make_inputs(5, 5, 2, dtype=torch.bfloat16)
    ones, mask = torch.ones_like(v), AttentionMask(causal=True)
    for backend in ("reference", "sdpa"):
        out = grouped_diff_attention(q, k, ones, 0.998, mask=mask, backend=backend)
        expected = torch.full_like(out, 0.002).float()
        torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0)


def test_the_kernels_serve_it():
    """The arguments passed to Triton; the kernels have their own tests."""
    q, k, v, lam = make_inputs(5, 5, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="triton"):
        grouped_diff_attention(q, k, v, lam, mask=AttentionMask(), backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 5, 4, 1, 8)}, r"q must be \[B, N, J, R \+ 1, D\] with R at least 1"),
        ({"k": (2, 5, 2, 1, 8)}, r"k must be \[B, M, G, D\], got shape \(2, 5, 2, 1, 8\)"),
        (
            {"k": (2, 5, 3, 8), "v": (2, 5, 3, 8)},
            "number of key groups must divide the number of heads, got 3",
        ),
        ({"lam": (2, 5, 4)}, r"lam of shape \(2, 5, 4\) does not broadcast to .* = \(2, 5, 8\)"),
        ({"backend": "flash"}, "unknown backend 'flash'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"q": (2, 5, 4, 3, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8), "lam": (2, 5, 8)}
    backend = change.pop("backend", "auto")
    q, k, v, lam = (torch.randn(shape) for shape in {**shapes, **change}.values())
    with pytest.raises(ValueError, match=message):
        grouped_diff_attention(q, k, v, lam, mask=AttentionMask(), backend=backend)
