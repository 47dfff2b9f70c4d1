"""Fine-tuning of upcycled models: which runs are made, and the table."""

import math

import pytest

from benchmarks import upcycling
from benchmarks.quality.engine import read


def row(variant, seed, factor, metric):
    given = {"task": "digits", "variant": variant, "seed": seed, "factor": factor}
    return given | {"metric": metric, "before": 0.5}


def test_all_rates_are_tried_with_the_first_seed_and_the_best_with_the_others():
    seeds = (0, 1)
    first = [(0, variant, factor) for variant in upcycling.VARIANTS for factor in upcycling.FACTORS]
    assert upcycling.pending([], "digits", seeds) == first
    rows = [row("softmax", 0, factor, metric) for factor, metric in ((0.1, 0.6), (0.3, 0.8))]
    assert upcycling.best_factor(rows, "digits", "softmax", 0) is None
    rows.append(row("softmax", 0, 1.0, 0.7))
    assert upcycling.best_factor(rows, "digits", "softmax", 0) == 0.3
    left = upcycling.pending(rows, "digits", seeds)
    assert (1, "softmax", 0.3) in left
    assert not any(run[:2] == (0, "softmax") for run in left)


def test_the_table_has_paired_differences():
    rows = []
    for variant, metrics in (("softmax", (0.6, 0.7, 0.8)), ("diff_v2", (0.7, 0.8, 0.9))):
        rows += [row(variant, 0, factor, 0.0) for factor in (0.1, 1.0)]
        rows += [row(variant, seed, 0.3, metric) for seed, metric in enumerate(metrics)]
    lines = upcycling.table(rows, (0, 1, 2)).splitlines()[2:]
    assert lines[0].endswith("| 0.6000, 0.7000, 0.8000 | 0.7000 |  |")
    assert lines[1].endswith("| 0.8000 | +0.1000 ± 0.0000 |")
    assert len(lines) == 2


def test_a_tiny_table(tmp_path, monkeypatch, capsys):
    """The models of a seed start with the same metric, and no run is repeated."""
    monkeypatch.setattr(upcycling, "FACTORS", (1.0,))
    monkeypatch.setattr(upcycling, "VARIANTS", ("softmax", "diff_v1", "diff_grouped"))
    arguments = ["--tasks", "digits", "--size", "tiny", "--out", str(tmp_path), "--seeds", "0"]
    upcycling.main(arguments)
    rows = read(tmp_path / upcycling.ROWS)
    assert len({row["before"] for row in rows}) == 1
    assert len(rows) == 3
    assert all(math.isfinite(row["metric"]) for row in rows)
    assert rows[1]["parameters"] > rows[2]["parameters"] > rows[0]["parameters"]
    capsys.readouterr()
    upcycling.main(arguments)
    assert capsys.readouterr().out == ""
    upcycling.main([*arguments, "--table"])
    assert "| digits | diff_grouped | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        upcycling.main(["--tasks", "nothing"])
