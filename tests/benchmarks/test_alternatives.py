"""Attentions of small twins: their equations, causality, decoding, and masks."""

import math

import pytest
import torch

from diffmm.analysis.attention_maps import attention_maps
from diffmm.analysis.measurements import measure
from diffmm.layers.attention import ATTENTIONS, SoftmaxAttention
from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.models.generation import generate
from diffmm.ops import AttentionMask

NAMES = ("clipped_softmax", "strided_sparse", "routed", "cosformer")
CAUSAL = AttentionMask(causal=True)
PADDING = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 5] * 2)
MASKS = {
    "causal": CAUSAL,
    "full": AttentionMask(),
    "window": AttentionMask(causal=True, window=3),
    "prefix": AttentionMask(causal=True, prefix_lengths=torch.tensor([2, 5])),
    "documents": AttentionMask(causal=True, document_ids=DOCUMENTS),
    "padding": AttentionMask(key_padding=PADDING),
    "causal padding": AttentionMask(causal=True, key_padding=PADDING),
}
ALL_MASKS = set(MASKS)
SERVED = {
    "clipped_softmax": ALL_MASKS,
    "strided_sparse": ALL_MASKS,
    "routed": {"causal", "full", "padding", "causal padding"},
    "cosformer": {"causal", "full", "padding", "causal padding"},
}


@pytest.fixture(autouse=True)
def registered(registered_attentions):
    """The attentions are registered for these tests alone."""
    from benchmarks.quality import alternatives

    alternatives.register()


def layer_of(name, **settings):
    """A layer whose patterns are smaller than nine tokens."""
    small = {
        "strided_sparse": {"stride": 3},
        "routed": {"block_size": 2, "num_blocks": 2},
        "cosformer": {"chunk_size": 4},
        "clipped_softmax": {"gamma": -0.05, "zeta": 1.02},
    }
    return ATTENTIONS[name](32, num_heads=4, num_kv_heads=2, **{**small[name], **settings})


def text_model(attention, depth=2, **settings):
    backbone = BackboneConfig(32, depth, 4, rope="1d", attention=attention, **settings)
    return TextModel(TextConfig(40, 64, backbone)).eval()


def plain_weights(layer, x):
    """Scores `[B, H, N, M]` and values `[B, H, M, E]` of a layer."""
    q, k, v = layer.project(x, None)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
    return q, k, v


def output(layer, weights, v):
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2))


def test_clipped_softmax_is_its_equation():
    layer, x = layer_of("clipped_softmax"), 9 * torch.randn(2, 9, 32)  # with weights near 1
    q, k, v = plain_weights(layer, x)
    map_ = (q @ k.mT / 8**0.5).softmax(-1)
    weights = (1.07 * map_ - 0.05).clip(0, 1)
    torch.testing.assert_close(layer(x, mask=AttentionMask()), output(layer, weights, v))
    assert (weights == 0).any()
    assert (weights == 1).any()


def test_unclipped_it_is_softmax_attention():
    layer = layer_of("clipped_softmax", gamma=0.0, zeta=1.0)
    softmax = SoftmaxAttention(32, num_heads=4, num_kv_heads=2)
    softmax.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 32)
    for mask in MASKS.values():
        torch.testing.assert_close(layer(x, mask=mask), softmax(x, mask=mask))


def test_strided_sparse_attends_to_near_keys_and_to_strides():
    layer, x = layer_of("strided_sparse"), torch.randn(2, 9, 32)
    q, k, v = plain_weights(layer, x)
    scores = (q @ k.mT / 8**0.5).masked_fill(~CAUSAL.to_bool(9, 9), -math.inf)
    for i in range(9):
        hidden = [j for j in range(i + 1) if j not in {i, i - 1, i - 2, i - 3, i - 6}]
        scores[:, :, i, hidden] = -math.inf
    torch.testing.assert_close(layer(x, mask=CAUSAL), output(layer, scores.softmax(-1), v))
    assert torch.isinf(scores[0, 0, 8]).sum() == 4


