"""`diffmm validate`, `test` and `predict`."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import diffmm
from datamodules import ImageTextData
from diffmm.checkpoint_folders import find_state
from diffmm.cli import main
from diffmm.cli.evaluate import use_other_data
from diffmm.cli.predictions import joined
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.errors import InputError


@pytest.fixture(scope="module")
def first(recipe_in, tmp_path_factory):
    """A folder with a recipe and one of its runs."""
    folder = tmp_path_factory.mktemp("first")
    path = recipe_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", str(path), "--name", "first"]) == 0
    return folder


@pytest.fixture
def trained(run, first, tmp_path):
    """A recipe, and the weights of one of its runs: copies of `first`."""
    shutil.copytree(first / "runs", "runs")
    return Path(shutil.copy(first / "recipe.yaml", tmp_path)), Path("runs/recipe/first")


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_run_alone_is_enough(run, trained, verb):
    """The config and the newest checkpoint of a run, given as a folder or as a file."""
    path, weights = trained
    expected = run(verb, "--config", path, "--weights", weights).out
    for given in (
        weights,
        weights / "checkpoints",
        find_state(weights).parent,
        find_state(weights),
    ):
        result = run(verb, given)
        assert result.code == 0, result.err
        assert table_of(result.out) == table_of(expected)
        assert result.out.count("true class \\ predicted") == 1


def test_a_test_on_validation_samples_says_so(run, trained):
    path, weights = trained
    told = "diffmm: warning: no test split: the validation samples are used, among which the best"
    assert told in run("test", weights).err
    assert told not in run("validate", weights).err
    assert told not in run("check", path, "--read-data").err


@pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero")
def test_a_test_without_samples_says_so(run, recipe, text_changes):
    run("fit", "--config", recipe("text/stdlib_tiny", **text_changes), "--name", "first")
    result = run("test", "runs/recipe/first", "--data.test_fraction", "0")
    assert "diffmm: warning: no test split: nothing is measured" in result.err


def table_of(out: str) -> list[str]:
    """The lines with metrics and classes, without progress lines."""
    return [line for line in out.splitlines() if re.match(r"│|\d ", line)]


@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("option", ["--weights", "--ckpt_path"])
def test_metrics_are_printed_and_nothing_is_written(run, trained, verb, option):
    path, weights = trained
    before = sorted(Path().rglob("*"))
    result = run(verb, "--config", path, option, weights)
    assert result.code == 0, result.err
    stage = "val" if verb == "validate" else "test"
    assert f"{stage}/accuracy" in result.out
    assert sorted(Path().rglob("*")) == before


def test_the_weights_are_the_given_ones(run, trained):
    path, weights = trained
    state = torch.load(find_state(weights), weights_only=True)
    state["state_dict"]["model.head.weight"].zero_()
    state["state_dict"]["model.head.bias"].fill_(0.0)
    torch.save(state, "changed.ckpt")
    printed = []
    for given in (weights, "changed.ckpt"):
        result = run("validate", "--config", path, "--weights", given)
        printed.append(re.search(r"val/loss\D+([\d.]+)", result.out)[1])
    # With zeros as the head's weights, all ten classes are equally likely.
    assert float(printed[1]) == pytest.approx(2.302585, abs=1e-4)
    assert printed[0] != printed[1]


def test_predictions_are_a_dict_of_tensors(run, trained):
    path, weights = trained
    result = run("predict", "--config", path, "--weights", weights)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == "predictions.pt"
    predictions = torch.load("predictions.pt", weights_only=True)
    count = len(predictions["index"])
    assert predictions["index"].tolist() == list(range(count))
    assert predictions["probabilities"].shape == (count, 10)
    result = run("predict", "--config", path, "--weights", weights)
    assert result.mistakes == ["predictions.pt exists already: choose another --output"]
    assert "runs" in os.listdir()


def test_predictions_of_unequal_batches_stay_apart():
    batches = [
        {"index": torch.arange(2), "prediction": torch.zeros(2, 3)},
        {"index": torch.arange(2, 3), "prediction": torch.zeros(1, 4)},
    ]
    predictions = joined(batches)
    assert predictions["index"].tolist() == [0, 1, 2]
    assert [part.shape for part in predictions["prediction"]] == [(2, 3), (1, 4)]


def test_a_run_alone_predicts_its_test_data(run, trained):
    path, weights = trained
    assert run("predict", weights).code == 0
    assert run("predict", "--config", path, "--weights", weights, "--output", "b.pt").code == 0
    one, other = (torch.load(name, weights_only=True) for name in ("predictions.pt", "b.pt"))
    assert one["probabilities"].equal(other["probabilities"])
    assert run("predict", weights, "--output", "rows.csv").code == 0
    with open("rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # Digits have no files, so that their numbers are printed instead.
    assert [row["file"] for row in rows] == [str(index) for index in one["index"].tolist()]
    best = one["probabilities"].max(dim=1)
    assert [row["label"] for row in rows] == [str(label) for label in best.indices.tolist()]
    scores = torch.tensor([float(row["score"]) for row in rows])
    torch.testing.assert_close(scores, best.values, atol=1e-5, rtol=1e-5)


def test_classes_are_written_with_all_metrics(run, trained):
    _, weights = trained
    result = run("validate", weights, "--output", "v.json")
    assert result.code == 0, result.err
    found = json.loads(Path("v.json").read_text())
    matrix, metrics = torch.tensor(found["confusion_matrix"]), found["metrics"]
    assert matrix.sum() > 0
    assert metrics["val/accuracy"] == pytest.approx(float(matrix.trace() / matrix.sum()))
    for number, entry in enumerate(found["classes"]):
        assert entry["class"] == str(number)
        assert entry["samples"] == matrix[number].sum()
        share = matrix[number, number] / matrix[number].sum()
        assert entry["accuracy"] is None or entry["accuracy"] == pytest.approx(float(share))
    assert run("test", weights, "--output", "t.csv").code == 0
    with open("t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [str(number) for number in range(10)]
    assert list(rows[0])[:4] == ["class", "samples", "accuracy", "predicted 0"]
    for row in rows:
        counts = [int(count) for name, count in row.items() if name.startswith("predicted ")]
        assert sum(counts) == int(row["samples"])
        right = int(row[f"predicted {row['class']}"])
        if row["accuracy"]:
            assert float(row["accuracy"]) == pytest.approx(right / sum(counts))


def test_metrics_of_a_text_model_are_written_too(run, recipe, text_changes):
    path = recipe("text/stdlib_tiny", **text_changes)
    assert run("fit", "--config", path, "--name", "text").code == 0
    for name in ("v.json", "v.csv"):
        assert run("validate", "runs/recipe/text", "--output", name).code == 0
    metrics = json.loads(Path("v.json").read_text())["metrics"]
    assert set(metrics) == {"val/loss", "val/perplexity", "val/bits_per_byte"}
    assert Path("v.csv").read_text().splitlines()[0] == "metric,value"
    assert run("predict", "runs/recipe/text").code == 0
    assert torch.load("predictions.pt", weights_only=True)


def test_rows_are_of_classes(run, recipe):
    assert run("fit", "--config", recipe("image/digits_mae_tiny"), "--name", "mae").code == 0
    (mistake,) = run("predict", "runs/recipe/mae", "--output", "p.csv").mistakes
    assert mistake.startswith("MaskedAutoencoding predicts no classes")


@pytest.mark.parametrize("multi_label", [False, True])
def test_several_labels_are_measured_by_average_precision(run, recipe, multi_label):
    changes = {"data.source.num_clips": 64, "data.source.num_val_clips": 40}
    name = "audio/sound_events_multilabel_tiny" if multi_label else "audio/sound_events_tiny"
    path = recipe(name, **changes, **{"trainer.limit_val_batches": 1.0})
    assert run("fit", "--config", path, "--name", "sound").code == 0
    result = run("validate", "runs/recipe/sound", "--output", "v.json")
    assert result.code == 0, result.err
    found = json.loads(Path("v.json").read_text())
    assert ("confusion_matrix" in found) != multi_label
    assert [entry["class"] for entry in found["classes"]][:2] == ["tone", "harmonic"]
    if multi_label:
        values = [entry["average_precision"] for entry in found["classes"]]
        mean = sum(v for v in values if v is not None) / sum(v is not None for v in values)
        assert found["metrics"]["val/mean_average_precision"] == pytest.approx(mean, abs=1e-6)
        assert "average precision" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate"], "diffmm validate needs a RUN, or --config RECIPE and --weights WEIGHTS"),
        (["validate", "nowhere"], "there is no file of weights at nowhere"),
        (["validate", "a.ckpt"], "a.ckpt is not in a run, because there is no config.yaml: diffmm"),
        (["test", "a", "--weights", "b"], "a and --weights b: give one of them"),
        (["test", "a", "--output", "x.yaml"], "--output must end in one of .json, .csv"),
    ],
)
def test_what_is_missing_is_told(run, arguments, message):
    Path("a.ckpt").touch()
    result = run(*arguments)
    assert result.code == 2
    (mistake,) = result.mistakes
    assert mistake.startswith(message)


def test_settings_of_the_recipe_stand_beside_a_run(run, trained):
    _, weights = trained
    result = run("validate", weights, "--trainer.limit_val_batches", "2", "--data.batch_size=5")
    assert result.code == 0, result.err
    counts = [int(line.split()[-2]) for line in table_of(result.out) if line[0].isdigit()]
    assert sum(counts) == 10


def test_what_a_model_is_for_goes_on_with_a_run_and_begins_anew_with_another(run, recipe, trained):
    _, weights = trained
    assert run("fit", "--resume", weights, "--trainer.max_steps", "3").code == 0
    job = diffmm.load(weights).job
    assert (job.recipe, len(job.class_names)) == ("recipe", 10)
    assert torch.load(find_state(weights), weights_only=True)["global_step"] == 3
    for label in ("no", "yes"):
        Path("folder", label).mkdir(parents=True)
        for number in range(8):
            Image.new("L", (9, 9), number).save(f"folder/{label}/{number}.png")
    path = recipe(
        **{
            "model.model.config.num_classes": 2,
            "data.batch_size": 4,
            "data.source": {
                "class_path": "datamodules.image.ImageFolder",
                "init_args": {"train": "folder", "val": "folder"},
            },
            "data.channels": 1,
        }
    ).rename("other.yaml")
    result = run("finetune", "--config", path, "--weights", weights, "--name", "new")
    assert result.code == 0, result.err
    trained_anew = diffmm.load("runs/other/new")
    assert trained_anew.class_names == ("no", "yes")
    assert trained_anew.job.recipe == "other"
    # The source has other defaults than those of digits.
    assert trained_anew.job.reader["init_args"]["crop_pct"] == 0.875
    result = run("predict", "runs/other/new", "--output", "rows.csv")
    assert result.code == 0, result.err
    assert "folder/yes/7.png," in Path("rows.csv").read_text()


def test_pairs_are_evaluated_without_classes(tmp_path):
    data = ImageTextData(image_size=8)
    with pytest.raises(InputError, match="has no images .extensions of images"):
        use_other_data(data, str(tmp_path), "no weights", "validate")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nothing\nblack")
    summary = use_other_data(data, str(tmp_path), "no weights", "validate")
    assert summary == f"{tmp_path} has 1 image with 2 texts"


@pytest.mark.parametrize(
    "arguments",
    [
        ("validate", "RUN"),
        ("validate", "RUN", "--data", "photos"),
        ("predict", "RUN", "photos"),
        ("analyze", "RUN", "--text", "a"),
        ("export", "RUN", "new.safetensors", "--to", "safetensors"),
        ("generate", "RUN", "a prompt"),
    ],
)
def test_a_run_without_a_checkpoint_and_a_folder_of_runs_are_named(run, arguments):
    for name in ("a", "b", "c", "d"):
        folder = Path("runs/image/digits_tiny") / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(find_recipe("image/digits_tiny").read_text())
    Path("photos").mkdir()
    Image.new("L", (8, 8)).save("photos/a.png")
    one = "runs/image/digits_tiny/a"
    (mistake,) = run(*(one if a == "RUN" else a for a in arguments)).mistakes
    assert mistake.endswith(
        f"{one} has no checkpoint yet: continue the run until it has one "
        f"(diffmm fit --resume {one})"
    )
    for folder, runs in (
        ("runs/image/digits_tiny", "a, b, c, ..."),
        ("runs/image", "digits_tiny/a, digits_tiny/b, digits_tiny/c, ..."),
    ):
        result = run(*(folder if a == "RUN" else a for a in arguments))
        if arguments[0] != "analyze" or folder == "runs/image":
            (mistake,) = result.mistakes
            assert mistake.endswith(
                f"{folder} is a folder of runs ({runs}): name one of them, such as {one}"
            )
