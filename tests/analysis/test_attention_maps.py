"""Materialized maps equal those that the layers use."""

import pytest
import torch
from torch import nn

from diffmm.analysis.attention_maps import attention_maps, layer_maps
from diffmm.layers.attention import ATTENTIONS
from diffmm.layers.rope import RotaryEmbedding
from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.ops import AttentionMask

VARIANTS = {
    "softmax": {},
    "softmax cosine": {"cosine_logits": True},
    "diff_v1": {},
    "diff_v1 shared query": {"share": "q"},
    "diff_v1 shared key": {"share": "k"},
    "diff_v1 added": {"combine": "add"},
    "diff_v2": {"qk_norm": True},
    "diff_grouped": {"signal_per_noise": 2},
}
PADDING = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])


def text_model(attention: str = "diff_v1", depth: int = 3) -> TextModel:
    backbone = BackboneConfig(
        dim=32,
        depth=depth,
        num_heads=4,
        num_kv_heads=1 if attention == "diff_grouped" else None,
        attention=attention,
        rope="1d",
        dropout=0.5,
    )
    return TextModel(TextConfig(vocab_size=40, max_length=16, backbone=backbone))


@pytest.mark.parametrize("variant", VARIANTS)
def test_combined_map_times_values_is_the_ops_output(variant):
    layer = ATTENTIONS[variant.split()[0]](
        32, num_heads=8, num_kv_heads=4, layer_index=2, **VARIANTS[variant]
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, mask = torch.randn(2, 7, 32), AttentionMask(causal=True, key_padding=PADDING)
    rope = RotaryEmbedding(layer.head_dim, 100.0, 1)(torch.arange(7))

    maps = layer_maps("", layer, x, mask=mask, rope=rope)
    q, k, v = layer.project(x, rope)
    values = v.repeat_interleave(maps.combined.shape[1] // v.shape[2], dim=2).transpose(1, 2)
    heads = (maps.combined @ values).transpose(1, 2)
    torch.testing.assert_close(heads, layer.attend(x, q, k, v, mask))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_rows_sum_to_one_less_lambda_and_padding_is_zero(attention):
    mask = AttentionMask(causal=True, key_padding=PADDING)
    tokens = torch.randint(40, (2, 7))
    for layer in attention_maps(text_model(attention), tokens, mask=mask):
        for component in layer.components:
            assert (component >= 0.0).all()
            torch.testing.assert_close(component.sum(-1), torch.ones(component.shape[:3]))
        lam = torch.zeros(()) if layer.lam is None else layer.lam
        rows = layer.combined.sum(-1)
        torch.testing.assert_close(rows, (1.0 - lam).expand_as(rows))
        unseen = ~mask.to_bool(7, 7).expand_as(layer.combined)
        assert (layer.combined[unseen] == 0.0).all()
        assert layer.combined[1, :, :, 4:].count_nonzero() == 0


def test_layers_are_picked_by_number_and_named():
    model, tokens = text_model(), torch.randint(40, (1, 5))
    every = attention_maps(model, tokens)
    assert [layer.name for layer in every] == [f"backbone.blocks.{i}.attention" for i in range(3)]
    picked = attention_maps(model, tokens, layers=[0, -1])
    assert [layer.name for layer in picked] == [every[0].name, every[2].name]
    torch.testing.assert_close(picked[1].combined, every[2].combined)
    with pytest.raises(
        ValueError, match=r"layers contains 3, but TextModel has 3 attention layers"
    ):
        attention_maps(model, tokens, layers=[3])


def test_looking_changes_nothing():
    model, tokens = text_model().train(), torch.randint(40, (1, 5))
    model.backbone.norm.eval()
    first, second = attention_maps(model, tokens), attention_maps(model, tokens)
    torch.testing.assert_close(first[-1].combined, second[-1].combined)  # dropout was disabled
    assert model.training
    assert model.backbone.blocks[0].training
    assert not model.backbone.norm.training
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert not first[0].combined.requires_grad


def test_half_precision_models_give_float32_maps():
    layer = attention_maps(text_model().bfloat16(), torch.randint(40, (1, 5)))[0]
    assert layer.combined.dtype == torch.float32
    torch.testing.assert_close(layer.components[0].sum(-1), torch.ones(1, 2, 5))


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match=r"Linear contains no attention layer of diffmm"):
        attention_maps(nn.Linear(2, 2), torch.zeros(1, 2))
