"""The weights with which a run ends are validated, whatever the interval."""

import csv
from pathlib import Path

import pytest
import torch

from diffmm.checkpoint_folders import checkpoints, find_state

CHANGES = {
    "trainer.max_steps": 5,
    "trainer.val_check_interval": 2,
    "vars.steps": 20,
    "model.schedule.warmup_steps": 1,
}


def logged(directory, metric):
    """The steps, counted from 1, at which a run has logged a metric."""
    steps = []
    for file in (directory / "csv").rglob("metrics.csv"):
        with file.open() as opened:
            steps += [int(row["step"]) + 1 for row in csv.DictReader(opened) if row.get(metric)]
    return sorted(steps)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, [2, 4, 5]),
        ({"trainer.max_steps": 4}, [2, 4]),
        ({"trainer.val_check_interval": 9}, [5]),
        ({"trainer.val_check_interval": "00:01:00:00"}, [5]),
        (
            {"trainer.max_steps": -1, "trainer.max_epochs": 2, "trainer.limit_train_batches": 3},
            [2, 4, 6],
        ),
        (
            {"trainer.max_steps": -1, "trainer.max_epochs": 3, "trainer.limit_train_batches": 1},
            [2, 3],
        ),
        ({"trainer.accumulate_grad_batches": 2, "trainer.max_steps": 3}, [1, 2, 3]),
        ({"trainer.limit_val_batches": 0, "trainer.callbacks.0.monitor": None}, []),
    ],
)
def test_the_last_step_is_validated_once(run, recipe, changes, steps):
    path = recipe(**{**CHANGES, **changes})
    assert run("fit", "--config", path, "--name", "a").code == 0
    directory = Path("runs/recipe/a")
    assert logged(directory, "val/loss") == steps
    *_, last = checkpoints(directory / "checkpoints")
    assert ("val/accuracy" in last.manifest["metrics"]) == bool(steps)
    assert last.manifest["number"] == max(1, len(steps))  # not also saved before it is validated


def test_a_run_goes_on_for_longer_as_if_its_end_had_not_been_validated(run, recipe):
    path = recipe(**CHANGES)
    directories = [Path("runs/recipe/short"), Path("runs/recipe/long")]
    assert run("fit", "--config", path, "--name", "short").code == 0
    assert run("fit", "--resume", directories[0]).code == 0  # is finished: validates nothing
    longer = ("--trainer.max_steps", "9")
    assert run("fit", "--resume", directories[0], *longer).code == 0
    assert run("fit", "--config", path, "--name", "long", *longer).code == 0
    short, long = (torch.load(find_state(path), weights_only=True) for path in directories)
    assert all(torch.equal(short["state_dict"][name], w) for name, w in long["state_dict"].items())
    assert short["loops"] == long["loops"]
    assert logged(directories[0], "train/loss") == logged(directories[1], "train/loss")
    assert logged(directories[0], "val/loss") == [2, 4, 5, 6, 8, 9]
    assert logged(directories[1], "val/loss") == [2, 4, 6, 8, 9]


def test_a_shorter_run_is_told_which_key_shortens_its_warmup(run):
    command = ("--vars.steps", "60", "--model.schedule.warmup_steps")
    result = run("fit", "--config", "image/digits_tiny", *command, "100")
    assert result.code == 2
    assert "--model.schedule.warmup_steps 6" in result.mistakes[0]
    assert run("check", "image/digits_tiny", *command, "6").code == 0
