"""On two GPUs, DDP, FSDP2 and tensor parallelism train like one GPU, also from its checkpoint:
compiled, in bfloat16, with gradient clipping and activation checkpointing.

The error of a step on several GPUs relative to float32 may be at most twice the error of bfloat16
on one GPU without compilation.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    # The runs on one GPU are in this process. Lightning 2.6 uses what torch 2.11 deprecates, and
    # warns that they have no validation data and load their data themselves.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

SCRIPT = Path(__file__).parents[1] / "training" / "run_sharded.py"
FLOOR = 0.01
"""Relative error below which errors are not compared."""

BACKENDS = [("softmax", "sdpa")]
BACKENDS += [(case, name) for case in ("diff_v1", "diff_v2") for name in ("sdpa", "triton")]
RUNS = [(case, backend, "fsdp2") for case, backend in BACKENDS]
RUNS += [(case, backend, "fsdp2_tp2") for case, backend in (BACKENDS[0], BACKENDS[2], BACKENDS[4])]
RUNS += [("diff_v1", "triton", "ddp")]
SMALL = {"accelerator": "gpu", "dim": 256, "learning_rate": 1e-3}
HALF = {"precision": "bf16-mixed"}


def variant(backend: str) -> str:
    return f"_{backend}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of every run, by its name."""
    folder = tmp_path_factory.mktemp("parallel")
    run = runpy.run_path(str(SCRIPT))["run"]
    for case in ("softmax", "diff_v1", "diff_v2"):
        run(folder, case, "auto", 1, **SMALL)
    for case, backend in BACKENDS:
        run(folder, case, "auto", 1, variant=variant(backend), backend=backend, **SMALL, **HALF)
    torch.cuda.empty_cache()
    wanted = [
        {"case": case, "strategy": strategy, "num_processes": 2, "variant": variant(backend)}
        | {"backend": backend, "compile": "inductor", **SMALL, **HALF}
        for case, backend, strategy in RUNS
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(wanted)],
        env={**os.environ, "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def errors(found, truth):
    """The relative error of each tensor."""
    return {
        name: ((found[name] - tensor).norm() / tensor.norm().clamp(min=1e-6)).item()
        for name, tensor in truth.items()
    }


@pytest.mark.parametrize(("case", "backend", "strategy"), RUNS)
def test_two_gpus_train_as_one(case, backend, strategy, runs):
    truth, one = runs[f"{case}_auto_1"], runs[f"{case}_auto_1{variant(backend)}"]
    two = runs[f"{case}_{strategy}_2{variant(backend)}"]
    for name, curve in truth["curves"].items():
        assert two["curves"][name] == pytest.approx(curve, rel=0.02), name
    assert max(truth["curves"]["train/grad_norm"]) > 0.3, "nothing was clipped"
    # Gradients of a step, weights after two steps, and weights after two more from float32's
    # checkpoint.
    for part in ("gradients", "weights", "resumed"):
        allowed = errors(one[part], truth[part])
        for name, error in errors(two[part], truth[part]).items():
            assert error < 2 * allowed[name] + FLOOR, f"{part} of {name}: {error:.1e}"
