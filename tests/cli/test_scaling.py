"""The scripts for several machines, and the output of several processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from forked import run_diffmm

from diffmm.checkpoint_folders import find_state
from diffmm.cli.fit import make_parser
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.mistakes import find_mistakes
from diffmm.recipes.references import resolve
from diffmm.recipes.settings import load
from diffmm.recipes.summary import num_devices

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
SLURM = SCRIPTS / "slurm.sbatch"
# Make this interpreter the first `python` that the scripts find.
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def two_nodes(*arguments):
    """Run a command on two simulated machines of one process each, and return the output of
    each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        first = f"127.0.0.1:{probe.getsockname()[1]}"
    script = str(SCRIPTS / "torchrun_node.sh")
    nodes = [
        subprocess.Popen(
            ["bash", script, str(rank), "2", first, "1", *map(str, arguments)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [node.communicate(timeout=240)[0] for node in nodes]
    for node, text in zip(nodes, printed, strict=True):
        assert node.returncode == 0, text[-4000:]
    return printed


@pytest.mark.slow
def test_two_machines_train_and_predict_together(run, recipe, tmp_path):
    path = recipe(**{"trainer.strategy": "fsdp2"})
    printed = two_nodes("fit", "--config", path, "--name", "two", "--resume", "auto")
    assert "run: runs/recipe/two" in printed[0]
    assert "run: " not in printed[1]
    state = find_state(Path("runs/recipe/two"))
    assert len(list(state.glob("*.distcp"))) == 2
    checkpoint = state.parent
    # Two processes cannot share this number of samples evenly.
    settings = ("--config", path, "--weights", "runs/recipe/two", "--data.batch_size", "7")
    predict = ["predict", *settings, "--trainer.devices", "2", "--output", "two.pt"]
    first, second = run_diffmm(predict, Path.cwd(), tmp_path, count=2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "two.pt" in first.out
    assert "two.pt" not in second.out
    one_process = (*settings, "--trainer.strategy", "auto", "--output", "one.pt")
    assert run("predict", *one_process).code == 0
    one, two = (torch.load(name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert len(one["index"]) % 2 == 1, "the test needs repeated samples"
    assert two.keys() == one.keys()
    assert two["index"].equal(one["index"])
    torch.testing.assert_close(two["probabilities"], one["probabilities"])
    # One process resumes from the sharded checkpoint, and detects damage.
    alone = ("--trainer.strategy", "auto", "--trainer.devices", "1")
    assert run("finetune", "--config", path, "--weights", "runs/recipe/two", *alone).code == 0
    share = next(checkpoint.glob("state.ckpt/__1_*"))
    share.write_bytes(share.read_bytes()[:-1])
    (mistake,) = run("predict", "--config", path, "--weights", checkpoint, *alone).mistakes
    assert f"state.ckpt/{share.name} has " in mistake


def test_processes_that_another_program_starts_need_a_name(run, recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (mistake,) = run("fit", "--config", recipe()).mistakes
    assert mistake.startswith("a run whose processes are started by torchrun or srun needs a ")
    assert "--name NAME" in mistake


def test_a_node_without_arguments_is_told_what_it_takes():
    done = subprocess.run(
        ["bash", SCRIPTS / "torchrun_node.sh", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "torchrun_node.sh NODE_RANK NUM_NODES FIRST_NODE PROCESSES VERB" in done.stderr


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun_node.sh"])
def test_scripts_are_whole_and_can_be_run(name):
    script = SCRIPTS / name
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.fixture
def submitted(tmp_path):
    """`submitted(recipe, ...)` returns the command that the SLURM script would start by srun."""
    srun = tmp_path / "srun"
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)

    def submit(*arguments, num_nodes=8):
        slurm = {"SLURM_JOB_ID": "4321", "SLURM_JOB_NUM_NODES": str(num_nodes)}
        return subprocess.run(
            ["bash", SLURM, *arguments],
            env={**ENVIRONMENT, **slurm, "PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )

    return submit


def test_slurm_starts_the_recipe_on_its_machines(submitted):
    done = submitted("text/paper_13b_64gpu", "--vars.attention", "diff_v2")
    assert done.returncode == 0, done.stderr
    python, *module, verb = done.stdout.splitlines()[:4]
    assert (python, module, verb) == ("python", ["-m", "diffmm.cli"], "fit")
    options, overrides = make_parser("fit").parse_known_args(done.stdout.splitlines()[4:])
    assert (options.name, options.resume) == ("slurm_4321", "auto")
    values = {**load([find_recipe(name) for name in options.config], overrides), "run_dir": "runs"}
    assert find_mistakes(values).mistakes == []
    assert values["vars"]["attention"] == "diff_v2"
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE))
    trainer = resolve(values)[0]["trainer"]
    assert int(asked["nodes"]) == trainer["num_nodes"]
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == str(trainer["devices"])
    assert num_devices(trainer) == 64
    # The signal goes to the processes, not only to the script ("B:"); a requeued job appends to its
    # log.
    assert asked["signal"] == "USR1@120"
    assert "requeue" in asked
    assert asked["open-mode"] == "append"


def test_slurm_on_other_machines_is_one_setting(submitted):
    done = submitted("text/paper_830m", "--vars.devices", "4", num_nodes=2)
    assert yaml.safe_load(done.stdout.splitlines()[-3]) == 2
    assert submitted().returncode == 2
