"""Fine-tuning of upcycled models: which runs are made, and the table."""

import math

import pytest
import torch

import diffmm
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


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_naive_conversion_copies_what_both_have(attention):
    softmax = diffmm.create_model("image/digits_tiny", attention="softmax").eval()
    naive = upcycling.copied(softmax, attention, seed=0)
    ours, theirs = naive.backbone.blocks[1], softmax.backbone.blocks[1]
    for name in ("k_proj", "v_proj", "out_proj"):
        weights = [getattr(block.attention, name).weight for block in (ours, theirs)]
        assert torch.equal(*weights)
    queries = [block.attention.q_proj.weight.unflatten(0, (-1, 16)) for block in (ours, theirs)]
    assert torch.equal(queries[0][:: 2 if attention == "diff_v2" else 1], queries[1])
    assert torch.equal(ours.feed_forward.up_proj.weight, theirs.feed_forward.up_proj.weight)
    images = torch.randn(2, 1, 8, 8)
    assert not torch.allclose(naive(images), softmax(images), atol=1e-2)
