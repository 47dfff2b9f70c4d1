"""Cells that train at the same time, in CUDA graphs and streams of their own."""

import pytest

from benchmarks.quality import __main__ as quality
from benchmarks.quality import plan
from benchmarks.quality.engine import read

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def test_graphs_of_several_runs_do_not_disturb_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MAX_EXTENSIONS", 0)
    rows = {}
    for together in ("1", "4"):
        out = ["--out", str(tmp_path / together), "--together", together, "--no-equal-time"]
        rates = ["--rates", "2e-3,4e-3", "--seeds", "0", "--steps", "60", "--size", "tiny"]
        quality.main(["--tasks", "digits", "--variants", "softmax,diff_v1", *rates, *out])
        found = read(tmp_path / together / "cells.jsonl")
        rows[together] = {(r["variant"], r["rate"]): r["train_loss"] for r in found}
    assert len(rows["1"]) == 4
    assert len(set(rows["1"].values())) == 4
    for cell, loss in rows["1"].items():
        assert rows["4"][cell] == pytest.approx(loss, rel=1e-3)
