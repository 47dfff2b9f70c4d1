"""FSDP2 and tensor parallelism: several processes train like one, from each other's checkpoints.

Processes are slow to start: two of them run all cases, and four run one.
"""

import json
import runpy
from pathlib import Path

import pytest
import torch
from forked import run_as_torchrun

from diffmm.layers import ATTENTIONS
from diffmm.models.checkpoint_files import read_checkpoint
from diffmm.models.weights import load_model
from diffmm.training import FSDP2Strategy, Task

SCRIPT = Path(__file__).with_name("run_sharded.py")
CASES = ("softmax", "diff_v1", "diff_v2", "diff_grouped", "uniform_noise", "image", "pairs",
         "both media", "media apart", "captions", "cross-attention", "transcripts")  # fmt: skip
NAMES = ("case", "strategy", "num_processes", "variant")
COMPILED, TRACED, ACCUMULATED = "_compiled", "_traced", "_accumulated"
COMPILERS = {COMPILED: "inductor", TRACED: "eager"}
RUNS = [
    ("diff_v1", "fsdp2", 2, ""),
    ("diff_v1", "fsdp2_tp2", 2, TRACED),
    ("softmax", "fsdp2_tp2", 2, ""),
    ("diff_v2", "fsdp2_tp2", 2, ACCUMULATED),
    ("diff_grouped", "fsdp2_tp2", 2, ""),
    ("image", "fsdp2_tp2", 2, ""),
    ("pairs", "fsdp2_tp2", 2, TRACED),
    ("pairs", "fsdp2", 2, ""),
    ("both media", "fsdp2_tp2", 2, ""),
    ("both media", "fsdp2", 2, ""),
    ("media apart", "fsdp2", 2, ""),
    ("captions", "fsdp2_tp2", 2, TRACED),
    ("captions", "fsdp2", 2, ""),
    ("cross-attention", "fsdp2_tp2", 2, ""),
    ("cross-attention", "fsdp2", 2, ""),
    ("transcripts", "fsdp2_tp2", 2, COMPILED),
    ("transcripts", "fsdp2", 2, ""),
    ("uniform_noise", "ddp", 2, ""),
    ("uniform_noise", "fsdp2", 2, ""),
    ("uniform_noise", "fsdp2_tp2", 2, TRACED),
    ("diff_v2", "ddp", 2, ""),
    ("softmax", "fsdp2", 2, ACCUMULATED),
    ("diff_v1", "fsdp2_tp2", 4, ""),
]
SOURCES = {
    ("diff_v1", "fsdp2_tp2", 2, TRACED): "fsdp2_2",
    ("uniform_noise", "fsdp2", 2, ""): "ddp_2",
    ("diff_v2", "ddp", 2, ""): f"fsdp2_tp2_2{ACCUMULATED}",
    ("diff_v1", "fsdp2_tp2", 4, ""): "fsdp2_2",
}
"""The run whose checkpoint a run resumes from; by default, that of one process."""


@pytest.fixture(scope="module")
def script():
    yield runpy.run_path(str(SCRIPT))
    ATTENTIONS.pop("uniform_noise")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, script):
    """The results of every run by its name, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    for case in CASES:
        script["run"](folder, case, "auto", 1)
    for count in (2, 4):
        wanted = [
            {
                **dict(zip(NAMES, run, strict=True)),
                "compile": COMPILERS.get(run[3], ""),
                "source": SOURCES.get(run, "auto_1"),
                "accumulate": 2 if run[3] == ACCUMULATED else 1,
            }
            for run in RUNS
            if run[2] == count
        ]
        logs = tmp_path_factory.mktemp("logs")
        run_as_torchrun(SCRIPT, count, [str(folder), json.dumps(wanted)], logs, 300)
    return folder, {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-6)
        assert error <= tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "strategy", "count", "variant"), RUNS)
def test_several_processes_train_as_one(case, strategy, count, variant, runs):
    one, many = (runs[1][f"{case}_{name}"] for name in ("auto_1", f"{strategy}_{count}{variant}"))
    for name, curve in one["curves"].items():
        assert many["curves"][name] == pytest.approx(curve, rel=1e-4), name
    assert max(one["curves"]["train/grad_norm"]) > 0.3, "nothing was clipped"
    assert_close(many["gradients"], one["gradients"], 1e-4)
    assert_close(many["weights"], one["weights"], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "strategy", "count", "variant"), RUNS)
def test_checkpoints_load_under_every_strategy(case, strategy, count, variant, runs, script):
    folder, results = runs
    name = f"{case}_{strategy}_{count}{variant}"
    # Two more steps with the moments of another run (see SOURCES), and in one process with its own.
    truth = results[f"{case}_auto_1"]["resumed"]
    assert_close(results[name]["resumed"], truth, 1e-3)
    path = folder / f"{name}.ckpt"
    assert path.is_dir() == strategy.startswith("fsdp2")
    task, samples = script["task_and_data"](case)
    script["fit"](task, samples, strategy="auto", num_processes=1, max_steps=4, ckpt_path=path)
    assert_close(script["weights_of"](task), truth, 1e-3)
    assert type(load_model(path)) is type(task.model)
    assert_close(
        script["weights_of"](Task.load_from_checkpoint(path)), results[name]["weights"], 0.0
    )
    paths = (folder / f"{case}_auto_1.ckpt", path)
    one, many = (read_checkpoint(path, optimizer=True)["optimizer_states"][0] for path in paths)
    assert many["param_groups"] == one["param_groups"]
    assert many["state"].keys() == one["state"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "strategy", "count", "variant"), RUNS)
def test_checkpoints_are_validated_where_they_were_saved(case, strategy, count, variant, runs):
    found, one = (runs[1][f"{case}_{name}"]["validated"] for name in
                  (f"{strategy}_{count}{variant}", "auto_1"))  # fmt: skip
    assert found == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_shares_of_a_deeper_model_are_refused(runs):
    assert "weights that the model lacks" in runs[1]["diff_v1_fsdp2_2"]["refusal"]


def test_a_size_that_is_none_is_refused():
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 1, got 0"):
        FSDP2Strategy(tensor_parallel_size=0)
