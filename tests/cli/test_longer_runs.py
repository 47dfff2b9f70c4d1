"""Finished runs: they report that they are finished, and can be extended."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from diffmm.checkpoint_folders import checkpoints, find_state
from diffmm.cli import main
from diffmm.training.task import Task

EVERY_STEP = {
    "trainer.callbacks.0.monitor": None,
    "trainer.callbacks.0.every_n_steps": 1,
    "trainer.callbacks.0.keep_last": 9,
    "trainer.max_steps": 4,
}
"""Four steps, and a checkpoint after each."""


def state_of(directory):
    return torch.load(find_state(directory), weights_only=True)


@pytest.fixture(scope="module")
def ended(recipe_in, tmp_path_factory):
    """A folder with a run that finished after four steps, at the end of its schedule."""
    folder = tmp_path_factory.mktemp("ended")
    path = recipe_in(
        folder,
        **{**EVERY_STEP, "trainer.max_steps": "${vars.steps}", "vars.steps": 4},
        **{"model.schedule.warmup_steps": 1, "model.schedule.final_fraction": 0.01},
        **{"vars.learning_rate": 1e-3},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", str(path), "--name", "first"]) == 0
    return folder


@pytest.fixture
def finished(run, ended):
    """A copy of the run in the working directory."""
    shutil.copytree(ended, ".", dirs_exist_ok=True)
    return Path("runs/recipe/first")


def rates_of(directory):
    """The logged learning rate of every step."""
    rates = {}
    for file in (directory / "csv").rglob("metrics.csv"):
        with file.open() as opened:
            for row in csv.DictReader(opened):
                if row["train/learning_rate"]:
                    rates[int(row["step"])] = float(row["train/learning_rate"])
    return [rates[step] for step in sorted(rates)]


def used_rates(monkeypatch):
    """The learning rate of the optimizer in every step."""
    rates, original = [], torch.optim.AdamW.step

    def step(optimizer, *args, **settings):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(optimizer, *args, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return rates


LONGER_BY = {
    "the schedule stays": (
        ("--trainer.max_steps", "6"),
        "its schedule ends at step 4, as before: the learning rate stays at 1e-05",
        [1e-5, 1e-5],
    ),
    "the schedule is longer": (
        ("--trainer.max_steps", "6", "--model.schedule.total_steps", "9"),
        "its schedule ends at step 9, not 4: the learning rate is 0.000694 now and 0.000505 at "
        "last",
        [6.94e-4, 5.05e-4],
    ),
    "what both refer to": (
        ("--vars.steps", "6"),
        "its schedule ends at step 6, not 4: the learning rate is 0.000352 now and 0.000105 at "
        "last",
        [3.52e-4, 1.05e-4],
    ),
}


@pytest.mark.parametrize("how", LONGER_BY)
def test_a_finished_run_goes_on_for_longer(run, finished, monkeypatch, how):
    """The logged learning rates are those of the steps."""
    arguments, line, expected = LONGER_BY[how]
    rates = used_rates(monkeypatch)
    result = run("fit", "--resume", finished, *arguments)
    assert result.code == 0, result.err
    assert f"{finished} resumes from step 4 to step 6; {line}\n" in result.out
    assert rates == pytest.approx(expected, rel=0.01)
    assert rates_of(finished)[4:] == pytest.approx(rates)
    assert state_of(finished)["global_step"] == 6
    # From now on, the run has this length, however it is resumed.
    shutil.rmtree(finished / "checkpoints" / "step_00000006")
    assert run("fit", "--resume", finished).code == 0
    assert state_of(finished)["global_step"] == 6


def test_a_longer_run_is_the_one_that_was_longer_from_the_start(run, recipe):
    path = recipe(**EVERY_STEP, **{"model.schedule.warmup_steps": 2})
    assert run("fit", "--config", path, "--name", "short").code == 0
    command = ("--trainer.max_steps", "6")
    assert run("fit", "--resume", "runs/recipe/short", *command).code == 0
    assert run("fit", "--config", path, "--name", "long", *command).code == 0
    one, other = (state_of(Path("runs/recipe", name))["state_dict"] for name in ("short", "long"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_of_epochs_goes_on_for_longer(run, recipe):
    changes = {**EVERY_STEP, "trainer.max_steps": -1, "trainer.limit_train_batches": 2}
    path = recipe(**changes, **{"trainer.max_epochs": 2})
    assert run("fit", "--config", path, "--name", "first").code == 0
    directory = Path("runs/recipe/first")
    result = run("fit", "--resume", directory, "--trainer.max_epochs", "3")
    assert result.code == 0, result.err
    assert "runs/recipe/first resumes from step 4 to the end of epoch 3; its sched" in result.out
    assert state_of(directory)["global_step"] == 6
    assert run("fit", "--resume", directory, "--trainer.max_epochs", "2").mistakes == [
        "the run has already completed epoch 2: trainer.max_epochs must be larger"
    ]


def test_epochs_replace_the_steps_of_a_finished_run(run, finished):
    """As the message of a finished run offers. An epoch has 22 steps."""
    command = ("fit", "--resume", finished, "--trainer.max_epochs")
    result = run(*command, "1")
    assert result.code == 0, result.err
    assert f"{finished} resumes from step 4 to the end of epoch 1; its schedule" in result.out
    assert state_of(finished)["global_step"] == 22
    assert "which is finished after step 22" in run("fit", "--resume", finished).out
    result = run(*command, "9", "--trainer.max_steps", "24")
    assert result.code == 0, result.err
    assert state_of(finished)["global_step"] == 24


@pytest.mark.filterwarnings("ignore:this checkpoint was not saved by Checkpoints")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_run_with_lightning_s_own_checkpoint_goes_on_for_longer(run, finished):
    state = state_of(finished)
    for found in checkpoints(finished / "checkpoints"):
        shutil.rmtree(found.path)
    path = finished / "checkpoints" / "last.ckpt"
    del state["exact_resume"], state["callbacks"]
    torch.save(state, path)
    result = run("fit", "--resume", finished, "--trainer.max_steps", "6")
    assert result.code == 0, result.err
    assert f"{finished} resumes from step 4 to step 6; " in result.out
    for found in checkpoints(finished / "checkpoints"):
        shutil.rmtree(found.path)
    path.write_bytes(b"nothing")
    result = run("fit", "--resume", finished, "--trainer.max_steps", "7")
    assert result.code == 2
    assert result.mistakes[0].startswith(f"{path} is not a checkpoint of a run: ")


def test_a_run_that_has_ended_says_so(run, finished):
    result = run("fit", "--resume", finished)
    assert result.code == 0
    assert (
        f"run: {finished}, which is finished after step 4: to train for longer, add "
        f"--trainer.max_steps N (or --trainer.max_epochs N)\n"
    ) in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--trainer.max_steps", "4", "--trainer.max_epochs", "9"),
            "the run has already made 4 steps: trainer.max_steps must be larger, got 4",
        ),
        (
            ("--trainer.max_steps", "9", "--data.batch_size", "8"),
            "--resume can only change the length of a run (trainer.max_steps, trainer.max_epochs, "
            "trainer.max_time, model.init_args.schedule.total_steps), not "
            "data.init_args.batch_size. A new run from its weights is `diffmm finetune`",
        ),
        (("--trainer.max_steps", ".inf"), "trainer.max_steps must be finite, got inf"),
    ],
)
def test_what_is_no_longer_run_is_refused(run, finished, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = run("fit", "--resume", finished, *arguments)
    assert result.code == 2
    assert result.mistakes == [message]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_steps_that_would_learn_nothing_are_refused(run, recipe):
    schedule = {"kind": "linear", "total_steps": "${vars.steps}"}
    path = recipe(**EVERY_STEP, **{"model.schedule": schedule, "vars.steps": 4})
    assert run("fit", "--config", path, "--name", "first").code == 0
    command = ("fit", "--resume", "runs/recipe/first", "--trainer.max_steps", "6")
    assert run(*command).mistakes == [
        "the learning rate reaches 0 at step 4, and nothing would be learned after it: "
        "also give a longer schedule (--model.schedule.total_steps 6)"
    ]
    assert run(*command, "--model.schedule.total_steps", "6").code == 0
    assert state_of(Path("runs/recipe/first"))["global_step"] == 6


def test_max_time_is_that_of_each_start(run, recipe, monkeypatch):
    """A run that reached its time limit reports how to resume, and resumes when it is started
    again."""
    path = recipe(**{**EVERY_STEP, "trainer.max_time": {"seconds": 100}})
    now = [0.0]
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", lambda: now[0])
    original = Task.training_step

    def training_step(task, batch, batch_idx):
        now[0] += 60.0
        return original(task, batch, batch_idx)

    monkeypatch.setattr(Task, "training_step", training_step)
    directory = Path("runs/recipe/first")
    result = run("fit", "--config", path, "--name", "first")
    for steps in (2, 4):
        assert result.code == 0, result.err
        assert state_of(directory)["global_step"] == steps
        line = f"max_time is up after step {steps}: resume with `diffmm fit --resume {directory}`\n"
        assert (line in result.out) == (steps < 4)
        result = run("fit", "--resume", directory)
    assert "which is finished after step 4" in result.out
