"""Signals and bad numbers, as a user of the command line meets them."""

import os
import signal
from pathlib import Path

import pytest
import torch

from diffmm.checkpoint_folders import find_whole
from diffmm.training import Classification


@pytest.fixture
def sends(monkeypatch):
    """`sends(number, step)`: training sends itself a signal within the step after `step`."""

    def install(number, step):
        loss = Classification.training_loss

        def training_loss(task, batch, batch_idx):
            if task.global_step == step:
                os.kill(os.getpid(), number)
            return loss(task, batch, batch_idx)

        monkeypatch.setattr(Classification, "training_loss", training_loss)
        return lambda: monkeypatch.setattr(Classification, "training_loss", loss)

    return install


def weights_of(directory):
    state = torch.load(find_whole(directory / "checkpoints") / "state.ckpt", weights_only=True)
    return state["global_step"], state["state_dict"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_tells_how_to_go_on(run, recipe, sends, number, code):
    path = recipe(**{"trainer.max_steps": 4})
    assert run("fit", "--config", path, "--name", "whole").code == 0
    undo = sends(number, 1)
    result = run("fit", "--config", path, "--name", "first")
    undo()
    directory = Path("runs/recipe/first")
    assert result.code == code
    assert result.out.splitlines()[-1] == f"stopped: go on with `diffmm fit --resume {directory}`"
    assert weights_of(directory)[0] == 2
    result = run("fit", "--resume", directory)
    assert (result.code, result.out.splitlines()[-1]) == (0, f"run: {directory}")
    step, weights = weights_of(directory)
    assert step == 4
    for name, tensor in weights_of(Path("runs/recipe/whole"))[1].items():
        assert torch.equal(tensor, weights[name]), name
