"""`diffmm predict RUN PATH...` for files and folders."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from PIL import Image

import diffmm
from diffmm.cli import prediction_files
from diffmm.models.job import Job
from diffmm.models.weights import save_model

READER = {
    "class_path": "datamodules.image.ImageReader",
    "init_args": {
        "image_size": [8, 8],
        "channels": 1,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.5],
        "std": [0.5],
    },
}
NAMES = ("one", "two", "three, four")


@pytest.fixture
def weights(tmp_path):
    """A file with a model of three classes."""
    torch.manual_seed(0)
    model = diffmm.create_model("image/digits_tiny", num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    trained = diffmm.TrainedModel(model, Job(reader=READER, class_names=NAMES, recipe="mine"))
    return trained.save(tmp_path / "model.safetensors")


@pytest.fixture
def pictures(run):
    """Images in folders of the working directory."""
    rng = np.random.default_rng(0)
    for name in ("b.png", "a.PNG", "c/d.jpg", "c/.hidden.png", "c/notes.txt", "été.png"):
        path = Path("pictures", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".txt"):
            path.write_text("no picture")
        else:
            pixels = rng.integers(0, 255, (20, 30), np.uint8)
            Image.fromarray(pixels).save(path, format="JPEG" if "jpg" in name else "PNG")
    return Path("pictures")


FILES = ["pictures/a.PNG", "pictures/b.png", "pictures/c/d.jpg", "pictures/été.png"]


def rows_of(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) if "score" in k else v for k, v in row.items()} for row in rows]


def test_files_that_a_folder_search_skips_are_counted(run, weights, pictures):
    (pictures / "c" / "e.avif").write_text("another format")
    result = run("predict", weights, pictures, "--output", "out.csv")
    assert result.code == 0, result.err
    assert "pictures has 2 other files that are skipped (.avif, .txt): only .jpg, " in result.err
    assert run("predict", weights, pictures / "a.PNG").err.count("skipped") == 0


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_rows_are_file_label_score_and_the_next(run, weights, pictures, ending):
    result = run("predict", weights, pictures, "--output", f"out{ending}", "--top-k", "2")
    assert result.code == 0, result.err
    assert result.out == f"out{ending}: 4 predictions\n"
    rows = rows_of(Path(f"out{ending}"))
    assert [row["file"] for row in rows] == FILES
    trained = diffmm.load(weights)
    for row in rows:
        assert list(row) == ["file", "label", "score", "label_2", "score_2"]
        prediction = trained.predict(row["file"], top_k=2)
        assert (row["label"], row["label_2"]) == prediction.labels
        assert (row["score"], row["score_2"]) == pytest.approx(prediction.scores, abs=1e-4)
        assert row["score"] > row["score_2"]
    assert sorted(os.listdir()) == [f"out{ending}", "pictures"]


def test_workers_change_nothing(run, weights, pictures):
    Path("pictures/c/e.png").write_bytes(b"no picture")
    results = [
        run("predict", weights, "pictures/b.png", pictures, "--num-workers", count, *OPTIONS)
        for count in (0, 2)
    ]
    assert [result.code for result in results] == [0, 0], results[1].err
    assert results[0].out == results[1].out
    assert len(results[0].out.splitlines()) == 5
    assert results[0].err == results[1].err
    result = run("predict", weights, pictures, "--num-workers", 2)
    assert (result.code, len(result.mistakes)) == (2, 1)
    assert result.mistakes[0].startswith("pictures/c/e.png cannot be decoded")


OPTIONS = ("--skip-bad", "--batch-size", "1")


def test_without_an_output_they_are_printed(run, weights, pictures):
    result = run("predict", weights, "pictures/b.png", "pictures/c")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["pictures/b.png", "pictures/c/d.jpg"]
    assert all(name in lines[0] for name in NAMES)
    assert os.listdir() == ["pictures"]


def test_more_classes_than_there_are_give_all_of_them(run, weights, pictures):
    assert run("predict", weights, pictures, "--output", "out.csv", "--top-k", "50").code == 0
    assert list(rows_of(Path("out.csv"))[0])[-1] == "score_3"


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(
    run, weights, pictures, monkeypatch
):
    def never(*arguments, **settings):
        raise AssertionError("weights were read")

    monkeypatch.setattr("diffmm.hub.loading.load", never)
    Path("there.csv").touch()
    for output, message in (
        ("out.txt", "--output must end in one of .csv, .jsonl, .parquet, got 'out.txt'"),
        ("out", "--output must end in one of .csv, .jsonl, .parquet, got 'out'"),
        ("out.pt", "--output must end in one of .csv, .jsonl, .parquet, got 'out.pt'"),
        ("there.csv", "there.csv exists already: choose another --output"),
        ("nowhere/out.csv", "there is no folder nowhere to write out.csv to"),
    ):
        result = run("predict", weights, pictures, "--output", output)
        assert (result.code, result.mistakes) == (2, [message])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pictures", "nowhere.png"], "nowhere.png does not exist"),
        (["pictures", "--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["pictures", "--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["pictures", "--num-workers", "-1"], "--num-workers must be at least 0, got -1"),
        (["pictures", "--vars.steps", "3"], "--vars.steps is a setting of a recipe: predicting"),
        (["--top-k", "3"], "--top-k is for files: give them after the run"),
        (["--skip-bad"], "--skip-bad is for files: give them after the run"),
        (
            [],
            "{weights} is not in a run, because there is no config.yaml: diffmm predict needs its",
        ),
        (
            ["pictures/c/notes.txt"],
            "pictures/c/notes.txt cannot be decoded: Pillow does not recognize it as one of BMP",
        ),
        (["empty"], "folder empty contains no image files, which end in .jpg"),
        (["pictures", "--device", "cuda:99"], "device 'cuda:99' is not available"),
    ],
)
def test_mistakes(run, weights, pictures, arguments, message):
    Path("empty").mkdir()
    result = run("predict", weights, *arguments)
    assert result.code == 2
    (mistake,) = result.mistakes
    assert mistake.startswith(message.format(weights=weights)), mistake
    assert run("predict").mistakes == ["diffmm predict needs a RUN, and the files to predict"]


def test_the_first_bad_file_ends_all_and_leaves_nothing(run, weights, pictures):
    Path("pictures/c/e.png").write_bytes(b"no picture")
    result = run("predict", weights, pictures, "--output", "out.csv", "--batch-size", "1")
    assert result.code == 2
    (mistake,) = result.mistakes
    assert mistake.startswith("pictures/c/e.png cannot be decoded")
    assert mistake.endswith("; to skip it, add --skip-bad")
    assert os.listdir() == ["pictures"]


def test_bad_files_can_be_skipped(run, weights, pictures):
    Path("pictures/c/e.png").write_bytes(b"no picture")
    os.mkfifo("pictures/pipe.png")
    result = run("predict", weights, pictures, "--output", "out.csv", "--skip-bad")
    assert result.code == 0, result.err
    assert [row["file"] for row in rows_of(Path("out.csv"))] == FILES
    warnings = result.err.splitlines()
    assert len(warnings) == 4
    assert warnings[0].startswith("diffmm: warning: pictures/c/e.png cannot be decoded")
    assert warnings[1].startswith("diffmm: warning: pictures/pipe.png is a named pipe")
    assert warnings[2] == "diffmm: warning: 2 files could not be read and were skipped"


def test_where_all_are_bad_nothing_is_written(run, weights):
    Path("a.png").write_bytes(b"")
    result = run("predict", weights, "a.png", "--output", "out.jsonl", "--skip-bad")
    assert (result.code, result.mistakes) == (2, ["none of the 1 files could be read"])
    assert os.listdir() == ["a.png"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_an_output_that_cannot_be_written_is_a_failure_and_leaves_nothing(
    run, weights, pictures, ending, monkeypatch
):
    def full(self, prediction):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prediction_files.WRITERS[ending], "add", full)
    result = run("predict", weights, pictures, "--output", f"out{ending}")
    told = f"the predictions could not be written to out{ending}"
    assert result.code == 1
    assert result.mistakes == [f"{told}: [Errno 28] No space left on device"]
    assert os.listdir() == ["pictures"]


def test_names_that_are_no_text(run, weights, pictures):
    os.rename(b"pictures/b.png", b"pictures/b\xff.png")
    for ending in (".csv", ".jsonl", ".parquet"):
        result = run("predict", weights, "pictures", "--output", f"out{ending}")
        assert result.code == 0, result.err
    assert b"pictures/b\xff.png," in Path("out.csv").read_bytes()
    assert (
        json.loads(Path("out.jsonl").read_text().splitlines()[1])["file"] == "pictures/b\udcff.png"
    )


def test_parquet_is_written_in_pieces(run, weights, pictures, monkeypatch):
    monkeypatch.setattr(prediction_files, "ROWS_AT_ONCE", 3)
    assert run("predict", weights, pictures, "--output", "out.parquet").code == 0
    assert pyarrow.parquet.ParquetFile("out.parquet").num_row_groups == 2
    assert len(rows_of(Path("out.parquet"))) == 4


def test_weights_without_a_job_take_a_recipes(run, tmp_path, pictures):
    file = save_model(diffmm.create_model("image/digits_tiny"), tmp_path)
    (mistake,) = run("predict", file, "pictures").mistakes
    assert "does not say how its inputs are prepared" in mistake
    assert "diffmm predict --config RECIPE" in mistake
    result = run("predict", file, "pictures", "--config", "image/digits_tiny", "--top-k", "1")
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 4
    by_option = ("predict", "--weights", file, "--config", "image/digits_tiny", "pictures")
    assert run(*by_option, "--top-k", "1").out == result.out


def test_mistakes_are_told_without_torch(tmp_path):
    code = (
        "import sys; from diffmm.cli import main; "
        "codes = main(['predict', 'a', '.', '--output', 'x.txt']), main(['validate']); "
        "sys.exit('torch' in sys.modules or codes != (2, 2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sounds_of_several_classes_of_any_rate(run, tmp_path):
    model = diffmm.create_model("audio/sound_events_multilabel_tiny")
    arguments = {"sample_rate_hz": 8000, "clip_samples": 16000}
    reader = {"class_path": "datamodules.audio.AudioReader", "init_args": arguments}
    job = Job(reader=reader, multi_label=True)
    weights = diffmm.TrainedModel(model, job).save(tmp_path)
    rng = np.random.default_rng(0)
    long = rng.normal(0, 0.1, (44100 * 3, 2)).astype(np.float32)
    soundfile.write("long.wav", long, 44100, subtype="FLOAT")
    soundfile.write("short.flac", long[:4000, 0], 8000)
    result = run("predict", weights, ".", "--output", "out.jsonl")
    assert result.code == 0, result.err
    rows = rows_of(Path("out.jsonl"))
    assert [row["file"] for row in rows] == ["long.wav", "short.flac"]
    assert sum(rows[0][name] for name in ("score", "score_2", "score_3")) > 1.0
    prediction = diffmm.load(weights).predict((long.T, 44100))
    assert rows[0]["score"] == pytest.approx(prediction.score, abs=1e-4)


def test_a_file_that_the_model_does_not_take_is_named(run, tmp_path):
    """A bad file is identified even though it was read in a batch with others."""
    model = diffmm.create_model("audio/sound_events_tiny")
    reader = {"class_path": "datamodules.audio.AudioReader", "init_args": {"sample_rate_hz": 8000}}
    weights = diffmm.TrainedModel(model, Job(reader=reader)).save(tmp_path)
    for name, seconds in (("a.wav", 1), ("b.wav", 9), ("c.wav", 1)):
        soundfile.write(name, np.zeros(8000 * seconds), 8000)
    (mistake,) = run("predict", weights, ".").mistakes
    assert mistake.startswith("b.wav does not fit the model: ")
    result = run("predict", weights, ".", "--skip-bad")
    assert result.code == 0, result.err
    assert [line.partition(":")[0] for line in result.out.splitlines()] == ["a.wav", "c.wav"]


def test_a_text_model_is_told_apart(run, tmp_path):
    model = diffmm.create_model("text/stdlib_tiny", depth=1)
    weights = save_model(model, tmp_path)
    Path("a.txt").write_text("a")
    (mistake,) = run("predict", weights, "a.txt").mistakes
    assert (
        mistake
        == f"{weights} contains a TextModel, which has no classes; it generates text (generate)"
    )