def test_routed_attention_finds_the_block_that_fits():
    """Query 8, in the last block, prefers block 1; query 4 has block 2 and the better of two."""
    layer = layer_of("routed")
    k = torch.zeros(1, 1, 9, 8)
    k[0, 0, 2:4, 0] = 1.0
    k[0, 0, 6:8, 0] = -1.0
    q = torch.zeros(1, 1, 9, 8)
    q[..., 0] = torch.tensor([1.0, 1, 1, 1, 1, 1, -1, -1, 1])
    chosen = layer.chosen(q, k, CAUSAL)[0, 0]
    seen = (chosen & CAUSAL.to_bool(9, 9)[0, 0]).int()
    assert seen[8].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1]
    assert seen[4].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert seen[1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert seen[6, 6] == 1
    assert seen[6, 2:4].sum() == 0
    full = layer.chosen(q, k, AttentionMask())[0, 0].int()
    assert full[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert full[6].tolist()[6:8] == [1, 1]


def test_padding_enters_no_mean_of_routed_attention():
    """Block 1 has one real key, which exceeds the mean of block 0, and block 3 has none."""
    k = torch.zeros(1, 1, 9, 8)
    k[..., 0] = torch.tensor([0.6, 0.6, -9.0, 1.0, 0.3, 0.3, 5.0, 5.0, 0.0])
    real = torch.tensor([[True, True, False, True, True, True, False, False, True]])
    mask = AttentionMask(causal=True, key_padding=real)
    for sign, best in ((1.0, [0, 0, 1, 1, 0, 0, 0, 0, 1]), (-1.0, [0, 0, 0, 0, 1, 1, 0, 0, 1])):
        chosen = layer_of("routed").chosen(torch.full_like(k, sign), k, mask)
        assert chosen[0, 0, 8].int().tolist() == best


@pytest.mark.parametrize("mask", sorted(SERVED["routed"]))
def test_routed_attention_with_all_blocks_is_softmax_attention(mask):
    layer = layer_of("routed", num_blocks=5)
    softmax = SoftmaxAttention(32, num_heads=4, num_kv_heads=2)
    softmax.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(layer(x, mask=MASKS[mask]), softmax(x, mask=MASKS[mask]))


@pytest.mark.parametrize("mask", sorted(SERVED["cosformer"]))
@pytest.mark.parametrize("reach", [None, 20])
def test_cosformer_is_its_quadratic_equation(mask, reach):
    layer, x = layer_of("cosformer", reach=reach), torch.randn(2, 9, 32)
    q, k, v = plain_weights(layer, x)
    place = torch.arange(9.0)
    weights = q.relu() @ k.relu().mT
    weights = weights * torch.cos(math.pi / 2 * (place[:, None] - place) / (reach or 9))
    weights = weights * MASKS[mask].to_bool(9, 9)
    expected = output(layer, weights / weights.sum(-1, keepdim=True).clamp(min=1e-6), v)
    torch.testing.assert_close(layer(x, mask=MASKS[mask]), expected, atol=1e-5, rtol=1e-4)


def test_cosformer_sums_in_float32_under_autocast():
    layer, x = layer_of("cosformer"), torch.randn(2, 9, 32)
    qkv = [each.detach().bfloat16() for each in layer.project(x, None)]
    plain = layer.attend(x, *qkv, CAUSAL)
    assert plain.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.attend(x, *qkv, CAUSAL), plain)


@pytest.mark.parametrize("name", NAMES)
def test_the_future_has_no_gradient(name):
    layer = layer_of(name)
    x = torch.randn(1, 9, 32, requires_grad=True)
    out = layer(x, mask=CAUSAL)
    for place in (0, 3, 7):
        (grad,) = torch.autograd.grad(out[0, place].square().sum(), x, retain_graph=True)
        assert not grad[0, place + 1 :].any()
        assert grad[0, place].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_past_does_not_depend_on_the_future(name):
    """Also where no gradient shows it, as in the choice of blocks."""
    layer = layer_of(name, **({"reach": 9} if name == "cosformer" else {}))
    x = torch.randn(1, 9, 32)
    other = torch.cat([x[:, :5], torch.randn(1, 4, 32)], dim=1)
    first, second = (layer(each, mask=CAUSAL)[:, :5] for each in (x, other))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_served_or_refused(name, mask):
    """Where a mask is served, keys that it hides from all queries have no gradient."""
    layer = layer_of(name)
    x = torch.randn(2, 9, 32, requires_grad=True)
    if mask not in SERVED[name]:
        with pytest.raises(ValueError, match="does not support masks with"):
            layer(x, mask=MASKS[mask])
        return
    for query in (1, 5):
        (grad,) = torch.autograd.grad(layer(x, mask=MASKS[mask])[:, query].square().sum(), x)
        hidden = ~MASKS[mask].to_bool(9, 9).expand(2, 1, 9, 9)[:, 0, query]
        hidden[:, query] = False  # the query itself
        assert not grad[hidden].any()


@pytest.mark.parametrize("name", NAMES)
def test_decoding_with_the_cache_equals_the_full_pass(name):
    """Token by token, and several at once after a prompt."""
    model, tokens = text_model(name), torch.randint(40, (2, 37))
    if name == "cosformer":
        for layer in model.backbone.attentions:
            layer.reach = 64
    with torch.no_grad():
        whole = model(tokens)
        for size in (1, 5):
            cache = model.new_cache(2)
            parts = [
                model(part, cache=cache)
                for part in (tokens[:, :20], *tokens[:, 20:].split(size, 1))
            ]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)


