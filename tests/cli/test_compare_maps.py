"""Every kind of model has attention maps on its page."""

from types import SimpleNamespace

import pytest
import torch

import diffmm
from datamodules import RetrievalData
from datamodules.text import Needles, TextReader
from diffmm.analysis.exhibits import ImageExhibit, SoundExhibit, TextExhibit
from diffmm.analysis.report import draw_exhibit
from diffmm.analysis.word_maps import WordsExhibit
from diffmm.batch import IGNORE_INDEX
from diffmm.cli.compare_maps import drawn_samples
from diffmm.tokenizers import ByteTokenizer


def data_of(batch, **others):
    return SimpleNamespace(val_dataloader=lambda: [batch], **others)


def pairs(model):
    tokens, num_tokens = torch.full((2, 4), 256), torch.tensor([4, 3])
    tokens[0, :3], tokens[1, :2] = torch.tensor(list(b"dog")), torch.tensor(list(b"ox"))
    parts = [*model.children()]
    if "images" in model.input_fields:
        (size,) = (p.config.image_size for p in parts if isinstance(p, diffmm.ImageModel))
        media = {"images": torch.rand(2, 3, size, size)}
    else:
        media = {"waveforms": torch.randn(2, 8000), "num_samples": torch.tensor([8000, 7000])}
    reader = TextReader(tokenizer="bytes")
    return data_of({**media, "tokens": tokens, "num_tokens": num_tokens}, evaluation_reader=reader)


def masked(model):
    tokens = torch.tensor([[*b"abc", ByteTokenizer.mask_id, *b"ef"]])
    targets = torch.full_like(tokens, IGNORE_INDEX)
    targets[0, 3] = ord("d")
    return data_of({"tokens": tokens, "targets": targets}, tokenizer=ByteTokenizer())


def images(model):
    return data_of({"images": torch.rand(2, 1, 8, 8)})


def sounds(model):
    return data_of({"waveforms": torch.randn(2, 8000), "num_samples": torch.tensor([8000, 7000])})


def labeled_sounds(model):
    labels = torch.zeros(2, model.num_classes)
    labels[0, 1] = labels[0, 2] = 1.0
    names = [f"class {number}" for number in range(model.num_classes)]
    (batch,) = sounds(model).val_dataloader()
    return data_of({**batch, "labels": labels}, class_names=names)


@pytest.mark.parametrize(
    ("recipe", "data_for", "kinds", "truths"),
    [
        ("text/stdlib_mlm_tiny", masked, [TextExhibit], ["d"]),
        ("image/digits_mae_tiny", images, [ImageExhibit] * 2, ["sample 1", "sample 2"]),
        ("audio/sound_events_mae_tiny", sounds, [SoundExhibit] * 2, ["sample 1", "sample 2"]),
        (
            "audio/sound_events_multilabel_tiny",
            labeled_sounds,
            [SoundExhibit] * 2,
            ["class 1, class 2", "no class"],
        ),
        (
            "image_text/shapes_tiny",
            pairs,
            [ImageExhibit, ImageExhibit, TextExhibit],
            ["dog", "ox", None],
        ),
        ("image_text/shapes_captions_tiny", pairs, [WordsExhibit] * 2, ["dog", "ox"]),
        ("audio_text/prompts_ctc_tiny", pairs, [WordsExhibit] * 2, ["dog", "ox"]),
        ("audio_text/prompts_transcription_tiny", pairs, [WordsExhibit] * 2, ["dog", "ox"]),
        (
            "audio_text/prompts_transcription_tiny media=cross_attention",
            pairs,
            [WordsExhibit] * 2,
            ["dog", "ox"],
        ),
    ],
)
def test_samples_of_other_models(recipe, data_for, kinds, truths):
    recipe, *settings = recipe.split()
    changes = dict(each.split("=") for each in settings)
    models = {"1": diffmm.create_model(recipe, attention="diff_v2", **changes).eval()}
    found = drawn_samples(models, data_for(models["1"]))
    assert [type(exhibit) for exhibit in found] == kinds
    assert [exhibit.truth for exhibit in found] == truths
    for exhibit in found:
        assert exhibit.views["1"].maps.keys() == {"A₁", "A₂", "A₁ − λA₂"}
        assert 'class="group 1"' in draw_exhibit(exhibit)
    if recipe == "text/stdlib_mlm_tiny":
        assert "The outlined token hides “d”." in draw_exhibit(found[0])


def test_samples_of_retrieval_have_words():
    data = RetrievalData(Needles(num_queries=2), sequence_length=60)
    data.setup("validate")
    backbone = diffmm.BackboneConfig(dim=32, depth=1, num_heads=2, rope="1d")
    model = diffmm.TextModel(diffmm.models.TextConfig(len(data.source.words), 64, backbone)).eval()
    (found,) = drawn_samples({"1": model}, data)
    assert {piece.strip() for piece in found.pieces} <= {*data.source.words, "·"}
    assert " number" in found.pieces
    assert "Next comes" in draw_exhibit(found)


def test_models_of_different_kinds_are_refused():
    names = ("text/stdlib_mlm_tiny", "text/stdlib_tiny")
    models = {str(i): diffmm.create_model(name) for i, name in enumerate(names)}
    with pytest.raises(ValueError, match="the runs have causal models and encoders"):
        drawn_samples(models, masked(None))
    models["1"] = diffmm.create_model("image/digits_tiny")
    with pytest.raises(ValueError, match="the runs have models of different kinds"):
        drawn_samples(models, masked(None))
