"""The chunked loss against torch's own, in value and in all gradients."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from diffmm.batch import IGNORE_INDEX
from diffmm.ops import linear_cross_entropy

VOCAB = 37


def make_inputs(dtype=torch.float64, *, bias=True, missing=True):
    x = torch.randn(3, 11, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCAB, (3, 11))
    if missing:
        targets[0, 3] = targets[2] = IGNORE_INDEX
    return x, weight, torch.randn(VOCAB, dtype=dtype, requires_grad=bias) if bias else None, targets


def plain(x, weight, bias, targets, label_smoothing=0.0):
    logits = linear(x, weight, bias).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(
        logits, targets.flatten(), ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing,
        reduction="none",
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 4, 33, 1000])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_equals_the_plain_loss(rows, label_smoothing, bias, missing):
    x, weight, b, targets = make_inputs(bias=bias, missing=missing)
    inputs = [each for each in (x, weight, b) if each is not None]
    wanted = plain(x, weight, b, targets, label_smoothing)
    found = linear_cross_entropy(
        x, weight, targets, bias=b, label_smoothing=label_smoothing, max_logits=rows * VOCAB
    )
    torch.testing.assert_close(found.total, wanted.sum())
    torch.testing.assert_close(found.each.flatten(), wanted.detach())
    assert not found.each.requires_grad
    for f, w in zip(
        torch.autograd.grad(0.3 * found.total, inputs),
        torch.autograd.grad(0.3 * wanted.sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(f, w)


def test_without_gradients_and_without_targets():
    x, weight, bias, targets = make_inputs()
    with torch.no_grad():
        found = linear_cross_entropy(x, weight, targets, bias=bias, max_logits=3 * VOCAB)
    torch.testing.assert_close(found.each.flatten(), plain(x, weight, bias, targets).detach())
    found = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE_INDEX))
    assert found.total == 0
    assert not any(g.any() for g in torch.autograd.grad(found.total, (x, weight)))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_gradients_that_are_needed(frozen):
    x, weight, _, targets = make_inputs(bias=False)
    (x if frozen == "x" else weight).requires_grad_(False)
    trained = weight if frozen == "x" else x
    (found,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets).total, trained)
    (wanted,) = torch.autograd.grad(plain(x, weight, None, targets).sum(), trained)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("compile", [False, True])
def test_autocast_is_as_exact_as_the_plain_loss(compile):
    """Logits are in bfloat16, everything else in float32."""
    function = torch.compile(linear_cross_entropy, fullgraph=True) if compile else (
        linear_cross_entropy
    )  # fmt: skip
    x, weight, _, targets = make_inputs(torch.float32, bias=False)
    truth = torch.autograd.grad(plain(x, weight, None, targets).sum(), (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = plain(x, weight, None, targets).sum()
        ours = function(x, weight, targets, max_logits=9 * VOCAB).total
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    for f, w, t in zip(
        torch.autograd.grad(ours, (x, weight)),
        torch.autograd.grad(theirs, (x, weight)),
        truth,
        strict=True,
    ):
        assert f.dtype == torch.float32
        assert (f - t).norm() <= 1.5 * (w - t).norm()


def test_logits_are_never_whole(monkeypatch):
    sizes = []
    original = torch.nn.functional.linear

    def watched(*args):
        logits = original(*args)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    x, weight, _, targets = make_inputs(bias=False)
    linear_cross_entropy(x, weight, targets, max_logits=5 * VOCAB).total.backward()
    assert max(sizes) == 5 * VOCAB
    assert sum(sizes) == 33 * VOCAB  # each once


def test_refusals():
    x, weight, _, targets = make_inputs(bias=False)
    with pytest.raises(ValueError, match=r"got \(3, 11, 8\), \(37, 8\) and \(2, 11\)"):
        linear_cross_entropy(x, weight, targets[:2])
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.0"):
        linear_cross_entropy(x, weight, targets, label_smoothing=1.0)
    with pytest.raises(ValueError, match="max_logits must be at least 1, got 0"):
        linear_cross_entropy(x, weight, targets, max_logits=0)
    factor = torch.ones((), dtype=x.dtype, requires_grad=True)
    total = linear_cross_entropy(x, weight, targets).total * factor
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        gradient.sum().backward()
