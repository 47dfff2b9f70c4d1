"""`diffmm validate RUN --data PATH` and `test`: a run on other labeled data."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import diffmm
from datamodules.image import Digits
from diffmm.cli import main
from diffmm.models.weights import save_model


@pytest.fixture(scope="module")
def trained(recipe_in, tmp_path_factory):
    """A folder with a run that reads digits, and its validation images of 3 and 7 in a folder of
    classes."""
    folder = tmp_path_factory.mktemp("trained")
    path = recipe_in(
        folder,
        **{"trainer.max_steps": 60, "trainer.val_check_interval": 60},
        **{"model.model.config.backbone.depth": 2},
        **{"trainer.limit_val_batches": 1.0, "model.schedule.warmup_steps": 5, "vars.steps": 60},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", str(path), "--name", "first"]) == 0
    splits = Digits().splits()
    for number, (label,) in enumerate(splits.val.labels):
        if label in (3, 7):
            photos = folder / "photos" / str(label)
            photos.mkdir(parents=True, exist_ok=True)
            splits.val.read(number).save(photos / f"{number}.png")
    return folder


@pytest.fixture
def digits_run(run, trained):
    """A copy of both in the working directory."""
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    return Path("runs/recipe/first")


def results(run, *arguments):
    Path("found.json").unlink(missing_ok=True)
    result = run(*arguments, "--output", "found.json")
    assert result.code == 0, result.err
    return json.loads(Path("found.json").read_text()), result.out


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_classes_are_matched_by_name_and_inputs_prepared_as_in_the_run(run, digits_run, verb):
    expected, _ = results(run, verb, digits_run)
    rows = {entry["class"]: entry for entry in expected["classes"] if entry["class"] in "37"}
    found, out = results(run, verb, digits_run, "--data", "photos")
    assert "data: photos has 73 samples of 2 of the model's 10 classes" in out
    assert "no test split" not in run(verb, digits_run, "--data", "photos").err
    entries = {entry["class"]: entry for entry in found["classes"]}
    assert len(entries) == 10
    for name, entry in rows.items():
        assert entries[name] == entry
    assert sum(entry["samples"] for entry in entries.values()) == 73
    stage = "val" if verb == "validate" else "test"
    right = sum(entry["samples"] * entry["accuracy"] for entry in rows.values())
    assert found["metrics"][f"{stage}/accuracy"] == pytest.approx(right / 73)


def test_a_table_and_splits_that_are_there(run, digits_run):
    folder, _ = results(run, "validate", digits_run, "--data", "photos")
    with open("photos.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "split"])
        for path in sorted(Path("photos").rglob("*.png")):
            writer.writerow([path, path.parent.name, "val" if path.parent.name == "3" else "train"])
    table, out = results(run, "validate", digits_run, "--data", "photos.csv")
    assert "73 samples" not in out
    three = next(entry for entry in folder["classes"] if entry["class"] == "3")
    assert next(entry for entry in table["classes"] if entry["class"] == "3") == three
    (mistake,) = run("test", digits_run, "--data", "photos.csv").mistakes
    assert "photos.csv has no rows to evaluate: column 'split' never contains 'test'" in mistake
    for split in ("train", "val"):
        shutil.copytree("photos", f"splits/{split}")
    assert results(run, "validate", digits_run, "--data", "splits")[0] == folder
    (mistake,) = run("test", digits_run, "--data", "splits").mistakes
    assert mistake == (
        "--data splits has train and val, but no test: give the folder or table to evaluate"
    )


def test_the_runs_own_data_are_not_needed(run, recipe):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for number in range(20):
            path = Path(f"own/{name}/{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(path)
    settings = ("--data.batch_size", "4", "--name", "a")
    assert run("fit", "--config", recipe(), "--data", "own", *settings).code == 0
    told = "; the run was trained on them, except for what it held out (leave out --data to"
    assert told in results(run, "validate", "runs/recipe/a", "--data", "own")[1]
    Path("own").rename("new")
    found, out = results(run, "validate", "runs/recipe/a", "--data", "new")
    assert found["metrics"]
    assert told not in out
    Path("new/dog").rename("new/dogs")
    (mistake,) = run("validate", "runs/recipe/a", "--data", "new").mistakes
    assert mistake.endswith(
        "new has classes that the model does not: dogs; the model's are cat, dog; did you mean "
        "'dog'?"
    )
    Path("labels.csv").write_text("file,label\nnew/cat/1.png,cow\n")
    (mistake,) = run("validate", "runs/recipe/a", "--data", "labels.csv").mistakes
    assert "label 'cow', which is not one of the 2 classes of the model" in mistake
    (mistake,) = run("validate", "runs/recipe/a", "--data", "nowhere").mistakes
    assert mistake.startswith("--data nowhere: no such file or folder")


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_weights_in_no_run_are_evaluated_on_labeled_data(run, digits_run, verb):
    expected, _ = results(run, verb, digits_run, "--data", "photos")
    diffmm.load(digits_run).save("alone")
    found, out = results(run, verb, "alone", "--data", "photos")
    assert "data: photos has 73 samples of 2 of the model's 10 classes" in out
    # Batches of another size round differently.
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-4)
    assert found["classes"] == expected["classes"]
    (mistake,) = run(verb, "alone", "--data", "photos", "--sorted-classes").mistakes
    assert mistake == (
        "--sorted-classes: photos has 2 folders of classes, but the model has 10 classes"
    )
    for number in range(10):
        Path(f"wnids/n0{number}").mkdir(parents=True)
        shutil.copy(next(Path("photos/3").iterdir()), f"wnids/n0{number}")
    found, out = results(run, verb, "alone", "--data", "wnids", "--sorted-classes")
    right = {entry["class"] for entry in found["classes"] if entry["accuracy"] == 1}
    assert right == {"n03"}
    (mistake,) = run(verb, digits_run, "--data", "wnids", "--sorted-classes").mistakes
    assert mistake.startswith("--sorted-classes is for a classifier that is in no run")
    (mistake,) = run(verb, "alone", "--data", "photos", "--data.batch_size", "3").mistakes
    assert mistake == (
        "--data.batch_size is a setting of a recipe, but alone is in no run: give its recipe "
        "(--config RECIPE)"
    )
    (mistake,) = run(verb, "alone", "--data", "nowhere").mistakes
    assert mistake.startswith("--data nowhere: no such file or folder")
    (mistake,) = run(verb, "nothing", "--data", "photos").mistakes
    assert mistake == "there is no file of weights at nothing"


def test_weights_without_names_and_texts_are_refused(run, digits_run, recipe, text_changes):
    model = diffmm.load(digits_run).model
    model.job = None
    weights = save_model(model, "plain")
    command = ("validate", "--config", digits_run / "config.yaml", "--weights", weights)
    (mistake,) = run(*command, "--data", "photos").mistakes
    assert "does not name the classes of its model" in mistake
    path = recipe("text/stdlib_tiny", **text_changes)
    assert run("fit", "--config", path, "--name", "text").code == 0
    (mistake,) = run("validate", "runs/recipe/text", "--data", "photos").mistakes
    assert mistake.startswith("--data photos: TextData cannot evaluate other data by a path")


def test_sounds_of_another_rate_are_converted(run, recipe):
    path = recipe(
        "audio/sound_events_tiny",
        **{"data.source.num_clips": 64, "data.source.num_val_clips": 16},
    )
    assert run("fit", "--config", path, "--name", "sound").code == 0
    tone = 0.5 * np.sin(np.arange(8000) / 9)
    Path("new/tone").mkdir(parents=True)
    for number, rate_hz in enumerate((8000, 11025, 22050)):
        soundfile.write(f"new/tone/{number}.wav", tone, rate_hz)
    found, out = results(run, "validate", "runs/recipe/sound", "--data", "new")
    assert "new has 3 samples of 1 of the model's" in out
    assert {entry["class"]: entry["samples"] for entry in found["classes"]}["tone"] == 3
