"""Cross-attention in the blocks of a decoder: its places, settings and initial weights."""

import dataclasses
import math

import pytest
import torch

from diffmm.layers import ATTENTIONS, Context
from diffmm.layers.cross_attention import context_mask
from diffmm.models import Backbone, BackboneConfig, TextConfig, TextModel
from diffmm.models.cross_attention import (
    add_cross_attention,
    cross_attentions,
    without_cross_attention,
)
from diffmm.ops import AttentionMask

CAUSAL = AttentionMask(causal=True)


def backbone(attention="diff_v1", every=1, gated=False, **changes):
    own = {"num_kv_heads": 2, "signal_per_noise": 2} if attention == "diff_grouped" else {}
    given = {"dim": 32, "depth": 4, "num_heads": 4, "rope": "1d", **own, **changes}
    found = Backbone(BackboneConfig(attention=attention, **given)).eval()
    add_cross_attention(found, every=every, gated=gated)
    return found


def context(num=6, dim=32):
    return Context(torch.randn(2, num, dim), context_mask())


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])]
)
def test_every_kth_block_has_it(every, expected):
    found = backbone(every=every)
    assert list(cross_attentions(found)) == expected
    assert [layer.attention.layer_index for layer in cross_attentions(found).values()] == expected


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_it_has_the_settings_of_the_blocks_attention(attention):
    settings = {"qk_norm": "layernorm", "qkv_bias": True, "out_bias": True, "output_gate": "head"}
    model = backbone(attention, **settings, num_kv_heads=2, window=3, exclusive=True)
    for block in model.blocks:
        own, cross = block.attention, block.cross_attention.attention
        assert (own.window, own.exclusive) == (3, True)
        assert (cross.window, cross.exclusive) == (None, False)
        assert {n: p.shape for n, p in cross.named_parameters()} == {
            n: p.shape for n, p in own.named_parameters()
        }
        assert getattr(cross, "lambda_init", None) == getattr(own, "lambda_init", None)
        assert type(block.cross_attention.norm) is type(block.attention_norm)


def test_branches_are_those_of_the_blocks():
    model = backbone(dropout=0.25, drop_path=0.3, layer_scale=0.5, post_norm=True)
    for block in model.blocks:
        own, cross = block.attention_branch, block.cross_attention.branch
        assert (cross.dropout.p, cross.drop_path) == (0.25, own.drop_path)
        assert torch.equal(cross.scale, torch.full((32,), 0.5))
        assert type(cross.norm) is type(own.norm)


def test_initial_weights_have_the_backbones_size():
    model = backbone("softmax", dim=256, init_std=0.05, every=2)
    layer = cross_attentions(model)[3].attention
    assert float(layer.q_proj.weight.detach().std()) == pytest.approx(0.05, rel=0.02)
    # Four blocks have eight branches, and there are two more.
    expected = 0.05 / math.sqrt(10)
    assert float(layer.out_proj.weight.detach().std()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_weights_of_a_language_model_keep_their_names_and_outputs(attention):
    """A closed gate leaves the outputs as they are, to the bit."""
    torch.manual_seed(0)
    plain = TextModel(
        TextConfig(40, 32, backbone(attention).config, tie_embeddings=False)
    ).eval()  # fmt: skip
    model = TextModel(plain.config).eval()
    add_cross_attention(model.backbone, every=2, gated=True)
    names = set(model.state_dict())
    with without_cross_attention(model.backbone):
        assert not cross_attentions(model.backbone)
        model.load_state_dict(plain.state_dict())
    assert set(model.state_dict()) == names
    assert all("cross_attention" in name for name in names - set(plain.state_dict()))
    x = torch.randn(2, 5, 32)
    found = model.backbone(x, mask=CAUSAL, context=context())
    assert torch.equal(found, plain.backbone(x, mask=CAUSAL))


def test_every_token_reads_the_whole_context_and_no_later_token():
    model = backbone()
    x, given = torch.randn(2, 5, 32, requires_grad=True), context()
    given.x.requires_grad_(True)
    out = model(x, mask=CAUSAL, context=given)
    for place in range(5):
        of_tokens, of_context = torch.autograd.grad(
            out[0, place].norm(), [x, given.x], retain_graph=True
        )
        assert (of_tokens[0].abs().sum(dim=1) > 0).tolist() == [n <= place for n in range(5)]
        assert (of_context[0] != 0).all()
        assert not of_context[1].any()


def test_recomputed_activations_give_the_same_gradients():
    model = backbone(every=2).train()
    x, given = torch.randn(2, 5, 32), context()
    given.x.requires_grad_(True)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        given.x.grad = None
        model.activation_checkpointing = recompute
        model(x, mask=CAUSAL, context=given).square().sum().backward()
        gradients.append([given.x.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_context_that_no_block_reads_is_refused():
    model = Backbone(dataclasses.replace(backbone().config))
    with pytest.raises(ValueError, match="no block has cross-attention, which reads a context"):
        model(torch.randn(2, 5, 32), mask=CAUSAL, context=context())
