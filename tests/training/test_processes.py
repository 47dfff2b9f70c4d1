"""Two processes train like one."""

import json
import runpy
from pathlib import Path

import pytest
from forked import run_as_torchrun

SCRIPT = Path(__file__).with_name("run_processes.py")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    output = folder / "two.json"
    run_as_torchrun(SCRIPT, 2, ["2", str(output)], folder)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def one_process():
    return runpy.run_path(str(SCRIPT))["run"](1)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["masked_lm", "image", "muon"])
def test_two_processes_follow_the_curve_of_one(task, one_process, two_processes):
    # Muon orthogonalizes in bfloat16.
    error, error_of_sums = (1e-3, 1e-2) if task == "muon" else (1e-5, 1e-4)
    one, two = one_process[task], two_processes[task]
    assert len(one["curves"]["train/loss"]) == 6
    assert one["curves"]["train/loss"][-1] < one["curves"]["train/loss"][0]
    for name, curve in one["curves"].items():
        assert two["curves"][name] == pytest.approx(curve, rel=error, abs=error), name
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-3, abs=error_of_sums)
