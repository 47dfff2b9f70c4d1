"""Differential attention equals plain attention of more heads and a subtraction."""

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from diffmm.export.plain_heads import plain_heads
from diffmm.layers.attention import ATTENTIONS
from diffmm.layers.rope import RotaryEmbedding, apply_rope
from diffmm.ops import AttentionMask

DIM, LENGTH = 32, 7


@pytest.mark.parametrize(
    ("attention", "options", "counts"),
    [
        ("diff_v2", {"num_heads": 4}, (8, 4)),
        ("diff_v2", {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True}, (8, 2)),
        ("diff_v2", {"num_heads": 4, "num_kv_heads": 1, "combine": "add"}, (8, 1)),
        ("diff_grouped", {"num_heads": 8, "num_kv_heads": 2, "signal_per_noise": 2}, (12, 2)),
        ("diff_v1", {"num_heads": 8}, (16, 16)),
        ("diff_v1", {"num_heads": 8, "num_kv_heads": 4, "qk_norm": True}, (16, 8)),
        ("diff_v1", {"num_heads": 8, "num_kv_heads": 4, "share": "k"}, (16, 4)),
        ("diff_v1", {"num_heads": 8, "num_kv_heads": 4, "share": "q"}, (16, 8)),
        ("diff_v1", {"num_heads": 8, "num_kv_heads": 4, "heads_per_noise": 2}, (16, 8)),
    ],
)
@torch.no_grad()
def test_the_layer_is_plain_attention_and_a_subtraction(attention, options, counts):
    layer = ATTENTIONS[attention](DIM, **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    heads = plain_heads(layer)
    head_dim = layer.head_dim
    assert tuple(len(weight) for weight in (heads.q_weight, heads.k_weight)) == counts
    assert heads.k_weight.shape == heads.v_weight.shape == (counts[1], head_dim, DIM)
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    rope = RotaryEmbedding(head_dim)(torch.arange(LENGTH))

    def project(weight, bias):
        bias = None if bias is None else bias.flatten()
        return linear(x, weight.flatten(0, 1), bias).unflatten(-1, (-1, head_dim))

    q = apply_rope(layer.q_norm(project(heads.q_weight, heads.q_bias)), rope)
    k = apply_rope(layer.k_norm(project(heads.k_weight, heads.k_bias)), rope)
    v = project(heads.v_weight, heads.v_bias)
    out = scaled_dot_product_attention(
        *(part.transpose(1, 2) for part in (q, k, v)),
        is_causal=True,
        scale=layer.scale,
        enable_gqa=True,
    ).transpose(1, 2)
    found = layer.out_proj(layer.finish(heads.combine(out, layer.lam(x))).flatten(2))
    wanted = layer(x, mask=AttentionMask(causal=True), rope=rope)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # lambda is in float32


def test_softmax_attention_is_plain_already():
    layer = ATTENTIONS["softmax"](DIM, num_heads=4)
    with pytest.raises(ValueError, match="a SoftmaxAttention has one map per head: its heads are"):
        plain_heads(layer)
