"""Exported programs give the results of their models, for all sizes of their axes."""

import pytest
import torch

from diffmm.export.program import trace
from diffmm.export.signature import signature_of
from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    TextConfig,
    TextModel,
    TextTower,
    TextTowerConfig,
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def backbone(rope="2d", attention="diff_v1", **options):
    return BackboneConfig(
        dim=32, depth=1, num_heads=4, rope=rope, attention=attention, init_std=0.3, **options
    )


def audio_model(rope, **options):
    shape = {"sample_rate_hz": 8000, "num_mels": 16, "num_classes": 3, "patch_size": None}
    attention = backbone(rope, "softmax", feed_forward="gelu")  # the fewest operators
    return AudioModel(AudioConfig(backbone=attention, **shape | options)).eval()


def text_model(attention="diff_v2", causal=True, max_length=20, **options):
    config = TextConfig(
        vocab_size=50,
        max_length=max_length,
        causal=causal,
        backbone=backbone("1d", attention, **options),
    )
    return TextModel(config).eval()


def check(model, *sizes, **options):
    """The program of a model has its results for batches of the given sizes."""
    signature = signature_of(model, **options)
    program = trace(signature).module()
    for each in ({}, signature.other_sizes(), *sizes):
        inputs = signature.example(**each)
        assert all(tuple(tensor.shape[0:1]) == (each.get("batch", 2),) for tensor in inputs), (
            "the batch has another size"
        )
        torch.testing.assert_close(program(*inputs), signature.module(*inputs))
    return program


SHORT_AND_LONG = ({"batch": 1, "samples": 1}, {"batch": 3, "samples": 81})


def test_silence_after_short_clips_is_not_part_of_them():
    model = audio_model("1d", stem="frame")
    signature = signature_of(model)
    waveforms = torch.randn(2, 30)
    lengths = torch.tensor([30, 17])
    torch.testing.assert_close(signature.module(waveforms, lengths), model(waveforms, lengths))


def test_patches_of_clips_up_to_a_limit():
    model = audio_model("2d", patch_size=8, clip_seconds=0.5, learned_positions=True)
    program = check(model, *SHORT_AND_LONG, {"batch": 2, "samples": 4000})
    with pytest.raises((AssertionError, RuntimeError), match="4000"):
        program(torch.randn(2, 4001), torch.tensor([4001, 10]))


CACHES = (
    {"batch": 1, "tokens": 1, "past": 0},
    {"batch": 3, "tokens": 4, "past": 0},
    {"batch": 1, "tokens": 1, "past": 1},
    {"batch": 2, "tokens": 1, "past": 9},
)


def test_decoders_with_a_cache():
    check(text_model("diff_v1", num_kv_heads=2, window=4), *CACHES)


def test_texts_of_few_tokens():
    for most in range(4, 14):
        signature = signature_of(text_model(max_length=most))
        for sizes in ({}, signature.other_sizes()):
            tokens, _, past_keys, *_ = inputs = signature.example(**sizes)
            assert 2 <= tokens.shape[1] + past_keys.shape[1] <= most
            signature.module(*inputs)
        assert signature.axes["past + tokens"][:2] == (1, most)
    check(text_model("diff_grouped", num_kv_heads=1, max_length=10), *CACHES)
    with pytest.raises(ValueError, match=r"max_length of at least 4, and the model's is 3: export"):
        signature_of(text_model(max_length=3))
    short = signature_of(text_model(max_length=2), cache=False)
    assert short.module(*short.example()).shape == (2, 2, 50)
    with pytest.raises(ValueError, match="max_length of at least 2, got 1"):
        signature_of(text_model(max_length=1), cache=False)


def test_the_cache_of_a_program_continues_a_text():
    """Prompts of several lengths, padded on the left, in three calls: the logits of the model
    without padding and cache."""
    model = text_model()
    program = signature_of(model).module
    tokens = torch.randint(50, (2, 9))
    num_padding = torch.tensor([0, 3])
    past = [
        torch.zeros(2, 0, *shape)
        for shape in (model.backbone.attentions[0].k_shape, model.backbone.attentions[0].v_shape)
    ]
    logits = []
    for part in tokens.split([5, 1, 3], dim=1):
        found, *past = program(part, num_padding, *past)
        logits.append(found)
    logits = torch.cat(logits, dim=1)
    torch.testing.assert_close(logits[0], model(tokens[:1])[0])
    torch.testing.assert_close(logits[1, 3:], model(tokens[1:, 3:])[0])


def test_whole_texts():
    decoder, encoder = text_model(), text_model(causal=False)
    check(decoder, {"batch": 1, "tokens": 1}, cache=False)
    # Padding changes no logits.
    tokens = torch.randint(50, (1, 6))
    real = torch.tensor([[False, False, True, True, True, True]])
    for model, options in ((decoder, {"cache": False}), (encoder, {})):
        program = signature_of(model, **options).module
        torch.testing.assert_close(program(tokens, real)[:, 2:], model(tokens[:, 2:]))


@pytest.mark.parametrize("pooling", [{}, {"pool": "mean", "causal": False}])
def test_text_towers(pooling):
    config = TextTowerConfig(50, 20, backbone("none"), num_outputs=4, **pooling)
    check(TextTower(config).eval(), {"batch": 1, "tokens": 1})


@pytest.mark.gpu
def test_programs_for_a_gpu():
    check(text_model("diff_v1").cuda(), *CACHES)
    check(audio_model("2d").cuda(), *SHORT_AND_LONG)
