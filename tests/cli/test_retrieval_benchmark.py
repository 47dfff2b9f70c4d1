"""`python -m benchmarks.retrieval`: heat maps of runs."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import retrieval
from datamodules.text import AssociativeRecall, Needles
from diffmm.recipes.errors import InputError


@pytest.fixture
def trained(run, recipe):
    """The directory of a short run, by the name of its recipe."""

    def train(name, **changes):
        result = run("fit", "--config", recipe(name, **changes), "--name", Path(name).name)
        assert result.code == 0, result.err
        return str(Path("runs/recipe", Path(name).name))

    return train


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_runs_are_measured_over_depth_and_length(trained, capsys):
    needles = trained("text/needles_tiny")
    retrieval.main([needles, "--num-samples", "3", "--values", "0,1", "--out", "maps"])
    rows = rows_of(Path("maps/recipe_needles_tiny.csv"))
    assert {row["depth"] for row in rows} == {"0.0", "1.0"}
    lengths = {int(row["length"]) for row in rows}
    data = retrieval.run_data(needles)
    least = data.source.varied(0.0).least_length
    assert (min(lengths), max(lengths)) == (least, data.sequence_length)
    assert {int(row["num_answers"]) for row in rows} == {3}
    with Image.open("maps/recipe_needles_tiny.png") as image:
        assert min(image.size) > 200
    assert f"{needles}: mean accuracy 0." in capsys.readouterr().out


def test_other_tasks_vary_their_own_setting(trained):
    recall = trained("text/recall_tiny")
    grid = retrieval.measure(recall, [2, 4], [32], num_samples=4)
    assert grid.axis == "num_pairs"
    assert grid.num_answers.tolist() == [[8], [16]]


def test_lengths_span_from_the_shortest_to_the_longest():
    assert retrieval.lengths_of(AssociativeRecall(), (2, 8), 62) == [32, 42, 52, 62]
    # A heat map asks for one needle: five sentences of four tokens.
    assert retrieval.lengths_of(Needles(), (0.0,), 20) == [20]
    with pytest.raises(InputError, match="needs 32 tokens for num_pairs 2, 8, but the model's"):
        retrieval.lengths_of(AssociativeRecall(), (2, 8), 31)


def test_what_does_not_fit_is_named(trained, tmp_path):
    with pytest.raises(SystemExit, match="is not a run: it has no config.yaml"):
        retrieval.main([str(tmp_path / "none")])
    digits = trained("image/digits_tiny")
    with pytest.raises(SystemExit, match="was trained on ImageData: a heat map needs a run of"):
        retrieval.main([digits])
    needles = trained("text/needles_tiny")
    for option, value, message in (
        ("--values", "2", r"depth must be in \[0, 1\], got 2.0"),
        ("--lengths", "9999", "length 9999 exceeds the model's max_length"),
        ("--lengths", "8", "sequence_length=8 is too short"),
    ):
        with pytest.raises(SystemExit, match=message):
            retrieval.main([needles, option, value])
