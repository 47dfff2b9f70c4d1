"""Two processes train like one."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_processes.py")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    output = tmp_path_factory.mktemp("processes") / "two.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "2", str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
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
