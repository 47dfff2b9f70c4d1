"""Trained contrastive models: similarity, zero-shot classification, features, and their errors."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.nn.functional import normalize

import diffmm
from datamodules import AudioTextData, ImageAudioTextData, ImageTextData
from datamodules.pairs import RenderedShapes
from diffmm.cli import main
from diffmm.cli.zero_shot import class_folders
from diffmm.models import (
    AudioConfig,
    BackboneConfig,
    ContrastiveConfig,
    ContrastiveModel,
    ImageConfig,
    ImageModel,
    TextTowerConfig,
)
from diffmm.models.job import Job
from diffmm.models.weights import save_model

TEXTS = ["a red star", "two", "a blue cross left of a green circle"]


def backbone(rope):
    return BackboneConfig(32, 2, 4, rope=rope, init_std=0.1)


def text_tower(max_length=40):
    return TextTowerConfig(259, max_length, backbone("none"), causal=False, pool="mean")


def image_model(max_length=40, **changes):
    image = ImageConfig(backbone=backbone("2d"), image_size=16, patch_size=8)
    return ContrastiveModel(
        ContrastiveConfig(image=image, text=text_tower(max_length), embed_dim=10, **changes)
    )


def reader_of(data):
    return data.describe_inputs()["reader"]


def saved(model, data, path):
    torch.manual_seed(0)
    model.job = Job(reader=reader_of(data), recipe="image_text/test")
    save_model(model, path)
    return path


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """An untrained model of images and texts in `run`, with three pictures in `pictures`."""
    monkeypatch.chdir(tmp_path)
    data = ImageTextData(RenderedShapes(4, 4), image_size=16, max_tokens=40)
    saved(image_model(), data, Path("run"))
    Path("pictures").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(256, size=(20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{number}.png")
    return diffmm.load("run")


FILES = [f"pictures/{number}.png" for number in range(3)]


def embedded(trained, texts=TEXTS):
    """Embeddings of the pictures and of texts, one by one."""
    model, reader = trained.model, trained.reader
    with torch.no_grad():
        media = [model.encode_image(reader.read(file)["images"][None]) for file in FILES]
        tokens = [torch.from_numpy(reader.read_text(text)["tokens"])[None] for text in texts]
        found = [model.encode_text(each, torch.tensor([each.shape[1]])) for each in tokens]
    return torch.cat(media), torch.cat(found)


def test_similarity_is_the_cosine_of_every_pair(trained):
    media, texts = embedded(trained)
    found = trained.similarity(FILES, TEXTS)
    torch.testing.assert_close(found, media @ texts.T)
    assert found.dtype == torch.float32
    assert len(found.unique()) == 9
    for same in ("pictures", [Image.open(file) for file in FILES]):
        torch.testing.assert_close(trained.similarity(same, TEXTS, batch_size=2), found)
    torch.testing.assert_close(trained.similarity(FILES[1], TEXTS[2]), found[1:2, 2:])
    assert trained.similarity([], TEXTS).shape == (0, 3)
    assert trained.similarity(FILES, []).shape == (3, 0)
    trained.model.train()
    with pytest.raises(ValueError, match="training mode: call model.eval.. before embedding"):
        trained.similarity(FILES, TEXTS)


@pytest.mark.parametrize("init_bias", [None, -3.0])
def test_zero_shot_scores_by_hand(init_bias, trained):
    model = image_model(init_bias=init_bias)
    trained = diffmm.TrainedModel(model, trained.job)
    names, templates = ["cat", "dog"], ["a {}", "{} and {}"]
    media, texts = embedded(trained, ["a cat", "cat and cat", "a dog", "dog and dog"])
    classes = normalize(texts.unflatten(0, (2, 2)).mean(1), dim=-1)
    logits = media @ classes.T / 0.07 + (init_bias or 0.0)
    expected = logits.softmax(1) if init_bias is None else logits.sigmoid()
    found = trained.zero_shot(FILES, names, templates=templates)
    for prediction, scores in zip(found, expected, strict=True):
        given = dict(zip(prediction.labels, prediction.scores, strict=True))
        assert [given[name] for name in names] == pytest.approx(scores.tolist(), abs=1e-5)
    assert trained.zero_shot(FILES[0], names).label in names
    assert trained.job.class_names is None


def test_features_are_what_the_projection_reads(trained):
    found = trained.features("pictures")
    assert found.shape == (3, 32)
    with torch.no_grad():
        projected = normalize(trained.model.image.head(found), dim=-1)
    torch.testing.assert_close(projected, embedded(trained)[0])


def test_attention_maps_are_those_of_the_image_tower(trained):
    found = trained.attention_maps(FILES[0])
    assert [layer.name for layer in found] == [f"backbone.blocks.{i}.attention" for i in range(2)]


def test_predict_with_labels(trained, capsys):
    labels = ["--labels", "cat, dog,bird", "--template", "a {}", "--template", "the {}"]
    assert main(["predict", "run", "pictures", *labels, "--output", "found.csv"]) == 0
    rows = list(csv.DictReader(Path("found.csv").read_text().splitlines()))
    expected = trained.zero_shot("pictures", ["cat", "dog", "bird"], templates=["a {}", "the {}"])
    assert [row["label"] for row in rows] == [each.label for each in expected]
    assert [float(row["score"]) for row in rows] == pytest.approx([each.score for each in expected])
    assert [row["file"] for row in rows] == FILES
    capsys.readouterr()
    assert main(["predict", "run", FILES[0], "--labels", "cat,dog"]) == 0
    assert capsys.readouterr().out.startswith("pictures/0.png: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which has no classes: name them (zero_shot; on the command line: --labels a,b,c)"),
        (["--labels", "cat,cat"], "class_names must be different and not empty, got 'cat' twice"),
        (["--labels", "cat,,dog"], "class_names must be different and not empty, got ''"),
        (["--template", "a {}"], "--template is for the labels of --labels a,b,c"),
        (
            ["--labels", "cat", "--template", "a"],
            "a template must contain {}, which stands for the",
        ),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, trained, capsys):
    assert main(["predict", "run", FILES[0], *arguments]) == 2
    assert message in capsys.readouterr().err


def test_validation_on_a_folder_of_classes(trained, capsys):
    """Classes are the names of the folders; two of the three pictures are of what is predicted."""
    names = ["cat", "dog"]
    labels = [each.label for each in trained.zero_shot(FILES, names, templates=["a {}"])]
    others = {"cat": "dog", "dog": "cat"}
    for file, label in zip(FILES, [labels[0], labels[1], others[labels[2]]], strict=True):
        Path("classes", label).mkdir(parents=True, exist_ok=True)
        Path(file).rename(Path("classes", label, Path(file).name))
    for name in names:  # both are classes of the folder
        Path("classes", name).mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(Path("classes", name, "black.png"))
    command = ["validate", "run", "--data", "classes", "--template", "a {}", "--output", "out.json"]
    assert main(command) == 0
    assert "zero-shot accuracy on classes: 0.6 (5 files)" in capsys.readouterr().out
    found = json.loads(Path("out.json").read_text())
    assert found["metrics"] == {"zero_shot/accuracy": 0.6}
    assert sum(map(sum, found["confusion_matrix"])) == 5
    assert main([*command[:4], "--data.batch_size", "2"]) == 2
    assert "--data.batch_size is a setting of a recipe: classifying" in capsys.readouterr().err
    assert main(["validate", "run", "--data", "run", "--template", "a {}"]) == 2
    assert "--template is for a model that compares images or sounds" in capsys.readouterr().err


def test_underscores_in_names_of_folders_are_spaces(trained, monkeypatch):
    given, embed = [], diffmm.hub.trained.embed_classes
    monkeypatch.setattr(
        "diffmm.hub.trained.embed_classes",
        lambda model, reader, names, *rest: (
            given.extend(names) or embed(model, reader, names, *rest)
        ),
    )
    for folder in ("golden_retriever", "tabby cat"):
        Path("classes", folder).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(Path("classes", folder, "1.png"))
    Path("classes/README.txt").write_text("Two classes.")
    Path("classes/__MACOSX").mkdir()
    assert main(["validate", "run", "--data", "classes"]) == 0
    assert given == ["golden retriever", "tabby cat"]


def test_folders_of_classes(tmp_path):
    def found(folder, split="val"):
        return [str(f.relative_to(tmp_path)) for f in class_folders(tmp_path / folder, split)]

    for name in ("all/cat", "all/dog/young", "both/Training/cat", "both/dev/cat", "both/dev/dog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").touch()
    assert found("all") == ["all/cat", "all/dog"]
    assert found("both") == ["both/dev/cat", "both/dev/dog"]
    assert found("both", "test") == found("none") == found("all/cat") == []
    (tmp_path / "all/dog/young/.1.txt").touch()
    assert found("all")
    (tmp_path / "all/dog/young/1.TXT").touch()
    assert found("all") == []
    (tmp_path / "all/dog/young/1.TXT").unlink()
    (tmp_path / "all/__MACOSX").mkdir()
    (tmp_path / "all/__MACOSX/1.txt").touch()
    for name in ("README.txt", "dog/notes.txt", "LICENSE"):
        (tmp_path / "all" / name).touch()
    assert found("all") == ["all/cat", "all/dog"]
    for name in ("loose.png", "labels.csv", "dog/notes.png", "dog/shard.tar"):
        (tmp_path / "all" / name).touch()
        assert found("all") == []
        (tmp_path / "all" / name).unlink()
    (tmp_path / "all/texts").mkdir()
    (tmp_path / "all/texts/1.txt").touch()
    assert found("all") == []
    for split in ("train", "val"):
        (tmp_path / "pairs" / split).mkdir(parents=True)
        (tmp_path / "pairs" / split / "1.png").touch()
    assert found("pairs") == []


def test_labels_are_for_files(trained, capsys):
    assert main(["predict", "run", "--labels", "a,b"]) == 2
    assert "--labels is for files: give them after the run" in capsys.readouterr().err


def test_mistakes_in_python(trained):
    with pytest.raises(ValueError, match="class_names must be a list of at least one string"):
        trained.zero_shot(FILES, "cat")
    with pytest.raises(ValueError, match=r"templates must be a list of at least one .*, got \[\]"):
        trained.zero_shot(FILES, ["cat"], templates=[])
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        trained.similarity(FILES, TEXTS, batch_size=0)
    with pytest.raises(ValueError, match="a text must have at least one token, got ''"):
        trained.similarity(FILES, [""])
    assert trained.similarity(FILES, "a" * 39).shape == (3, 1)
    with pytest.raises(ValueError, match="'aaa.* has more than the 40 tokens that the model takes"):
        trained.similarity(FILES, ["short", "a" * 40])
    with pytest.raises(ValueError, match="contains a ContrastiveModel, which has no classes"):
        trained.predict(FILES[0])


def test_other_models_compare_nothing(tmp_path):
    model = ImageModel(ImageConfig(backbone=backbone("2d"), image_size=16, num_classes=3))
    trained = diffmm.load(save_model(model, tmp_path))
    for call in (trained.similarity, trained.zero_shot):
        with pytest.raises(ValueError, match="contains an ImageModel: only contrastive models"):
            call([], ["a text"])


def test_a_reader_that_does_not_fit_is_refused(trained):
    other = diffmm.load("run", reader=reader_of(ImageTextData(RenderedShapes(4, 4), image_size=8)))
    with pytest.raises(ValueError, match=r"image_size=\(8, 8\), but its model has image_size=16"):
        other.similarity(FILES, TEXTS)
    data = ImageTextData(RenderedShapes(4, 4), image_size=16, max_tokens=50)
    other = diffmm.load("run", reader=reader_of(data))
    with pytest.raises(ValueError, match="max_tokens=50, but the texts .* at most max_length=40"):
        other.similarity(FILES, TEXTS)
    data = AudioTextData(sample_rate_hz=8000, max_tokens=40)
    other = diffmm.load("run", reader=reader_of(data))
    with pytest.raises(ValueError, match="reads sound files, but the model has no audio tower"):
        other.similarity(FILES, TEXTS)


def test_sounds_are_compared_whatever_their_padding(tmp_path):
    audio = AudioConfig(backbone=backbone("2d"), sample_rate_hz=8000, num_mels=32)
    model = ContrastiveModel(ContrastiveConfig(audio=audio, text=text_tower(), embed_dim=10))
    data = AudioTextData(sample_rate_hz=8000, max_tokens=40)
    trained = diffmm.load(saved(model, data, tmp_path / "run"))
    sounds = [(0.1 * torch.randn(count).numpy(), 8000) for count in (4000, 9000)]
    found = trained.similarity(sounds, TEXTS)
    alone = torch.cat([trained.similarity(sound, TEXTS) for sound in sounds])
    torch.testing.assert_close(found, alone)
    assert trained.zero_shot(sounds, ["cat", "dog"])[1].label in ("cat", "dog")


def test_images_and_sounds_in_any_order(tmp_path):
    """One model takes both, also in one list or one folder."""
    towers = {
        "image": ImageConfig(backbone=backbone("2d"), image_size=16),
        "audio": AudioConfig(backbone=backbone("2d"), sample_rate_hz=8000, num_mels=32),
    }
    model = ContrastiveModel(ContrastiveConfig(**towers, text=text_tower(), embed_dim=10))
    data = ImageAudioTextData(
        RenderedShapes(4, 4), image_size=16, sample_rate_hz=8000, max_tokens=40
    )
    trained = diffmm.load(saved(model, data, tmp_path / "run"))
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(4):
        if number % 2:
            noise = np.random.default_rng(number).uniform(-0.5, 0.5, 2000 * number)
            soundfile.write(folder / f"{number}.wav", noise, 8000)
        else:
            Image.new("RGB", (16, 16), (60 * number, 200, 0)).save(folder / f"{number}.png")
    files = sorted(map(str, folder.iterdir()))
    alone = torch.cat([trained.similarity(file, TEXTS) for file in files])
    assert len(alone.unique()) == alone.numel()
    torch.testing.assert_close(trained.similarity(str(folder), TEXTS), alone)
    torch.testing.assert_close(trained.similarity(files[::-1], TEXTS, batch_size=3), alone.flip(0))
    found = trained.zero_shot(files, ["cat", "dog"])
    assert [each.file for each in found] == files
    single = [trained.zero_shot(file, ["cat", "dog"]) for file in files]
    assert [each.label for each in found] == [each.label for each in single]
    assert [e.score for e in found] == pytest.approx([e.score for e in single], abs=1e-5)
    features = trained.features(files)
    torch.testing.assert_close(features[[3]], trained.features(files[3]))
    assert features.shape == (4, model.image.num_features)
    names = [maps.name for file in files[:2] for maps in trained.attention_maps(file)]
    assert len(names) == sum(towers[name].backbone.depth for name in towers)


def test_a_folder_for_the_hub_comes_back(trained, tmp_path):
    trained.save_pretrained("folder")
    again = diffmm.load("folder")
    assert torch.equal(again.similarity(FILES, TEXTS), trained.similarity(FILES, TEXTS))
    card = Path("folder/README.md").read_text()
    assert 'trained.similarity("a_file", ["a text", "another text"])' in card
    assert "| image size | 16 |" in card
    assert "| vocabulary | 259 |" in card
