"""Options of the backbone that other implementations' models need: windows, softcaps, post-norms,
rope scaling, attention scale, kinds of norms and activations."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, gelu

from diffmm.analysis.attention_maps import attention_maps
from diffmm.layers import (
    DiffAttentionV1,
    PolyNorm,
    PolyNormGLU,
    RopeScaling,
    RotaryEmbedding,
    SoftmaxAttention,
    TanhGEGLU,
    TanhGELU,
    ZeroCenteredRMSNorm,
)
from diffmm.layers.attention import ATTENTIONS
from diffmm.models import Backbone, BackboneConfig, TextConfig, TextModel
from diffmm.models.description import build, describe
from diffmm.models.generation import generate
from diffmm.models.weights import load_model, load_weights, save_model
from diffmm.ops import AttentionMask, softmax_attention

KINDS = tuple(ATTENTIONS)


def config(**changes):
    settings = {"dim": 32, "depth": 3, "num_heads": 4, "num_kv_heads": 2, "rope": "1d"}
    if changes.get("attention") == "diff_grouped":
        settings["signal_per_noise"] = 2
    return BackboneConfig(**settings | changes)


def text_model(**changes):
    names = ("embedding_scale", "logit_softcap")
    own = {name: changes.pop(name) for name in names if name in changes}
    torch.manual_seed(0)
    backbone = config(init_std=0.2, **changes)
    return TextModel(TextConfig(vocab_size=40, max_length=32, backbone=backbone, **own)).eval()


def test_every_option_is_off_by_default_and_may_be_absent_in_old_descriptions():
    model = text_model()
    description = describe(model)
    new = ("norm_eps", "post_norm", "rope_scaling", "window", "full_attention_layers",
           "attention_scale", "attention_softcap", "headwise_norm_eps", "lambda_layer_offset",
           "heads_per_noise")  # fmt: skip
    for name in new:
        del description["config"]["backbone"][name]
    for name in ("embedding_scale", "logit_softcap"):
        del description["config"][name]
    old = build(description)
    assert old.config == model.config
    names = [name for name in old.state_dict() if ".blocks.0." in name]
    lambdas = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    assert {name.removeprefix("backbone.blocks.0.") for name in names} == {
        *(f"attention.{part}_proj.weight" for part in ("q", "k", "v", "out")),
        *(f"feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"attention.{name}" for name in lambdas),
        "attention.norm.weight", "attention_norm.weight", "feed_forward_norm.weight",
    }  # fmt: skip


MASKS = {
    "causal": {},
    "smaller window": {"window": 2},
    "larger window": {"window": 9},
    "prefix": {"prefix_lengths": torch.tensor([2, 5])},
    "documents": {"document_ids": torch.arange(9).expand(2, -1) // 4},
    "padding": {"key_padding": torch.arange(9) >= torch.tensor([[0], [3]])},
}


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("kind", MASKS)
def test_a_window_is_that_of_the_mask_in_every_block_that_has_one(attention, kind):
    x = torch.randn(2, 9, 32)
    mask = AttentionMask(causal=True, **MASKS[kind])
    plain = Backbone(config(attention=attention, depth=1))
    windowed = Backbone(config(attention=attention, depth=1, window=3))
    windowed.load_state_dict(plain.state_dict())
    window = min(3, mask.window or 3)
    narrow = AttentionMask(causal=True, **MASKS[kind] | {"window": window})
    torch.testing.assert_close(windowed(x, mask=mask), plain(x, mask=narrow))
    full = Backbone(config(attention=attention, depth=1, window=3, full_attention_layers=(0,)))
    full.load_state_dict(plain.state_dict())
    torch.testing.assert_close(full(x, mask=mask), plain(x, mask=mask))


def test_a_bidirectional_window_is_symmetric():
    x = torch.randn(1, 9, 32, requires_grad=True)
    Backbone(config(depth=1, window=3))(x, mask=AttentionMask())[0, 4].sum().backward()
    assert x.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


def test_a_pattern_of_windows_reaches_as_far_as_its_blocks():
    def reach(**changes):
        x = torch.randn(1, 12, 32, requires_grad=True)
        Backbone(config(**changes))(x, mask=AttentionMask(causal=True))[0, -1].sum().backward()
        return 11 - x.grad[0].abs().sum(-1).nonzero()[0].item()

    assert reach(window=3) == 6  # two tokens back per block
    assert reach(window=3, full_attention_layers=(1,)) == 11


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("options", [{"window": 3}, {"window": 3, "full_attention_layers": (0, 2)}])
def test_generation_obeys_windows(attention, options):
    model = text_model(attention=attention, **options)
    tokens = torch.randint(0, 40, (2, 8))
    found = generate(model, tokens, max_new_tokens=9, temperature=0)
    ids = tokens
    for _ in range(9):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids[:, 8:])
    free = text_model(attention=attention)
    assert not torch.equal(generate(free, tokens, max_new_tokens=9, temperature=0), found)
    # A prompt that is padded on the left is continued as if it were alone.
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], dim=1)
    real = torch.arange(12).expand(2, -1) >= 4
    again = generate(model, padded, max_new_tokens=9, temperature=0, key_padding=real)
    assert torch.equal(again, found)


@pytest.mark.parametrize("attention", KINDS)
def test_steps_with_frozen_shapes_obey_windows(attention):
    model = text_model(attention=attention, window=3, full_attention_layers=(1,))
    tokens = torch.randint(0, 40, (2, 11))
    expected = model(tokens)[:, 6:]
    cache = model.new_cache(2, 16)
    model(tokens[:, :6], cache=cache)
    cache.freeze_shapes()
    found = []
    for step in range(6, 11):
        mask = AttentionMask(causal=True, num_keys=torch.tensor(step + 1))
        positions = torch.tensor([step])
        found.append(model(tokens[:, step, None], mask=mask, positions=positions, cache=cache))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


def test_a_compiled_model_with_windows_and_a_scaled_rope_gives_the_same():
    scaling = RopeScaling("yarn", 4.0, original_length=8)
    model = text_model(window=3, full_attention_layers=(0,), rope_scaling=scaling, depth=2)
    tokens = torch.randint(0, 40, (2, 9))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_attention_maps_have_the_window_and_the_softcap():
    model = text_model(attention="softmax", window=3, attention_softcap=0.5, depth=1)
    tokens = torch.randint(0, 40, (1, 7))
    (found,) = attention_maps(model, tokens)
    distance = torch.arange(7)[:, None] - torch.arange(7)
    inside = (distance >= 0) & (distance < 3)
    assert torch.equal(found.combined[0, 0] > 0, inside)
    # Logits in (-0.5, 0.5) differ by less than 1.
    ratio = found.combined[0, :, 6, 4:].amax(-1) / found.combined[0, :, 6, 4:].amin(-1)
    assert ratio.max() < math.e
    layer = model.backbone.blocks[0].attention
    x = model.backbone.blocks[0].attention_norm(model.embedding(tokens))
    q, k, v = layer.project(x, model.backbone.rope(torch.arange(7)))
    heads = layer.attend(x, q, k, v, AttentionMask(causal=True, window=3))
    values = v[0].transpose(0, 1).repeat_interleave(2, dim=0)
    torch.testing.assert_close((found.combined[0] @ values).transpose(0, 1), heads[0])


def test_a_softcap_bounds_logits_and_needs_the_reference():
    q, k, v = (torch.randn(2, 5, 3, 8) for _ in "qkv")
    mask = AttentionMask(causal=True)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * 0.7
    scores = 2.0 * (scores / 2.0).tanh()
    weights = scores.masked_fill(~mask.to_bool(5, 5), -math.inf).softmax(-1)
    expected = (weights @ v.transpose(1, 2)).transpose(1, 2)
    for backend in ("auto", "reference"):
        found = softmax_attention(q, k, v, mask=mask, scale=0.7, softcap=2.0, backend=backend)
        torch.testing.assert_close(found, expected)
    for backend in ("sdpa", "triton"):
        with pytest.raises(ValueError, match=f"'{backend}' does not support softcap=2.0: use"):
            softmax_attention(q, k, v, mask=mask, softcap=2.0, backend=backend)
    with pytest.raises(ValueError, match=r"softcap must be positive, got 0\.0"):
        softmax_attention(q, k, v, mask=mask, softcap=0.0)


@pytest.mark.parametrize("attention", KINDS)
def test_an_attention_scale_replaces_that_of_the_head_dimension(attention):
    x = torch.randn(1, 6, 32)
    mask = AttentionMask(causal=True)
    plain = Backbone(config(attention=attention, depth=1, rope="none"))
    scaled = Backbone(config(attention=attention, depth=1, rope="none", attention_scale=0.5))
    weights = plain.state_dict()
    scaled.load_state_dict(weights)
    name = "blocks.0.attention.q_proj.weight"
    plain.load_state_dict(weights | {name: weights[name] * (0.5 * 8**0.5)})
    torch.testing.assert_close(scaled(x, mask=mask), plain(x, mask=mask))


def test_post_norms_are_in_the_branches():
    backbone = Backbone(config(post_norm=True, depth=1))
    block, x = backbone.blocks[0], torch.randn(2, 5, 32)
    mask, rope = AttentionMask(causal=True), backbone.rope(torch.arange(5))
    for branch in (block.attention_branch, block.feed_forward_branch):
        torch.nn.init.uniform_(branch.norm.weight)
    attended = block.attention(block.attention_norm(x), mask=mask, rope=rope)
    y = x + block.attention_branch.norm(attended)
    y = y + block.feed_forward_branch.norm(block.feed_forward(block.feed_forward_norm(y)))
    torch.testing.assert_close(block(x, mask=mask, rope=rope), y)
    plain, own = Backbone(config(depth=1)).state_dict(), backbone.state_dict()
    extra = {f"blocks.0.{part}_branch.norm.weight" for part in ("attention", "feed_forward")}
    assert own.keys() - plain.keys() == extra


def test_queries_and_keys_may_have_a_layer_norm():
    attention = SoftmaxAttention(32, num_heads=4, qk_norm="layernorm", norm_eps=1e-3)
    x = torch.randn(2, 5, 32) + 3.0
    q, k, _ = attention.project(x, None)
    for found, norm in ((q, attention.q_norm), (k, attention.k_norm)):
        assert isinstance(norm, torch.nn.LayerNorm)
        assert norm.eps == 1e-3
        assert found.mean(-1).abs().max() < 1e-5


def test_a_zero_centered_norm_starts_as_a_plain_one():
    norm, x = ZeroCenteredRMSNorm(8, eps=1e-3), torch.randn(3, 8)
    assert not norm.weight.any()
    expected = torch.nn.functional.rms_norm(x, (8,), eps=1e-3)
    torch.testing.assert_close(norm(x), expected)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), expected * (1 + norm.weight))
    norm.reset_parameters()
    assert not norm.weight.any()


def test_tanh_activations():
    x = torch.randn(2, 5, 16)
    layer = TanhGELU(16, 24)
    expected = layer.down_proj(gelu(layer.up_proj(x), approximate="tanh"))
    torch.testing.assert_close(layer(x), expected)
    gated = TanhGEGLU(16, 24)
    gate = gelu(gated.gate_proj(x), approximate="tanh")
    torch.testing.assert_close(gated(x), gated.down_proj(gate * gated.up_proj(x)))
    for name, kind in (("gelu_tanh", TanhGELU), ("geglu_tanh", TanhGEGLU)):
        backbone = Backbone(config(feed_forward=name, depth=1))
        assert type(backbone.blocks[0].feed_forward) is kind


def test_embeddings_are_scaled_and_logits_capped_in_every_path():
    plain = text_model()
    model = text_model(embedding_scale=3.0, logit_softcap=0.8)
    tokens = torch.randint(0, 40, (2, 9))
    x = plain.backbone(3.0 * plain.embedding(tokens), mask=AttentionMask(causal=True))
    expected = 0.8 * (plain.head(x) / 0.8).tanh()
    found = model(tokens)
    torch.testing.assert_close(found, expected)
    targets = torch.randint(0, 40, (2, 9))
    targets[0, 2] = -100
    losses = model(tokens, targets=targets)
    whole = cross_entropy(found.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(losses.total, whole)
    # Samples are of capped logits: nearly uniform with a tiny cap, nearly constant without.
    prompts = tokens[:1].expand(500, -1)
    for cap, expected in ((1e-3, 40), (None, 5)):
        samples = generate(
            text_model(logit_softcap=cap), prompts, max_new_tokens=2, temperature=0.05
        )
        for step in samples.T:
            found = step.unique().numel()
            assert found == expected if cap else found <= expected


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 2.0),
        RopeScaling("llama3", 4.0, original_length=64),
        RopeScaling("yarn", 4.0, original_length=64),
    ],
    ids=lambda scaling: scaling.kind,
)
def test_scaling_changes_slow_rotations_alone(scaling):
    plain, scaled = RotaryEmbedding(64), RotaryEmbedding(64, scaling=scaling)
    ratio = plain.frequencies.value / scaled.frequencies.value
    assert ratio[-1].item() == pytest.approx(scaling.factor)
    assert ratio[0].item() == pytest.approx(2.0 if scaling.kind == "linear" else 1.0)
    assert (ratio.diff() > -1e-5).all()
    cos, sin = scaled(torch.tensor([5]))
    size = (cos.square() + sin.square()).sqrt()
    factor = 0.1 * math.log(4.0) + 1.0 if scaling.kind == "yarn" else 1.0
    torch.testing.assert_close(size, torch.full_like(size, factor))


def test_a_file_keeps_all_options(tmp_path):
    scaling = RopeScaling("llama3", 4.0, original_length=8, low_frequency_factor=0.5)
    model = text_model(
        attention="softmax", norm="zero_centered_rmsnorm", norm_eps=1e-4, post_norm=True,
        rope_scaling=scaling, window=4, full_attention_layers=(0, 2), attention_scale=0.3,
        attention_softcap=5.0, qk_norm="layernorm", feed_forward="geglu_tanh",
        embedding_scale=2.0, logit_softcap=4.0,
    )  # fmt: skip
    again = load_model(save_model(model, tmp_path))
    assert again.config == model.config
    tokens = torch.randint(0, 40, (2, 9))
    assert torch.equal(again(tokens), model(tokens))


def test_weights_of_another_norm_or_activation_are_refused(tmp_path):
    file = save_model(text_model(attention="softmax"), tmp_path)
    for changes, message in (
        ({"norm": "zero_centered_rmsnorm"}, "norm 'rmsnorm', needed 'zero_centered_rmsnorm'"),
        ({"feed_forward": "geglu_tanh"}, "feed_forward 'swiglu', needed 'geglu_tanh'"),
        ({"attention_scale": 0.5}, "attention_scale None, needed 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights(text_model(attention="softmax", **changes), file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, r"window must be at least 1 \(the token itself\), got 0"),
        ({"full_attention_layers": (0,)}, r"full_attention_layers=\(0,\) needs a window"),
        (
            {"window": 2, "full_attention_layers": (3,)},
            r"full_attention_layers must be different indices below depth=3, got \(3,\)",
        ),
        ({"window": 2, "full_attention_layers": (1, 1)}, r"different indices .* got \(1, 1\)"),
        ({"attention_scale": -1.0}, r"attention_scale must be positive, got -1\.0"),
        ({"attention_softcap": 2.0}, "attention_softcap=2.0 is not used by attention 'diff_v1'"),
        (
            {"attention": "softmax", "attention_softcap": 0.0},
            r"attention_softcap must be positive, got 0\.0",
        ),
        (
            {"attention": "softmax", "attention_softcap": 2.0, "backend": "sdpa"},
            "backend 'sdpa' does not support attention_softcap=2.0: use 'auto' or 'reference'",
        ),
        (
            {"attention": "softmax", "cosine_logits": True, "attention_scale": 1.0},
            "cosine_logits=True has a learned scale per head: remove attention_scale",
        ),
        ({"rope_base": 0.0}, r"rope_base must be positive, got 0\.0"),
        ({"qk_norm": "batchnorm"}, "qk_norm must be one of False, True, 'layernorm', got 'batchn"),
        (
            {"rope": "none", "rope_scaling": RopeScaling("linear", 2.0)},
            "rope_scaling needs rope='1d', got rope='none'",
        ),
        (
            {"rope": "2d", "rope_scaling": RopeScaling("linear", 2.0)},
            "rope_scaling is for positions of one axis, got 2 axes",
        ),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dynamic"}, "kind must be one of 'linear', 'llama3', 'yarn', got 'dynamic'"),
        ({"factor": 0.0}, r"factor must be positive, got 0\.0"),
        ({"original_length": 8}, "original_length is for kinds 'llama3' and 'yarn'"),
        ({"kind": "yarn"}, "which need it, got None for 'yarn'"),
        ({"kind": "yarn", "original_length": 0}, "original_length must be at least 1, got 0"),
        (
            {"kind": "llama3", "original_length": 8, "low_frequency_factor": 4.0},
            r"below high_frequency_factor, got 4\.0 and 4\.0",
        ),
        ({"kind": "yarn", "original_length": 8, "beta_fast": 0.5}, r"got 1\.0 and 0\.5"),
        ({"beta_fast": 64.0}, r"beta_fast=64\.0 is only used by kind 'yarn'"),
        (
            {"kind": "yarn", "original_length": 8, "high_frequency_factor": 5.0},
            r"high_frequency_factor=5\.0 is only used by kind 'llama3'",
        ),
        (
            {"kind": "yarn", "original_length": 8, "attention_factor": -1.0},
            r"attention_factor must be positive, got -1\.0",
        ),
    ],
)
def test_bad_scalings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**{"kind": "linear", "factor": 2.0} | fields)


@pytest.mark.parametrize("name", ["embedding_scale", "logit_softcap"])
def test_factors_of_text_models_are_positive(name):
    with pytest.raises(ValueError, match=rf"{name} must be positive, got 0\.0"):
        text_model(**{name: 0.0})


def test_heads_may_share_a_second_query():
    attention = DiffAttentionV1(32, num_heads=8, num_kv_heads=4, heads_per_noise=2)
    whole = DiffAttentionV1(32, num_heads=8, num_kv_heads=4)
    weights = attention.state_dict()
    assert weights["q_proj.weight"].shape == (6 * 4, 32)
    # Signal, signal, noise: a query of its own for each head, which is equal in both.
    rows = weights["q_proj.weight"].unflatten(0, (2, 3, 4))
    repeated = torch.stack([rows[:, :2], rows[:, 2:].expand(-1, 2, -1, -1)], dim=2)
    whole.load_state_dict(weights | {"q_proj.weight": repeated.flatten(0, 3)})
    x, mask = torch.randn(2, 7, 32), AttentionMask(causal=True)
    torch.testing.assert_close(attention(x, mask=mask), whole(x, mask=mask))


def test_an_offset_moves_the_schedule_of_lambda():
    plain = Backbone(config(attention="diff_v1")).attentions
    moved = Backbone(config(attention="diff_v1", lambda_layer_offset=1)).attentions
    assert [a.lambda_init for a in moved[:2]] == [a.lambda_init for a in plain[1:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads_per_noise": 0}, "heads_per_noise must be at least 1, .* got 0"),
        ({"heads_per_noise": 2, "share": "q"}, "and 1 if share='q', got 2"),
        (
            {"heads_per_noise": 2, "num_kv_heads": 4},
            "does not divide 2 differential heads in 2 groups",
        ),
        ({"heads_per_noise": 3}, "heads_per_noise=3 heads share a query within a key group"),
        (
            {"lambda_layer_offset": -1, "lambda_init": 0.5},
            "lambda_layer_offset=-1 has no effect with a constant lambda_init=0.5: remove one",
        ),
        (
            {"attention": "softmax", "heads_per_noise": 2},
            "heads_per_noise=2 is not used by attention 'softmax', only by diff_v1",
        ),
    ],
)
def test_bad_options_of_v1_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**{"attention": "diff_v1"} | changes)


def test_polynorm_is_a_polynomial_of_normalized_powers():
    layer = PolyNorm(eps=1e-3)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 5)
    terms = [torch.nn.functional.rms_norm(x**power, (5,), eps=1e-3) for power in (3, 2, 1)]
    weights = layer.weight.unbind()
    expected = sum(w * t for w, t in zip(weights, terms, strict=True)) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), sum(terms) / 3)
    gated = PolyNormGLU(16, 24)
    y = torch.randn(2, 16)
    gate = gated.activation(gated.gate_proj(y))
    torch.testing.assert_close(gated(y), gated.down_proj(gate * gated.up_proj(y)))
    assert "activation" not in gated.split  # tensor parallelism refuses it
