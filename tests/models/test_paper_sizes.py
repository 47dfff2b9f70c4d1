"""Parameter counts: the paper's sizes, and the three attention variants with equal counts."""

import itertools

import pytest
import torch

from diffmm.models import Backbone, BackboneConfig, TextConfig, TextModel

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")
VOCAB_SIZE = 100_288

# Ye et al. 2025, the scaling runs: dim, depth, differential heads. Embeddings are tied.
PAPER = {
    "830M": (830e6, 1536, 24, 8),
    "1.4B": (1.4e9, 2048, 24, 8),
    "2.8B": (2.8e9, 2560, 32, 10),
    "6.8B": (6.8e9, 4096, 32, 16),
    "13.1B": (13.1e9, 5120, 40, 20),
}


def count(module_class, config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in module_class(config).parameters())


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_sizes_have_the_papers_names_with_every_attention(name):
    named, dim, depth, num_pairs = PAPER[name]
    counts = {
        attention: count(
            TextModel,
            TextConfig(
                vocab_size=VOCAB_SIZE,
                max_length=2048,
                backbone=BackboneConfig(
                    dim=dim, depth=depth, num_heads=2 * num_pairs, attention=attention, rope="1d"
                ),
            ),
        )
        for attention in ATTENTIONS
    }
    for attention, number in counts.items():
        assert number == pytest.approx(named, rel=0.015), attention
        assert number == pytest.approx(counts["softmax"], rel=0.005), attention


def test_the_papers_3b_has_its_blocks_without_embeddings():
    # 28 layers of 3072, 12 pairs of 128, feed-forward 8192: the paper's own "3B".
    config = BackboneConfig(dim=3072, depth=28, num_heads=24, feed_forward_width=8192)
    assert count(Backbone, config) == pytest.approx(28 * 12 * 3072**2, rel=0.001)
    derived = BackboneConfig(dim=3072, depth=28, num_heads=24)
    assert derived.resolved_feed_forward_width == 8192


@pytest.mark.parametrize("head_dim", [16, 32, 64])
@pytest.mark.parametrize("dim", [64, 128, 192, 256, 384, 512, 640, 768, 1024])
def test_the_three_attentions_have_the_same_count(dim, head_dim):
    num_heads = dim // head_dim
    kinds = {
        "decoder": {"rope": "1d"},
        "vit": {
            "feed_forward": "gelu",
            "norm": "layernorm",
            "qkv_bias": True,
            "out_bias": True,
            "feed_forward_bias": True,
        },
        "qk_norm": {"qk_norm": True, "layer_scale": 1e-5},
    }
    groups = {num_heads, num_heads // 2, 2} if num_heads > 2 else {num_heads}
    for (kind, fields), num_kv_heads in itertools.product(kinds.items(), groups):
        if num_heads % 2 or num_kv_heads % 2:
            continue
        counts = {
            attention: count(
                Backbone,
                BackboneConfig(
                    dim=dim,
                    depth=2,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    attention=attention,
                    **fields,
                ),
            )
            for attention in ATTENTIONS
        }
        for attention, number in counts.items():
            assert number == pytest.approx(counts["softmax"], rel=0.005), (
                f"{kind}, {num_kv_heads} key heads, {attention}"
            )


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_derived_widths_are_multiples_that_tensor_cores_like(attention):
    for dim, multiple in ((2048, 64), (1024, 32), (512, 16), (256, 8)):
        config = BackboneConfig(dim=dim, depth=1, num_heads=8, attention=attention)
        assert config.resolved_feed_forward_width % multiple == 0
