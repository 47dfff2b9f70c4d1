"""`diffmm sweep`: all combinations of some settings, one run each."""

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from threading import Thread

import pytest
import yaml

from diffmm.cli import main, sweep
from diffmm.recipes.errors import InputError
from diffmm.runs.metrics import read_curves
from diffmm.runs.sweeps import combinations, split_values
from diffmm.training import Classification

FOLDER = Path("runs/recipe/sweep_seed_attention")
SWEEP = ("--vars.seed", "0,1", "--vars.attention", "softmax,diff_v1")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,1,2", ["0", "1", "2"]),
        ("softmax", ["softmax"]),
        ("[0.2,1.0],[0.5,1.0]", ["[0.2,1.0]", "[0.5,1.0]"]),
        ("[0.2,1.0]", ["[0.2,1.0]"]),
        ("{a: [1,2], b: 3},null", ["{a: [1,2], b: 3}", "null"]),
        ("'a,b',\"c,[\",it's", ["'a,b'", '"c,["', "it's"]),
        ("${vars.a},${oc.env:A,b}", ["${vars.a}", "${oc.env:A,b}"]),
        ("a, b", ["a", "b"]),
    ],
)
def test_commas_divide_values_outside_of_brackets_and_quotes(text, values):
    assert split_values(text) == values


def test_the_product_in_order_and_its_names():
    found = combinations([("a.x", "0,1"), ("b", "[1,2]"), ("c.y", "p/q,[0.5,1],'a b'")])
    assert len(found) == 6
    assert found[1].arguments == ["--a.x=0", "--b=[1,2]", "--c.y=[0.5,1]"]
    assert found[1].name == "x=0,y=0.5-1"
    assert found[2].name == "x=0,y=ab"
    assert found[0].name.startswith("x=0,y=p_q_")
    # Settings with the same last part get distinct names, and so do values that would give the same
    # name.
    assert combinations([("a.x", "0,1"), ("b.x", "0,1")])[1].name == "a.x=0,b.x=1"
    names = [one.name for one in combinations([("a", "p/q,p:q,[1],1")])]
    assert len(set(names)) == 4
    assert all(len(one.name) < 200 for one in combinations([("a", f"{'x' * 300},{'x' * 301}")]))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", "[1,2]")], "needs a setting with several values"),
        ([("a", "1,,2")], "has an empty value"),
        ([("a", "1,1")], "has the value 1 twice"),
        ([("a", "1,2"), ("a", "3,4")], "given twice"),
    ],
)
def test_what_is_no_sweep(pairs, message):
    with pytest.raises(InputError, match=message):
        combinations(pairs)


@pytest.fixture
def launched(monkeypatch):
    """Record the runs that are trained in this process."""
    names = []

    def launch(arguments):
        names.append(Path(arguments[arguments.index("--run_dir") + 1]).name)
        return main(arguments)

    monkeypatch.setattr(sweep, "launch", launch)
    return names


def test_a_sweep_trains_each_run_once_and_compares_them(run, recipe, launched):
    command = ("sweep", "--config", recipe(), *SWEEP)
    result = run(*command)
    assert result.code == 0, result.err
    names = [f"seed={seed},attention={kind}" for seed in (0, 1) for kind in ("softmax", "diff_v1")]
    assert launched == names
    for name in names:
        config = yaml.safe_load((FOLDER / name / "config.yaml").read_text())
        assert f"seed={config['vars']['seed']},attention={config['vars']['attention']}" == name
    table = result.out.split("\n\n")[-3].splitlines()
    assert table[0].split()[:3] == ["run", "attention", "seed"]
    assert [line.split()[0] for line in table[2:]] == names
    # Finished runs are skipped, and new ones are trained.
    launched.clear()
    result = run(*command[:-1], "softmax,diff_v1,diff_v2")
    assert result.out.count("already finished") == 4
    assert launched == ["seed=0,attention=diff_v2", "seed=1,attention=diff_v2"]


def test_an_interrupted_run_stops_the_sweep_and_goes_on(run, recipe, launched, monkeypatch):
    command = ("sweep", "--config", recipe(**{"trainer.max_steps": 4}), *SWEEP)
    on_train_batch_end = Classification.on_train_batch_end

    def stops(task, *arguments):
        if len(launched) == 2 and task.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Classification, "on_train_batch_end", stops)
    result = run(*command)
    assert result.code == 143
    assert "[2/4] seed=0,attention=diff_v1: stopped; the same command resumes it" in result.out
    checkpoints = FOLDER / "seed=0,attention=diff_v1" / "checkpoints"
    assert {folder.name for folder in checkpoints.glob("step_*")} < {
        "step_00000002",
        "step_00000003",
        "step_00000004",
    }
    assert launched == ["seed=0,attention=softmax", "seed=0,attention=diff_v1"]
    monkeypatch.setattr(Classification, "on_train_batch_end", on_train_batch_end)
    launched.clear()
    result = run(*command)
    assert result.code == 0, result.err
    assert launched[0] == "seed=0,attention=diff_v1"
    assert len(launched) == 3
    steps = [step for step, _ in read_curves(checkpoints.parent)["train/loss"]]
    assert steps == [1, 2, 3, 4]


