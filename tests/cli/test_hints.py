"""Hints in error messages: near names, the names of other libraries, what is only local."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffmm
from diffmm import checkpoint_folders
from diffmm.cli.prediction_files import WRITERS
from diffmm.hub.predictions import Prediction


@pytest.fixture
def first(run, recipe):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("a.png")
    assert run("fit", "--config", recipe(), "--name", "first").code == 0
    return Path("runs/recipe/first")


def test_options_and_names_that_are_nearly_right(run, first):
    (mistake,) = run("predict", first, "a.png", "--topk", "1").mistakes
    assert mistake.endswith("predicting files takes none; did you mean '--top-k'?")
    for command in (("fit", "--resume"), ("validate",), ("compare",)):
        (mistake,) = run(*command, "runs/recipe/frist").mistakes
        assert mistake.endswith("; did you mean 'runs/recipe/first'?")
    assert "did you mean" not in run("compare", "runs/recipe/xyz").mistakes[0]
    for key, meant in (("model.optimizer.lr", "learning_rate"), ("trainer.epochs", "max_epochs")):
        mistakes = run("check", "image/digits_tiny", f"--{key}", "1").mistakes
        assert any(mistake.endswith(f"; did you mean {meant!r}?") for mistake in mistakes)


def test_addresses_of_the_web_and_names_of_classes(run, first):
    address = "http://localhost/a.png"
    (mistake,) = run("predict", first, address).mistakes
    assert mistake == f"{address} does not exist: only local files are read, download it first"
    with pytest.raises(ValueError, match=f"{address}: only local files are read, download it"):
        diffmm.load(first).predict(address)
    with pytest.raises(ValueError, match="class_names has 2 names, but the model of .* has 10 cl"):
        diffmm.load(first, class_names=["a", "b"])


def test_json_lines_keep_letters_and_escape_what_is_no_text(tmp_path):
    writer = WRITERS[".jsonl"](tmp_path / "a.jsonl", ["file", "label", "score"])
    writer.write(Prediction(("Tür",), (1.0,), "ü.png"))
    writer.write(Prediction(("Tür",), (1.0,), "\udcff.png"))
    writer.close()
    first, second = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert first == '{"file": "ü.png", "label": "Tür", "score": 1.0}'
    assert "\\udcff.png" in second


def test_a_file_that_cannot_be_written_is_named_as_the_user_knows_it(tmp_path):
    with pytest.raises(OSError, match="config.yaml") as failed:
        checkpoint_folders.write_text(tmp_path / "missing/config.yaml", "")
    assert failed.value.filename == str(tmp_path / "missing/config.yaml")
