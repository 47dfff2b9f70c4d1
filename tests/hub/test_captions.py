"""Trained captioning models: captions of files, prompts, several media, the command line."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import diffmm
from datamodules import AudioTextData, ImageTextData
from datamodules.pairs import RenderedShapes
from diffmm.cli import main
from diffmm.hub.predictions import Caption
from diffmm.models import (
    AudioConfig,
    BackboneConfig,
    CaptioningConfig,
    CaptioningModel,
    CTCConfig,
    CTCModel,
    ImageConfig,
    TextConfig,
)
from diffmm.models.cross_attention import cross_attentions
from diffmm.models.generation import generate
from diffmm.models.job import Job
from diffmm.models.weights import save_model

MEDIA = ["prefix", "cross_attention"]
BOTH = pytest.mark.parametrize("trained", MEDIA, indirect=True)
FILES = [f"media/{number}.png" for number in range(3)]


def saved(encoder, data, path, max_length=90, media="prefix"):
    """An untrained model whose texts depend on its input, and never end."""
    torch.manual_seed(0)
    text = TextConfig(259, max_length, BackboneConfig(32, 2, 4, init_std=0.15, rope="1d"))
    model = CaptioningModel(CaptioningConfig(encoder=encoder, decoder=text, media=media))
    torch.nn.init.normal_(model.decoder.embedding.weight)
    for layer in cross_attentions(model.decoder.backbone).values():
        torch.nn.init.normal_(layer.attention.out_proj.weight)
    model.job = Job(reader=data.describe_inputs()["reader"], recipe="image_text/test")
    save_model(model, path)
    return path


def backbone():
    return BackboneConfig(32, 2, 4, rope="2d", init_std=0.1)


@pytest.fixture
def trained(tmp_path, monkeypatch, request):
    """A model in `run`, with three pictures in `media`."""
    monkeypatch.chdir(tmp_path)
    Path("media").mkdir()
    for number, file in enumerate(FILES):
        pixels = np.random.default_rng(number).integers(256, size=(20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    data = ImageTextData(RenderedShapes(4, 4), image_size=16, max_tokens=12)
    encoder = ImageConfig(backbone=backbone(), image_size=16, patch_size=8)
    media = getattr(request, "param", "prefix")
    return diffmm.load(saved(encoder, data, Path("run"), media=media))


def by_hand(trained, media, prompt=None):
    rows = generate(
        trained.model, prompt, media=media, max_new_tokens=12, temperature=0, stop_ids=[256]
    )
    return [bytes(id for id in row if id < 256).decode(errors="replace") for row in rows.tolist()]


@BOTH
def test_captions_of_files_lists_and_folders(trained):
    images = torch.stack([trained.reader.read(file)["images"] for file in FILES])
    expected = by_hand(trained, images)
    assert len(set(expected)) == 3
    assert trained.predict(FILES[1]) == Caption(expected[1], FILES[1])
    for inputs in (FILES, "media"):
        found = trained.predict(inputs, batch_size=2)
        assert [caption.text for caption in found] == expected
        assert [caption.file for caption in found] == FILES
    picture = trained.predict(Image.open(FILES[2]))
    assert (picture.text, picture.file) == (expected[2], None)


@BOTH
def test_texts_begin_with_a_prompt_and_several_media_share_one(trained):
    images = torch.stack([trained.reader.read(file)["images"] for file in FILES])
    prompt = torch.tensor([list(b"a small")])
    assert [trained.generate(FILES[0])] == by_hand(trained, images[:1])
    assert [trained.generate(FILES[0], "a small")] == by_hand(trained, images[:1], prompt)
    assert [trained.generate(FILES[:2], "a small")] == by_hand(trained, images[None, :2], prompt)
    pieces = list(trained.write(FILES[0], max_new_tokens=5))
    assert len(pieces) == 6
    assert "".join(pieces) == trained.generate(FILES[0], max_new_tokens=5)
    guessed = trained.generate(FILES[0], max_new_tokens=5, prompt_lookup_num_tokens=3)
    assert guessed == "".join(pieces)
    drawn = [trained.generate(FILES[0], temperature=5.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_refused(trained):
    for call, message in (
        (lambda: trained.generate([]), "no image or sound to describe: give at least one"),
        (lambda: trained.generate(FILES * 8), "96 tokens of media and 0 of the prompt leave noth"),
        (lambda: trained.generate(FILES[0], chat=True), "chat does not apply"),
        (lambda: trained.predict("none.png"), "none.png"),
        (lambda: trained.similarity(FILES, "a"), "only contrastive models compare"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()


def test_a_text_model_has_no_beginning_of_a_caption():
    model = diffmm.create_model("text/stdlib_tiny", depth=1)
    trained = diffmm.TrainedModel(
        model, Job(reader={"class_path": "datamodules.text.TextReader",
                           "init_args": {"tokenizer": "bytes"}}))  # fmt: skip
    with pytest.raises(ValueError, match="text is the beginning of a caption"):
        trained.generate("a", "b")


def test_the_command_line_writes_texts(trained, capsys):
    captions = trained.predict(FILES)
    assert main(["predict", "run", "media", "--device", "cpu", "--output", "texts.csv"]) == 0
    with open("texts.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["file", "text"], *([c.file, c.text] for c in captions)]
    assert main(["generate", "run", FILES[0], "--device", "cpu"]) == 0
    assert trained.generate(FILES[0]) in capsys.readouterr().out
    assert main(["predict", "run", "media", "--top-k", "2", "--device", "cpu"]) == 2
    assert "--top-k is for classes, but this model gives one text" in capsys.readouterr().err


@pytest.mark.parametrize("media", MEDIA)
def test_sounds_of_any_length_are_transcribed(tmp_path, monkeypatch, media):
    monkeypatch.chdir(tmp_path)
    data = AudioTextData(sample_rate_hz=8000, max_tokens=12)
    encoder = AudioConfig(
        backbone=backbone(),
        sample_rate_hz=8000,
        num_mels=8,
        window_seconds=0.032,
        hop_seconds=0.016,
        patch_size=(16, 8),
    )
    trained = diffmm.load(saved(encoder, data, Path("run"), media=media))
    files = [f"{number}.wav" for number in range(3)]
    for number, file in enumerate(files):
        sound = 0.5 * np.sin(np.arange(4000 + 3000 * number) * (0.02, 2.0, 0.3)[number])
        soundfile.write(file, sound, 8000)
    alone = [trained.predict(file).text for file in files]
    assert [caption.text for caption in trained.predict(files)] == alone
    assert len(set(alone)) > 1
    assert len(trained.generate(files, "a")) > 0


@BOTH
def test_maps_of_words_are_those_of_the_caption(trained):
    found = trained.word_maps(FILES[0], words=None, layers=[-1])
    assert found.text == trained.generate(FILES[0])
    given = trained.word_maps(FILES[0], "a red dog", words=["red"])
    assert given.text == "a red dog"
    assert [(each.word, each.tokens) for each in given.words] == [("red", [2, 3, 4])]
    every = trained.attention_maps(FILES[0], text="a red dog")
    is_crossed = trained.model.config.has_cross_attention
    num_decoder, first = (4, 0) if is_crossed else (2, 3)
    parts = [layer.name.split(".")[0] for layer in every]
    assert parts == ["encoder"] * 2 + ["decoder"] * num_decoder
    rows = every[-1].combined[0].mean(dim=0)[[first + i for i in (2, 3, 4)], :4].mean(dim=0)
    maps = given.words[0].layers[1].maps["A₁ − λA₂"]
    np.testing.assert_allclose(maps, rows.view(2, 2), atol=1e-6)
    own = trained.attention_maps(FILES[0], layers=[-1])[0]
    # The caption does not end before max_tokens.
    assert own.combined.shape[-2:] == ((1 + 12, 4) if is_crossed else (4 + 12, 4 + 12))
    classifier = diffmm.TrainedModel(trained.model.encoder, trained.job)
    for call, message in (
        (lambda: classifier.word_maps(FILES[0]), "only captioning and CTC models have maps of"),
        (lambda: classifier.attention_maps(FILES[0], text="a"), "text is what a captioning model"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_maps_of_words_of_ctc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = AudioTextData(sample_rate_hz=8000, max_tokens=12)
    encoder = AudioConfig(
        backbone=BackboneConfig(32, 2, 4, rope="1d"), sample_rate_hz=8000, num_mels=8, stem="frame"
    )
    model = CTCModel(CTCConfig(encoder=encoder, vocab_size=259, blank_id=256))
    trained = diffmm.TrainedModel(model, Job(reader=data.describe_inputs()["reader"]))
    soundfile.write("a.wav", np.random.default_rng(0).normal(size=4000) * 0.1, 8000)
    found = trained.word_maps("a.wav")
    assert found.text == trained.predict("a.wav").text
    assert found.words
    assert found.words[0].layers[1].maps["A₁"].shape[0] == 1
    assert [layer.name.split(".")[0] for layer in trained.attention_maps("a.wav")] == [
        "encoder"
    ] * 2
    with pytest.raises(ValueError, match="a CTC model has maps for what it hears"):
        trained.word_maps("a.wav", "text")