def test_a_signal_to_the_sweep_reaches_its_run(run, recipe, wait_until):
    path = recipe(**{"trainer.max_steps": "${vars.steps}", "vars.steps": 300})
    folder = Path("runs/recipe/sweep_seed/seed=0").resolve()

    def stop():
        try:
            wait_until(lambda: list(folder.rglob("step_*")), 60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    stopping = Thread(target=stop)
    stopping.start()
    result = run("sweep", "--config", path, "--vars.seed=0,1")
    stopping.join()
    assert result.code == 143
    steps = [int(each.name[5:]) for each in (folder / "checkpoints").glob("step_*")]
    assert 0 < max(steps) < 300
    assert not (folder.parent / "seed=1").exists()


def test_a_run_that_fails_is_told_and_the_others_go_on(run, recipe, launched, monkeypatch):
    launch = sweep.launch

    def fails_once(arguments):
        code = launch(arguments)
        return 1 if "--vars.attention=diff_v2" in arguments else code

    monkeypatch.setattr(sweep, "launch", fails_once)
    result = run("sweep", "--config", recipe(), "--vars.attention", "softmax,diff_v2,diff_v1")
    assert result.code == 1
    assert len(launched) == 3
    assert "warning: [2/3] attention=diff_v2 failed with exit code 1" in result.err
    assert result.err.endswith("diffmm: warning: failed: attention=diff_v2\n")
    folder = Path("runs/recipe/sweep_attention")
    assert json.loads((folder / "sweep.json").read_text())["attention=diff_v2"] == 1
    assert "attention=diff_v1" in result.out.splitlines()[-1]


def test_every_run_is_checked_before_the_first_one_starts(run, recipe, launched):
    command = ("sweep", "--config", recipe(), "--vars.attention", "softmax,diff_v9")
    result = run(*command, "--vars.learning_rate", "0.1,-1")
    assert result.code == 2
    assert launched == []
    assert any(
        mistake.startswith("attention=diff_v9,learning_rate=0.1: model") and "diff_v9" in mistake
        for mistake in result.mistakes
    )
    assert any("attention=softmax,learning_rate=-1: " in mistake for mistake in result.mistakes)
    result = run("sweep", "--config", recipe(), "--vars.seed", "0,1", "--trainer.max_stesp", "3")
    assert result.mistakes == ["unknown key trainer.max_stesp; did you mean 'max_steps'?"]
    assert not Path("runs").exists()


def test_a_name_belongs_to_the_settings_that_it_varied_first(run, recipe, launched):
    path = recipe()
    command = ("sweep", "--config", path, "--name", "x")
    assert run(*command, "--vars.seed", "0,1").code == 0
    (mistake,) = run(*command, "--vars.attention", "softmax,diff_v1").mistakes
    assert mistake == (
        "runs/recipe/x is a sweep over vars.seed, not over vars.attention: choose another name"
    )
    assert len(launched) == 2
    assert run(*command, "--vars.seed", "1,2").code == 0
    assert len(launched) == 3
    assert run("fit", "--config", path, "--name", "run").code == 0
    (mistake,) = run(*command[:-1], "run", "--vars.seed", "0,1").mistakes
    assert mistake == "runs/recipe/run holds a run: choose another name for the sweep"


def test_a_run_of_other_settings_is_not_taken_for_finished(run, recipe, launched):
    path = recipe()
    assert run("sweep", "--config", path, "--vars.seed", "0,1").code == 0
    result = run("sweep", "--config", path, "--vars.seed", "0,1", "--vars.learning_rate", "0.5")
    assert result.code == 2
    assert "holds a run with other settings" in result.mistakes[0]
    assert len(launched) == 2


def test_nothing_is_left_of_a_sweep_that_is_refused(run, recipe):
    path = recipe()
    for arguments in (
        ("--vars.seed", "0"),
        ("--vars.seed", "0,1", "--trainer.callbacks.7.x", "1"),
        ("--vars.seed", "0,1", "--slurm", "nowhere/x"),
        ("--vars.seed",),
    ):
        result = run("sweep", "--config", path, *arguments)
        assert result.code == 2
        assert len(result.mistakes) == 1
    assert not Path("runs").exists()


def test_the_script_of_a_slurm_array(run, recipe):
    path = recipe()
    scale = ("--data.transform.scale", "[0.2, 1.0],[0.5, 1.0]")
    result = run("sweep", "--config", path, *scale, "--vars.seed", "3", "--slurm", "a.sbatch")
    assert result.code == 0
    assert "a.sbatch trains 2 runs in runs/recipe/sweep_scale: sbatch a.sbatch" in result.out
    text = Path("a.sbatch").read_text()
    for line in (
        "#SBATCH --array=0-1",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --output=runs/recipe/sweep_scale/slurm_%A_%a.log",
        f"cd {shlex.quote(os.getcwd())}",
    ):
        assert line in text.splitlines()
    Path("srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    Path("srun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{os.getcwd()}:{os.environ['PATH']}"}
    for task, expected in ((1, "[0.5, 1.0]"), (2, None)):
        done = subprocess.run(
            ["bash", "a.sbatch"],
            env={**environment, "SLURM_ARRAY_TASK_ID": str(task)},
            capture_output=True,
            text=True,
        )
        if expected is None:
            assert done.returncode == 2
            assert "this array has tasks 0 to 1" in done.stderr
        else:
            words = done.stdout.splitlines()
            assert words[1:5] == ["-m", "diffmm.cli", "fit", "--config"]
            assert words[-2:] == [f"--data.transform.scale={expected}", "--vars.seed=3"]
            assert words[6:10] == ["--run_dir", words[7], "--resume", "auto"]
    again = run("sweep", "--config", path, *scale, "--slurm", "a.sbatch")
    assert again.mistakes == ["a.sbatch exists already: choose another --slurm"]


def test_the_process_of_a_run_and_its_exit_code(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sweep.launch(["fit", "--config", "nowhere.yaml"]) == 2
    assert sweep.launch(["recipes", "copy", "image/digits_tiny"]) == 0
    assert Path("digits_tiny.yaml").is_file()
