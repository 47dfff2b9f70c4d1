"""The backbone and its configuration."""

from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from torch.utils._pytree import tree_leaves

from diffmm.layers import DiffAttentionV1
from diffmm.layers.norm import NORMS
from diffmm.models import Backbone, BackboneConfig
from diffmm.ops import AttentionMask

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")
CAUSAL = AttentionMask(causal=True)

# Warnings of torch for forward-mode derivatives of its own operators.
TORCH_SCRIPTS = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def config(**changes) -> BackboneConfig:
    return BackboneConfig(**{"dim": 32, "depth": 3, "num_heads": 4, "rope": "1d"} | changes)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_prefill_and_steps_equal_one_forward(attention):
    backbone = Backbone(config(attention=attention, num_kv_heads=2))
    x = torch.randn(2, 9, 32)
    cache = backbone.new_cache(2, 9)
    pieces = [backbone(piece, mask=CAUSAL, cache=cache) for piece in x.split([4, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), backbone(x, mask=CAUSAL))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "change",
    [
        lambda blocks: blocks.append(deepcopy(blocks[1])),
        lambda blocks: blocks.append(blocks[0]),
        lambda blocks: blocks.__delitem__(0),
        lambda blocks: blocks.insert(0, blocks.pop(2)),
        lambda blocks: blocks.__setitem__(1, config(num_kv_heads=4).make_block(1)),
    ],
    ids=["copied", "shared", "dropped", "moved", "of another shape"],
)
def test_the_cache_is_right_whatever_was_done_to_the_blocks(attention, change):
    backbone = Backbone(config(attention=attention, num_kv_heads=2))
    change(backbone.blocks)
    x, cache = torch.randn(2, 6, 32), backbone.new_cache(2, 6)
    pieces = [backbone(piece, mask=CAUSAL, cache=cache) for piece in x.split([3, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), backbone(x, mask=CAUSAL))


def test_a_cache_of_another_model_is_refused():
    backbone = Backbone(config())
    cache = backbone.new_cache(1, 6)
    del backbone.blocks[2]
    with pytest.raises(ValueError, match="the cache has 3 layers, but the model has 2: create"):
        backbone(torch.randn(1, 2, 32), mask=CAUSAL, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_activation_checkpointing_changes_no_gradient(attention):
    backbone = Backbone(config(attention=attention))
    x = torch.randn(2, 9, 32)
    found = []
    for backbone.activation_checkpointing in (False, True):
        backbone.zero_grad()
        backbone(x, mask=CAUSAL).square().sum().backward()
        found.append([p.grad.clone() for p in backbone.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_intermediates_are_the_blocks_outputs():
    backbone = Backbone(config())
    x = torch.randn(1, 5, 32)
    out, kept = backbone(x, indices=(0, 2), mask=CAUSAL)
    assert len(kept) == 2
    torch.testing.assert_close(backbone.norm(kept[1]), out)
    torch.testing.assert_close(
        kept[0], backbone.blocks[0](x, mask=CAUSAL, rope=backbone.rope(torch.arange(5)))
    )


def test_layer_index_survives_a_dropped_layer():
    backbone = Backbone(config(attention="diff_v1"))
    starts = [block.attention.lambda_init for block in backbone.blocks]
    del backbone.blocks[1]
    assert [block.attention.lambda_init for block in backbone.blocks] == [starts[0], starts[2]]
    assert starts[0] < starts[1] < starts[2]


def test_drop_path_skips_whole_samples_in_training_alone():
    backbone = Backbone(config(drop_path=0.5))
    rates = [block.attention_branch.drop_path for block in backbone.blocks]
    assert rates == [0.0, 0.25, 0.5]
    branch = backbone.blocks[2].attention_branch
    x = torch.ones(1000, 2, 3)
    kept = branch(x).flatten(1)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert (kept == kept[:, :1]).all()
    assert 400 < (kept[:, 0] > 0).sum() < 600
    torch.testing.assert_close(branch.eval()(x), x)


def test_layer_scale_starts_where_it_is_told():
    backbone = Backbone(config(layer_scale=0.1))
    scales = [p for name, p in backbone.named_parameters() if name.endswith("branch.scale")]
    assert len(scales) == 6
    assert all((scale == 0.1).all() for scale in scales)


def test_residual_projections_start_smaller():
    backbone = Backbone(config(dim=256, depth=8))
    block = backbone.blocks[0]
    assert block.attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attention.out_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert block.feed_forward.down_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)


def test_weights_start_as_large_as_they_are_told():
    backbone = Backbone(config(dim=256, init_std=0.1))
    attention, feed_forward = backbone.blocks[1].attention, backbone.blocks[1].feed_forward
    for projection in (attention.q_proj, attention.v_proj, feed_forward.up_proj):
        assert projection.weight.std().item() == pytest.approx(0.1, rel=0.05)
    for projection in (attention.out_proj, feed_forward.down_proj):
        assert projection.weight.std().item() == pytest.approx(0.1 / 6**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("dim", "init_std", "size"), [(64, 0.02, 0.16), (64, 0.2, 1.0), (512, 0.02, 1.0)]
)
def test_heads_of_v1_start_no_larger_than_values(dim, init_std, size):
    backbone = Backbone(config(dim=dim, attention="diff_v1", init_std=init_std))
    x = torch.randn(2, 50, dim)
    for block in backbone.blocks:
        attention = block.attention
        q, k, v = attention.project(x, None)
        heads = attention.finish(attention.attend(x, q, k, v, AttentionMask()))
        sizes = heads.square().mean(-1).sqrt() / (1.0 - attention.lambda_init)
        # The eps of the norm makes them slightly smaller.
        assert 0.8 * size < sizes.mean() <= size * 1.001
    # Without the norm, or in the layer alone, nothing is changed.
    Backbone(config(attention="diff_v1", headwise_norm=False))
    assert (DiffAttentionV1(dim, num_heads=4).norm.weight == 1.0).all()


@pytest.mark.parametrize("feed_forward", ["swiglu", "gelu"])
@pytest.mark.parametrize(("dim", "num_heads"), [(64, 4), (192, 6), (512, 8), (768, 12), (2560, 20)])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_twins_have_equal_parameters(feed_forward, dim, num_heads, num_kv_heads, bias):
    counts = {}
    for attention in ATTENTIONS:
        with torch.device("meta"):
            backbone = Backbone(
                config(
                    dim=dim,
                    depth=2,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    attention=attention,
                    feed_forward=feed_forward,
                    qkv_bias=bias,
                    feed_forward_bias=bias,
                )
            )
        counts[attention] = sum(p.numel() for p in backbone.parameters())
    for attention in ATTENTIONS[1:]:
        assert counts[attention] == pytest.approx(counts["softmax"], rel=0.005), counts


def test_a_given_width_is_obeyed():
    for attention in ATTENTIONS:
        block = Backbone(config(attention=attention, feed_forward_width=50)).blocks[0]
        assert block.feed_forward.up_proj.out_features == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"depth": -1}, "depth must be at least 1, got -1"),
        ({"num_heads": 5}, "num_heads must divide dim, got 5 heads for dim 32"),
        ({"num_heads": 1, "attention": "diff_v1"}, "num_heads must be even, got 1"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"attention": "diff_v3"}, "attention must be one of .* got 'diff_v3'; did you mean"),
        ({"norm": "batchnorm"}, "norm must be one of 'rmsnorm', .*, 'layernorm', got 'batchnorm'"),
        ({"feed_forward": "relu"}, "feed_forward must be one of 'swiglu', 'gelu', .* got 'relu'"),
        ({"window": 2.5}, "window must be an integer, the number of tokens, got 2.5"),
        ({"rope": "4d"}, "rope must be one of .* got '4d'"),
        ({"rope": "3d"}, "over 3 axes needs a head_dim that is a multiple of 6"),
        ({"rope": "2d", "head_dim": 6}, "a multiple of 4, got 6"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"init_std": 0.0}, "init_std must be positive, got 0.0"),
        ({"init_std": float("nan")}, "init_std must be .*, got nan"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
        (
            {"attention": "softmax", "share": "q"},
            "share='q' is not used by attention 'softmax', only by diff_v1",
        ),
        (
            {"attention": "diff_v2", "headwise_norm": False},
            "headwise_norm=False is not used by attention 'diff_v2'",
        ),
        (
            {"attention": "diff_v1", "cosine_logits": True},
            "cosine_logits=True is not used by attention 'diff_v1', only by softmax",
        ),
        ({"attention": "softmax", "combine": "add"}, "only by diff_v1 and diff_v2"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_two_axes_need_positions():
    backbone = Backbone(config(rope="2d"))
    with pytest.raises(ValueError, match=r"2-D rope needs positions of shape \[N, 2\], got None"):
        backbone(torch.randn(1, 4, 32), mask=AttentionMask())


@TORCH_SCRIPTS
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mask", [AttentionMask(), CAUSAL, AttentionMask(window=2)], ids=repr)
def test_forward_mode_derivatives_are_those_of_reverse_mode(attention, backend, mask):
    backbone = Backbone(config(attention=attention, backend=backend, depth=2)).double()
    weights, x = dict(backbone.named_parameters()), torch.randn(2, 5, 32, dtype=torch.float64)

    def out(weights, x):
        return torch.func.functional_call(backbone, weights, (x,), {"mask": mask})

    tangents = ({n: torch.randn_like(p) for n, p in weights.items()}, torch.randn_like(x))
    features, forward = torch.func.jvp(out, (weights, x), tangents)
    weighted = torch.randn_like(features)
    _, vjp = torch.func.vjp(out, weights, x)
    pairs = zip(tree_leaves(vjp(weighted)), tree_leaves(tangents), strict=True)
    torch.testing.assert_close((forward * weighted).sum(), sum((a * b).sum() for a, b in pairs))
    # Also forward over reverse: a Hessian-vector product.
    loss = torch.func.grad(lambda x: out(weights, x).square().sum())
    _, product = torch.func.jvp(loss, (x,), (tangents[1],))
    step = 1e-5 * tangents[1]
    torch.testing.assert_close(
        product, (loss(x + step) - loss(x - step)) / 2e-5, rtol=1e-4, atol=1e-4
    )


@TORCH_SCRIPTS
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_forward_mode_derivatives_in_float32(attention):
    backbone = Backbone(config(attention=attention))
    weights, x = dict(backbone.named_parameters()), torch.randn(2, 5, 32)
    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    _, tangent = torch.func.jvp(
        lambda w: torch.func.functional_call(backbone, w, (x,), {"mask": CAUSAL}),
        (weights,),
        (ones,),
    )
    assert tangent.dtype == torch.float32
    assert tangent.isfinite().all()


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(2, 5, 32), None, "mask must be an AttentionMask, got None"),
        (
            torch.zeros(2, 5, 32),
            torch.ones(2, 5, dtype=torch.bool),
            "mask must be an AttentionMask, got a tensor of torch.bool.*key_padding",
        ),
        (torch.zeros(2, 5, 31), CAUSAL, r"x must be \[B, N, 32\], got shape \(2, 5, 31\)"),
        (torch.zeros(5, 32), CAUSAL, r"x must be \[B, N, 32\], got shape \(5, 32\)"),
    ],
)
def test_inputs_of_another_kind_are_refused_in_one_line(x, mask, message):
    with pytest.raises(ValueError, match=message) as refused:
        Backbone(config())(x, mask=mask)
    assert "\n" not in str(refused.value)


