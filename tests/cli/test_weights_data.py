"""`diffmm analyze FILE` and `export FILE --quantize`: the data of weights that are in no run."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffmm
from datamodules.image import ImageReader
from datamodules.text import TextReader
from diffmm.analysis.batches import evaluate
from diffmm.cli.weights_data import labelled_data, validation_batches
from diffmm.models.image import ImageConfig
from diffmm.models.job import Job
from diffmm.models.weights import save_model

COLORS = ("blue", "green", "red")
QUANTIZE = ("--to", "safetensors", "--quantize", "int8")


def classifier(path, names=COLORS, *, recipe="image/finetune", multi_label=False):
    """A file of a classifier of 16 x 16 pixels, with a mean and a deviation of its own."""
    backbone = diffmm.BackboneConfig(32, 1, 2, attention="diff_v2", rope="2d")
    size = (16, 16)
    model = diffmm.ImageModel(
        ImageConfig(
            backbone=backbone, image_size=size, patch_size=8, in_channels=3, num_classes=len(names)
        )
    )
    reader = ImageReader(
        image_size=size,
        channels=3,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7),
    )
    model.job = Job(reader.describe(), names, multi_label, recipe)
    return save_model(model.eval(), path)


def images(folder, names):
    rng = np.random.default_rng(0)
    for name in names:
        place = Path(folder, name)
        place.mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")


@pytest.mark.parametrize("verb", ["analyze", "export"])
def test_a_placeholder_of_the_recipe_is_not_read(run, verb):
    """Even if there is such a folder."""
    classifier("up.safetensors")
    images("data/images", ("ant", "yak", "zebra"))
    arguments = ["up.safetensors", *(("small", *QUANTIZE) if verb == "export" else ())]
    result = run(verb, *arguments)
    assert result.code == 2
    (mistake,) = result.mistakes
    assert "its recipe image/finetune names no data, only a place for them (data/images)" in mistake
    assert "give data with --data PATH" in mistake
    assert ("--limit 0" in mistake) == (verb == "export")
    result = run(verb, *arguments, "--data", "data/images")
    assert result.code == 2
    assert "has classes that the model does not: ant, yak, zebra" in result.err


def test_other_data_are_prepared_by_the_reader_of_the_file(run):
    file = classifier("up.safetensors")
    images("photos", COLORS)
    result = run("analyze", file, "--data", "photos", "--csv", "tables")
    assert result.code == 0, result.err
    assert "224" not in result.err
    trained = diffmm.load(file)
    data, _ = labelled_data(trained, "photos", COLORS, "val")
    wanted = evaluate(trained.model, list(data.val_dataloader()))
    head, _, row, *_ = result.out.splitlines()
    found = dict(zip(head.split(), row.split(), strict=True))
    assert found["samples"] == "9"
    assert float(found["loss"]) == pytest.approx(wanted["loss"], abs=1e-3)
    result = run("export", file, "small", *QUANTIZE, "--data", "photos")
    assert result.code == 0, result.err
    before = re.match(r"on 1 batches of the validation data: loss (\S+) ->", result.out)
    assert float(before[1]) == pytest.approx(wanted["loss"], abs=1e-3)
    (mistake,) = run("export", file, "new", "--to", "onnx", "--data", "photos").mistakes
    assert mistake.startswith("--data photos is for what --quantize measures")


@pytest.mark.parametrize("source", ["table", "folder"])
def test_several_labels(run, source):
    file = classifier("up.safetensors", multi_label=True)
    images("photos", COLORS)
    with open("labels.csv", "w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["file", "label"])
        rows.writerows([["photos/red/0.png", "red;blue"], ["photos/blue/0.png", "blue"]])
    path = "labels.csv" if source == "table" else "photos"
    found, _ = validation_batches(diffmm.load(file), file, path, trust=False, way_out="")
    (batch,) = found
    assert batch["labels"].shape == (2 if source == "table" else 9, 3)
    if source == "table":
        assert batch["labels"].tolist() == [[1, 0, 1], [1, 0, 0]]
    assert run("validate", file, "--data", path).code == 0


def test_installed_data_with_other_classes_are_refused(run):
    file = classifier("up.safetensors", recipe="image/digits_tiny")
    (mistake,) = run("analyze", file).mistakes
    assert "its classes (blue, green, red) are not those of its recipe" in mistake
    assert "(0, 1, 2, ...): give its data with --data PATH" in mistake


def test_installed_data_are_prepared_by_the_reader_of_the_file(run):
    names = tuple(map(str, range(10)))
    file = classifier("up.safetensors", names, recipe="image/digits_tiny")
    found, _ = validation_batches(diffmm.load(file), file, None, trust=False, way_out="")
    assert next(iter(found))["images"].shape[1:] == (3, 16, 16)


def test_texts_are_as_long_as_the_model_takes(run, tmp_path):
    model = diffmm.create_model("text/stdlib_tiny", depth=1, max_length=64)
    model.job = Job(TextReader(tokenizer="bytes").describe(), recipe="text/stdlib_tiny")
    file = save_model(model, "text.safetensors")
    found, special = validation_batches(diffmm.load(file), file, None, trust=False, way_out="")
    assert next(iter(found))["tokens"].shape[1] == 64
    assert special
    Path("text.txt").write_text("Some words. " * 20)
    result = run("export", file, "small", *QUANTIZE, "--data", "text.txt")
    assert result.out.startswith("on 1 batches of the validation data: loss"), result.err


def test_a_page_without_a_measurement_is_a_failure(run, monkeypatch):
    file = classifier("up.safetensors")
    images("photos", COLORS)

    def fail(*arguments, **others):
        raise ValueError("it cannot be measured")

    monkeypatch.setattr(type(diffmm.load(file).model), "forward", fail)
    result = run("analyze", file, "--data", "photos", "--output", "page.html")
    assert result.code == 2
    assert result.mistakes == ["nothing was measured, for the reasons above"]
    assert "it cannot be measured" in result.err
    assert Path("page.html").is_file()
