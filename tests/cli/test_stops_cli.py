"""Signals and non-finite numbers on the command line."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from diffmm.checkpoint_folders import find_whole
from diffmm.training import Classification


@pytest.fixture
def sends(monkeypatch):
    """`sends(number, step)` makes training send itself a signal during the step after `step`."""

    def install(number, step):
        original = Classification.loss_sum

        def loss_sum(task, batch, batch_idx):
            if task.global_step == step:
                os.kill(os.getpid(), number)
            return original(task, batch, batch_idx)

        monkeypatch.setattr(Classification, "loss_sum", loss_sum)
        return lambda: monkeypatch.setattr(Classification, "loss_sum", original)

    return install


def state_of(directory):
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
    assert result.out.splitlines()[-1] == f"stopped: resume with `diffmm fit --resume {directory}`"
    assert state_of(directory)[0] == 2
    result = run("fit", "--resume", directory)
    assert (result.code, result.out.splitlines()[-1]) == (0, f"run: {directory}")
    step, weights = state_of(directory)
    assert step == 4
    for name, tensor in state_of(Path("runs/recipe/whole"))[1].items():
        assert torch.equal(tensor, weights[name]), name


def test_before_the_first_step_a_run_can_go_on_too(run, recipe, monkeypatch):
    monkeypatch.setattr(
        Classification, "on_fit_start", lambda task: os.kill(os.getpid(), signal.SIGTERM)
    )
    path = recipe()
    assert run("fit", "--config", path, "--name", "first").code == 143
    monkeypatch.undo()
    # `undo` has also restored the previous working directory.
    os.chdir(path.parent / "work")
    result = run("fit", "--resume", "runs/recipe/first")
    assert result.code == 0, result.err
    assert state_of(Path("runs/recipe/first"))[0] == 2


def test_a_finetuned_run_stops_alike(run, recipe, sends):
    path = recipe()
    assert run("fit", "--config", path, "--name", "first").code == 0
    sends(signal.SIGTERM, 0)
    command = ("--config", path, "--weights", "runs/recipe/first", "--name", "second")
    result = run("finetune", *command)
    assert result.code == 143
    assert "resume with `diffmm fit --resume runs/recipe/second`" in result.out


def test_ctrl_c_elsewhere_prints_no_traceback(run, recipe, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffmm.cli.recipes.run", interrupted)
    assert run("recipes") == (130, "", "")


def test_a_run_that_diverges_says_why_it_ends_and_can_be_looked_at(run, recipe, monkeypatch):
    # A learning rate above the accepted maximum, because a smaller one may give finite numbers.
    monkeypatch.setattr("diffmm.training.optimizer.LARGEST_RATE", 1e30)
    # The lambda of v1 is an exponential, and therefore the first value that overflows.
    changes = {"vars.learning_rate": 1e30, "vars.attention": "diff_v1"}
    path = recipe(**changes, **{"trainer.max_steps": 50, "data.batch_size": 3})
    result = run("fit", "--config", path, "--name", "first")
    assert result.code == 1
    directory = Path("runs/recipe/first")
    (line,) = result.mistakes
    assert re.match("10 steps in a row had a loss or gradient that is not finite, .* step 1", line)
    step, weights = state_of(directory)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert len((directory / "bad_steps.jsonl").read_text().splitlines()) >= 10
    before = sorted(directory.rglob("*"))
    result = run("replay", directory)
    assert result.code == 0
    first, second = result.out.splitlines()
    checkpoint = directory / "checkpoints" / f"step_{step:08d}"
    assert first == (
        f"{directory}/bad_batch_step_{step:08d}_rank_0.pt, with the weights of {checkpoint}"
    )
    assert second.startswith("  micro-batch 0: loss ")
    assert "; first in the output of " in second
    assert re.search(r"alone, of the samples \d+, \d+, \d+; in the gradients of ", second)
    assert sorted(directory.rglob("*")) == before


def test_replay_refuses_what_it_cannot_make_again(run, recipe):
    assert run("replay", "nowhere").mistakes == [
        "nowhere has no bad_batch_step_*.pt: it did not stop because of non-finite numbers"
    ]
    assert run("fit", "--config", recipe(), "--name", "first").code == 0
    file = Path("x.pt")
    torch.save({"step": 2}, file)
    result = run("replay", "runs/recipe/first", "--batch", file)
    assert result.code == 2
    assert "x.pt is not a batch saved by a stopped run" in result.mistakes[0]


def processes_of(group):
    """Ranks and process IDs of the training processes of a process group, from /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) != group:
                continue
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((each[11:] for each in environment if each.startswith(b"LOCAL_RANK=")), b"0")
        # Workers have higher process IDs than their process.
        found.setdefault(int(rank), []).append(int(folder.name))
    return {rank: min(numbers) for rank, numbers in found.items()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_two_processes_with_workers_write_one_run_and_stop_together(
    recipe, tmp_path, start, wait_until
):
    """Processes started by Lightning; the signal is sent to all, as by a terminal or a scheduler.
    Signals to one of several processes: tests/training/test_stops.py."""
    changes = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.num_workers": 1}
    path = recipe(**{**changes, "trainer.max_steps": 10**6})
    command = [sys.executable, "-m", "diffmm.cli", "fit", "--config", str(path)]
    runs = tmp_path / "runs" / "recipe"
    with start(command, {"OMP_NUM_THREADS": "1"}, tmp_path) as fit:
        wait_until(lambda: any(runs.glob("*/csv/version_0/metrics.csv")), 90)
        assert len(processes_of(fit.pid)) == 2
        os.killpg(fit.pid, signal.SIGTERM)
        out, err = fit.finish(60)
        assert fit.returncode == 143, err
        (directory,) = runs.iterdir()
        assert (directory / "config.yaml").is_file()
        told = f"stopped: resume with `diffmm fit --resume {directory.relative_to(tmp_path)}`"
        assert out.splitlines().count(told) == 1
        assert state_of(directory)[0] > 0
        wait_until(lambda: processes_of(fit.pid) == {}, 20)
