"""Runs of small models with tiny sizes: they run, resume and print their tables."""

import json

import pytest
import torch
from PIL import Image, ImageFont

from benchmarks import letters, small_models

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fonts(tmp_path):
    folder = tmp_path / "fonts"
    folder.mkdir()
    (folder / "Aileron.ttf").write_bytes(ImageFont.load_default(20).font_bytes)
    for name in ("Symbol", "NotoColorEmoji"):
        (folder / f"{name}.ttf").write_bytes(b"is left out")
    return str(folder)


def arguments(tmp_path, *more):
    small = ["--tasks", "digits", "--attentions", "softmax,diff_v1", "--rates", "2e-3,4e-3"]
    return [*small, "--seeds", "0", "--steps", "2", "--out", str(tmp_path), *more]


def cells(tmp_path):
    return [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]


def test_cells_are_kept_and_run_once(tmp_path, capsys):
    small_models.main(arguments(tmp_path, "--part", "0/2"))
    assert [(c["attention"], c["rate"]) for c in cells(tmp_path)] == [
        ("softmax", 0.002),
        ("diff_v1", 0.002),
    ]
    small_models.main(arguments(tmp_path, "--settings", "plain,gain_1"))
    kept = cells(tmp_path)
    assert len(kept) == len({(c["attention"], c["setting"], c["rate"]) for c in kept}) == 6
    # The same samples and the same initial weights, except for the norm's weight.
    plain, gain = (c for c in kept if c["attention"] == "diff_v1" and c["rate"] == 0.004)
    assert plain["train_loss"] != gain["train_loss"]
    assert plain["parameters"] == gain["parameters"]
    assert "| digits | diff_v1 | gain_1 |" in capsys.readouterr().out


def test_a_table_takes_the_best_rate_by_the_mean_of_the_seeds():
    rows = [
        {"task": task, "attention": "diff_v2", "setting": "plain", "rate": rate, "seed": seed}
        | {"accuracy": value, "loss": value}
        for task in ("digits", "text")
        for rate, values in ((0.1, (0.5, 0.75)), (0.2, (0.25, 1.25)), (0.4, (0.5, 0.5)))
        for seed, value in enumerate(values)
    ]
    rows = [row for row in rows if row["task"] == "digits" or row.pop("accuracy")]
    assert small_models.table(rows).splitlines()[2:] == [
        "| digits | diff_v2 | plain | 0.2 | 75.00 | 25.00 125.00 | 0.1: 62.50, 0.4: 50.00 |",
        "| text | diff_v2 | plain | 0.4 | 0.50 | 0.50 0.50 | 0.1: 0.62, 0.2: 0.75 |",
    ]


def test_what_goes_on_inside(tmp_path, capsys):
    small_models.main(arguments(tmp_path, "--settings", "former,plain", "--trace"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    former, plain = (
        [line for line in lines if line[:4] == ["digits", "diff_v1", setting, "0"]][:4]
        for setting in ("former", "plain")
    )
    assert [line[4] for line in former] == [line[4] for line in plain] == ["0", "1", "2", "3"]
    # Nearly uniform maps add a large vector that is the same for all tokens.
    assert all(float(line[10]) > 0.95 for line in former)
    assert all(float(line[12]) > 0.02 for line in former)
    assert all(float(line[10]) < 0.5 for line in plain)
    assert all(float(line[12]) < 0.01 for line in plain)


def test_letters(tmp_path, fonts, capsys):
    folder = tmp_path / "letters"
    given = [str(folder), "--train-fonts", fonts, "--val-fonts", fonts, "--per-class", "3"]
    letters.main(given)
    assert "1 fonts for training, 1 for validation" in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "train").iterdir()) == list(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    )
    images = [Image.open(path) for path in sorted((folder / "train" / "A").iterdir())]
    assert [image.size for image in images] == [(64, 64)] * 3
    assert all(high - low > 40 for low, high in (image.getextrema() for image in images))
    assert len(list((folder / "val" / "Q").iterdir())) == 1
    with pytest.raises(SystemExit, match="exists already: choose another folder"):
        letters.main(given)
    run = ["--tasks", "letters", "--letters", str(folder), "--attentions", "diff_v1"]
    out = ["--rates", "1e-3", "--seeds", "0", "--steps", "1", "--out", str(tmp_path / "out")]
    small_models.main([*run, *out])
    assert len(cells(tmp_path / "out")) == 1


def test_letters_need_fonts(tmp_path):
    with pytest.raises(SystemExit, match="no font"):
        letters.main(["x", "--train-fonts", str(tmp_path), "--val-fonts", str(tmp_path)])
