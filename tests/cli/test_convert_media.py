"""`diffmm convert` of vision transformers and audio models, and prediction with the results."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models._hub import save_for_hf

import diffmm
from diffmm.models.weights import load_model

ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
NAMES = ["cat", "dog", "bird"]


@pytest.fixture
def vit():
    """A model of timm and its folder `vit`, and a photo."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=3, **ARGUMENTS).eval()
    torch.nn.init.normal_(model.head.weight)
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9}
    save_for_hf(model, "vit", {"label_names": NAMES}, ARGUMENTS, safe_serialization=True)
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return model


def test_a_converted_model_of_timm_predicts_as_timm_does(run, vit):
    result = run("convert", "vit", "ours.safetensors")
    assert result.code == 0, result.err
    assert result.out.startswith("ours.safetensors: diffmm, ")
    data = resolve_model_data_config(vit) | {"input_size": (3, 32, 32)}
    image = create_transform(**data)(Image.open("photo.png"))
    truth = vit(image[None]).softmax(-1)[0]
    (found,) = diffmm.load("ours.safetensors").predict(["photo.png"], top_k=3)
    assert [NAMES.index(label) for label in found.labels] == truth.argsort(descending=True).tolist()
    assert found.scores == pytest.approx(sorted(truth.tolist(), reverse=True), abs=1e-6)
    result = run("predict", "ours.safetensors", "photo.png")
    assert result.code == 0, result.err
    assert f"{NAMES[truth.argmax()]} {truth.max():.3f}" in result.out


def test_there_and_back_gives_the_same_tensors_and_preprocessing(run, vit):
    assert run("convert", "vit", "ours").code == 0
    result = run("convert", "ours", "back", "--to", "timm")
    assert result.code == 0, result.err
    first, second = (load_file(f"{name}/model.safetensors") for name in ("vit", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    settings = json.loads(Path("back/config.json").read_text())
    assert settings["label_names"] == NAMES
    assert settings["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert run("convert", "back", "again").code == 0
    first, second = (diffmm.load(name) for name in ("ours", "again"))
    assert first.model.config == second.model.config
    assert first.job == second.job


def test_weights_in_half_precision_stay_so(run, vit):
    file = Path("vit/model.safetensors")
    save_file({name: x.bfloat16() for name, x in load_file(file).items()}, file)
    assert run("convert", "vit", "ours.safetensors").code == 0
    assert {x.dtype for x in load_file("ours.safetensors").values()} == {torch.bfloat16}
    assert load_model("ours.safetensors").head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_tiny"}, "vit has architecture='vit_tiny', but diffmm can hold only"),
        ({"label_names": ["one"]}, "vit has 1 label_names, but 3 classes"),
        ({"num_classes": 5}, "vit does not have the weights that its settings need: 2 of another"),
        ({"architecture": None}, "vit is a model of type None, which diffmm cannot read; it reads"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(run, vit, changes, message):
    file = Path("vit/config.json")
    settings = json.loads(file.read_text()) | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    file.write_text(json.dumps(settings))
    result = run("convert", "vit", "target")
    assert result.code == 2
    assert len(result.mistakes) == 1
    assert result.mistakes[0].startswith(message), result.mistakes
    assert not Path("target").exists()


def test_either_tower_of_a_clip_is_converted(run):
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    torch.manual_seed(0)
    settings = {
        "embed_dim": 10,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 24, "head_width": 12},
        "text_cfg": {"context_length": 6, "vocab_size": 30, "width": 16, "heads": 2},
    }
    for tower in ("vision_cfg", "text_cfg"):
        settings[tower]["layers"] = 1
    theirs = open_clip.model.CLIP(**settings).eval()
    Path("clip").mkdir()
    save_file(theirs.state_dict(), "clip/open_clip_model.safetensors")
    Path("clip/open_clip_config.json").write_text(
        json.dumps({"model_cfg": settings, "preprocess_cfg": {}})
    )
    assert run("convert", "clip", "images.safetensors").code == 0
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        load_model("images.safetensors")(images), theirs.encode_image(images)
    )
    result = run("convert", "clip", "texts.safetensors", "--from", "open_clip_text")
    assert result.code == 0, result.err
    tokens = torch.randint(0, 30, (2, 6))
    torch.testing.assert_close(load_model("texts.safetensors")(tokens), theirs.encode_text(tokens))
    for arguments, message in (
        (("clip", "x", "--from", "open_clip_txt"), "family must be one of "),
        (("clip", "x", "--from", "timm"), "clip has no setting 'architecture'"),
        (("images.safetensors", "x", "--from", "timm"), "--from timm is for models of others, but"),
    ):
        (mistake,) = run("convert", *arguments).mistakes
        assert mistake.startswith(message)
        assert not Path("x").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_converted_ast_predicts_as_transformers_does(run):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_length=64,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=5,
        time_stride=7,
        id2label=dict(enumerate(NAMES)),
    )
    model = transformers.ASTForAudioClassification(config).eval()
    torch.nn.init.normal_(model.classifier.dense.weight)
    torch.nn.init.normal_(model.audio_spectrogram_transformer.embeddings.position_embeddings)
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=64)
    model.save_pretrained("ast")
    extractor.save_pretrained("ast")
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, 30_000).astype(np.float32)
    soundfile.write("bark.wav", waveform, 16_000, subtype="FLOAT")
    result = run("convert", "ast", "ours.safetensors")
    assert result.code == 0, result.err
    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
    truth = model(**inputs).logits.softmax(-1)[0]
    (found,) = diffmm.load("ours.safetensors").predict(["bark.wav"], top_k=3)
    assert found.label == NAMES[truth.argmax()]
    assert found.scores == pytest.approx(sorted(truth.tolist(), reverse=True), abs=1e-4)
    result = run("predict", "ours.safetensors", "bark.wav")
    assert result.code == 0, result.err
    assert found.label in result.out
