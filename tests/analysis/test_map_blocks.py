"""Blocks of maps equal whole maps, with every attention, mask and modality."""

from types import SimpleNamespace

import pytest
import torch

import diffmm
from diffmm.analysis.attention_maps import attention_maps
from diffmm.analysis.lambdas import LambdaMeter
from diffmm.analysis.map_blocks import default_bytes, visit_layers
from diffmm.layers.attention import ATTENTIONS
from diffmm.models import (
    AudioConfig,
    BackboneConfig,
    CaptioningConfig,
    CaptioningModel,
    TextConfig,
    TextModel,
)
from diffmm.ops import AttentionMask

PADDING = torch.tensor([[True] * 7, [False] * 2 + [True] * 5])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2]])
MASKS = {
    "full": AttentionMask(),
    "causal": AttentionMask(causal=True),
    "window": AttentionMask(window=2),
    "prefix": AttentionMask(causal=True, prefix_lengths=torch.tensor([2, 5])),
    "documents": AttentionMask(causal=True, document_ids=DOCUMENTS),
    "all": AttentionMask(causal=True, window=3, document_ids=DOCUMENTS, key_padding=PADDING),
}


def text_model(attention, **settings):
    settings = {"dim": 32, "depth": 2, "num_heads": 8, "num_kv_heads": 2, "rope": "1d", **settings}
    backbone = BackboneConfig(attention=attention, **settings)
    return TextModel(TextConfig(vocab_size=40, max_length=16, backbone=backbone))


def joined(model, *inputs, max_bytes, mask=None):
    """Maps and lambda of every layer, from blocks, and the largest number of rows of a block."""
    found, most = [], 0

    def visit(layer):
        nonlocal most
        blocks = list(layer.blocks(max_bytes=max_bytes))
        most = max(most, *(len(block.rows) for block in blocks))
        maps = torch.cat([block.combined for block in blocks], dim=2)
        lam = None if layer.lam is None else torch.cat([block.lam for block in blocks], dim=2)
        found.append((layer.name, maps, lam))

    visit_layers(model, *inputs, visit=visit, mask=mask)
    return found, most


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_blocks_are_the_rows_of_the_maps(attention, mask):
    settings = {"signal_per_noise": 2} if attention == "diff_grouped" else {}
    model, tokens = text_model(attention, **settings), torch.randint(40, (2, 7))
    whole = attention_maps(model, tokens, mask=MASKS[mask])
    num_heads, num_components = whole[0].combined.shape[1], len(whole[0].components)
    two_rows = 2 * 6 * 4 * 2 * num_heads * num_components * 7
    blocks, most = joined(model, tokens, max_bytes=two_rows, mask=MASKS[mask])
    assert most == 2
    for layer, (name, maps, lam) in zip(whole, blocks, strict=True):
        assert name == layer.name
        torch.testing.assert_close(maps, layer.combined)
        assert (lam is None) == (layer.lam is None)
        if lam is not None:
            torch.testing.assert_close(lam, layer.lam)


@pytest.mark.parametrize(
    ("recipe", "inputs"),
    [
        ("image/digits_tiny", lambda: (torch.rand(2, 1, 8, 8),)),
        ("audio/sound_events_tiny", lambda: (torch.rand(2, 8000), torch.tensor([8000, 5000]))),
    ],
)
def test_images_and_sounds(recipe, inputs):
    model, given = diffmm.create_model(recipe, attention="diff_v2").eval(), inputs()
    blocks, most = joined(model, *given, max_bytes=1)
    assert most == 1
    for layer, (_, maps, _) in zip(attention_maps(model, *given), blocks, strict=True):
        torch.testing.assert_close(maps, layer.combined)


def test_chosen_rows_padding_and_first_keys():
    layers = []
    mask = MASKS["all"]
    tokens, rows = torch.randint(40, (2, 7)), torch.tensor([0, 2, 6])
    model = text_model("diff_v1")
    visit_layers(model, tokens, visit=layers.append, mask=mask)
    (block,) = layers[1].blocks(rows=rows)
    torch.testing.assert_close(
        block.combined, attention_maps(model, tokens, mask=mask)[1].combined[:, :, rows]
    )
    assert block.is_real.tolist() == [[True] * 3, [False, True, True]]
    assert block.first_key[0].tolist() == [0, 0, 3]
    # The document of query 2 starts with padding, and key 3 is outside the window of query 6.
    assert block.first_key[1, 1:].tolist() == [2, 3]


def test_padding_of_a_context_is_not_that_of_the_queries():
    """Two sounds, the second one half as long, and texts with more tokens than each."""
    encoder = AudioConfig(
        backbone=BackboneConfig(dim=32, depth=1, num_heads=4, rope="1d"),
        sample_rate_hz=8000,
        num_mels=8,
        stem="frame",
        patch_size=None,
    )
    decoder = TextConfig(40, 64, text_model("diff_v2").config.backbone)
    model = CaptioningModel(
        CaptioningConfig(encoder=encoder, decoder=decoder, media="cross_attention")
    )
    tokens, sounds = torch.randint(40, (2, 30)), torch.randn(2, 2000)
    num_samples = torch.tensor([2000, 1000])
    real = model.media_tokens(sounds, num_samples)[1][:, 0]
    assert real.shape[1] < 31
    assert not real.all()
    lambdas, names = LambdaMeter(), []
    lams = {}

    def visit(layer):
        lambdas.add(layer)
        lams[layer.name] = layer.lam
        names.append(layer.name)
        (block,) = layer.blocks()
        if layer.is_cross:
            assert block.is_real.all()
            for weights in block.components:
                torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 8, 31))
                assert not weights[1, :, :, ~real[1]].any()

    visit_layers(model, tokens, sounds, num_samples, visit=visit)
    crossed = [f"decoder.backbone.blocks.{i}.cross_attention.attention" for i in (0, 1)]
    assert names[1:] == [
        *("decoder.backbone.blocks.0.attention", crossed[0]),
        *("decoder.backbone.blocks.1.attention", crossed[1]),
    ]
    found = {layer.name: layer.mean for layer in lambdas.layers()}
    for name in crossed:
        assert found[name] == pytest.approx(lams[name].mean().item(), rel=1e-5)


def test_a_long_sequence_never_has_a_whole_map():
    """At 4,096 tokens the maps of the layer would be 512 MB; blocks stay below the limit."""
    model = text_model("diff_v1", depth=1)
    model.config = diffmm.models.TextConfig(40, 4096, model.config.backbone)
    largest = 0

    def visit(layer):
        nonlocal largest
        for block in layer.blocks(rows=torch.arange(0, 4096, 64), max_bytes=2**22):
            sizes = [x.numel() * x.element_size() for x in (*block.components, *block.scores)]
            largest = max(largest, sum(sizes))

    visit_layers(model, torch.randint(40, (1, 4096)), visit=visit)
    assert 0 < largest <= 2**22


def test_the_default_limit_is_a_share_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(total_memory=2**33)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert default_bytes(torch.device("cuda", 0)) == default_bytes(torch.device("cpu")) == 2**30


def test_bad_limits_are_refused():
    layers = []
    visit_layers(text_model("softmax"), torch.randint(40, (1, 3)), visit=layers.append)
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        next(layers[0].blocks(max_bytes=0))