def test_norm_eps_is_that_of_every_norm_but_the_headwise_one():
    backbone = Backbone(config(norm_eps=1e-3, qk_norm=True, attention="diff_v1"))
    found = {name: m.eps for name, m in backbone.named_modules() if hasattr(m, "eps")}
    headwise = [name for name in found if name.endswith("attention.norm")]
    assert len(found) == 3 * 5 + 1
    assert len(headwise) == 3
    assert {found.pop(name) for name in headwise} == {1e-5}
    assert set(found.values()) == {1e-3}
    layers = Backbone(config(norm="layernorm", norm_eps=1e-3, attention="softmax"))
    assert {m.eps for m in layers.modules() if hasattr(m, "eps")} == {1e-3}
    wider = Backbone(config(headwise_norm_eps=1e-2))
    assert wider.blocks[0].attention.norm.eps == 1e-2


def test_norms_without_norm_eps_have_their_own():
    backbone = Backbone(config(qk_norm=True))
    assert {m.eps for m in backbone.modules() if hasattr(m, "eps")} == {1e-5}
    backbone = Backbone(config(norm="layernorm", attention="softmax"))
    assert {m.eps for m in backbone.modules() if hasattr(m, "eps")} == {1e-6}


def test_an_eps_that_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="norm_eps must be positive, got -1e-06"):
        config(norm_eps=-1e-6)
    with pytest.raises(ValueError, match=r"headwise_norm_eps must be positive, got 0\.0"):
        config(headwise_norm_eps=0.0)
    with pytest.raises(ValueError, match="headwise_norm_eps=0.1 is not used by attention"):
        config(attention="softmax", headwise_norm_eps=0.1)
    with (
        patch.dict(NORMS, plain=torch.nn.Identity),
        pytest.raises(ValueError, match="norm_eps=0.1 is not used by norm 'plain', which takes"),
    ):
        config(norm="plain", norm_eps=0.1)
