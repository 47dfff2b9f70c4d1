"""Cells of the quality table in CUDA graphs, alone and in streams of their own."""

import pytest

from benchmarks.quality import __main__ as quality
from benchmarks.quality import plan
from benchmarks.quality.cells import Bench, read_cells
from benchmarks.quality.engine import finish
from benchmarks.quality.plan import Settings

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
        found = read_cells(tmp_path / together)
        rows[together] = {(r["variant"], r["rate"]): r["train_loss"] for r in found}
    assert len(rows["1"]) == 4
    assert len(set(rows["1"].values())) == 4
    for cell, loss in rows["1"].items():
        assert rows["4"][cell] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("attention", ["softmax", "diff_v1"])
def test_the_model_alone_in_a_graph_trains_as_the_whole_step(tmp_path, attention):
    bench = Bench(tmp_path, tmp_path, Settings(size="tiny", steps=40))
    cell = bench.settings.cell("digits", attention, 2e-3, 0)
    data = bench.batches(cell)
    step, model = (
        finish(bench.make(cell).training(data, "cuda", captured=captured, evaluate_at=[40]))
        for captured in (True, False)
    )
    assert max(step.losses) - min(step.losses) > 0.01
    assert model.losses == pytest.approx(step.losses, rel=1e-3)
    assert model.points[-1]["loss"] == pytest.approx(step.points[-1]["loss"], rel=1e-3)