def test_decoding_that_would_differ_is_refused():
    tokens = torch.randint(40, (2, 9))
    with pytest.raises(ValueError, match="decodes with a fixed reach"):
        generate(text_model("cosformer"), tokens, max_new_tokens=3)
    longer = layer_of("cosformer", reach=8)
    with pytest.raises(ValueError, match="9 tokens are more than reach=8"):
        longer(torch.randn(1, 9, 32), mask=CAUSAL)


@pytest.mark.parametrize("name", ["strided_sparse", "routed", "cosformer"])
def test_decoding_with_padding_is_refused(name):
    """As in a CUDA graph of all steps, whose masks hide the keys that are not yet written."""
    tokens, real = torch.randint(40, (2, 9)), PADDING.flip(1)
    with pytest.raises(ValueError, match="does not decode with key_padding.*cuda_graph=False"):
        generate(text_model(name), tokens, max_new_tokens=2, key_padding=real)


@pytest.mark.parametrize("name", NAMES)
def test_models_of_every_kind_train_at_equal_parameters(name):
    model, softmax = text_model(name, qk_norm=True), text_model("softmax", qk_norm=True)
    count, wanted = (sum(p.numel() for p in each.parameters()) for each in (model, softmax))
    assert count == wanted
    model.train()(torch.randint(40, (2, 37))).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_an_analysis_leaves_out_the_maps_and_says_so(name):
    model, tokens = text_model(name), torch.randint(40, (2, 9))
    with pytest.raises(ValueError, match="not those of softmax"):
        attention_maps(model, tokens)
    batch = {"tokens": tokens, "targets": tokens}
    found = measure(model, [batch], spans=lambda batch: None)
    label = ATTENTIONS[name].label
    assert f"the weights of {label} attention are not those of softmax" in found.problems["maps"]
    assert found.gradients is not None


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("clipped_softmax", {"gamma": 0.1}, "gamma must be at most 0 and zeta at least 1, got 0.1"),
        ("clipped_softmax", {"zeta": 0.9}, "zeta at least 1, got -0.05 and 0.9"),
        ("strided_sparse", {"stride": 0}, "stride must be at least 1, got 0"),
        ("routed", {"block_size": 0}, "must be at least 1, got 0 and 2"),
        ("routed", {"num_blocks": 0}, "must be at least 1, got 2 and 0"),
        ("cosformer", {"reach": 0}, "must be at least 1, got 0 and 4"),
        ("cosformer", {"chunk_size": 0}, "must be at least 1, got None and 0"),
        ("cosformer", {"backend": "triton"}, "unknown backend 'triton'"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        layer_of(name, **settings)
