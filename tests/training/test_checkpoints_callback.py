"""When checkpoints are saved, their content, and failed saves."""

import errno
import json
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, Timer

from diffmm.checkpoint_folders import MANIFEST_NAME, checkpoints, fault, find_state, find_whole
from diffmm.models.weights import load_model
from diffmm.training import Checkpoints
from diffmm.training.resilience.checkpoints import SaveFailedError, callback, snapshot, writer

STEPS = 6


@pytest.fixture
def saved(make, fit, tmp_path):
    """`saved(every_n_steps=2)` trains six steps and returns the steps that were saved."""

    def run(*callbacks, steps=STEPS, task=None, **settings):
        batches = [make.batch("image") for _ in range(2)]
        saving = Checkpoints(tmp_path / "checkpoints", **settings)
        fit(
            task or make.task("image"),
            batches,
            batches,
            max_steps=steps,
            val_check_interval=3,
            limit_val_batches=1,
            enable_checkpointing=True,
            callbacks=[saving, *callbacks],
        )
        return [found.step for found in checkpoints(tmp_path / "checkpoints")]

    return run


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk({2, 3})` makes the second and the third save fail with a full disk."""

    def fill(numbers):
        attempts = []
        original = writer.HashedFile

        class Full(original):
            def __init__(self, file):
                super().__init__(file)
                attempts.append(file)

            def write(self, data):
                if len(attempts) in numbers and self.size > 1000:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(data)

        monkeypatch.setattr(writer, "HashedFile", Full)

    return fill


class Weights(Callback):
    """Records the weights of the head after each step."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weight = pl_module.model.head.weight.detach().clone()


def manifest(folder):
    return json.loads((folder / MANIFEST_NAME).read_text())


@pytest.mark.parametrize("background", [True, False])
def test_saved_by_steps_and_at_the_end(saved, tmp_path, background):
    assert saved(every_n_steps=4, keep_last=9, background=background) == [4, 6]
    folder = find_whole(tmp_path / "checkpoints")
    told = manifest(folder)
    assert (told["step"], told["world_size"], told["reason"]) == (6, 1, "schedule")
    assert told["versions"]["torch"] == str(torch.__version__)


@pytest.mark.parametrize(("minutes", "steps"), [(1e-9, [1, 2, 3, 4, 5, 6]), (60.0, [6])])
def test_saved_by_time(saved, minutes, steps):
    assert saved(every_minutes=minutes, keep_last=9) == steps


def test_saved_after_each_validation_with_what_is_monitored(saved, tmp_path):
    assert saved(monitor="val/loss", keep_last=9) == [3, 6]
    for found in checkpoints(tmp_path / "checkpoints"):
        assert found.manifest["metrics"]["val/loss"] > 0.0
    best = min(
        checkpoints(tmp_path / "checkpoints"),
        key=lambda found: found.manifest["metrics"]["val/loss"],
    )
    saving = Checkpoints(tmp_path / "checkpoints", monitor="val/loss")
    assert Path(saving.best_model_path).parent == best.path
    assert Checkpoints(tmp_path / "checkpoints").best_model_path == ""


@pytest.mark.parametrize(("last", "best", "steps"), [(2, 0, [5, 6]), (1, 2, [3, 6]), (1, 0, [6])])
def test_the_last_are_kept_and_the_best(saved, last, best, steps):
    settings = {"monitor": "val/accuracy", "mode": "max", "every_n_steps": 1}
    assert saved(**settings, keep_last=last, keep_best=best) == steps


def test_a_metric_that_is_not_logged_is_named(saved):
    with pytest.raises(
        ValueError,
        match="monitor 'val/los' is not logged in validation; logged .*val/loss",
    ):
        saved(monitor="val/los")


@pytest.mark.parametrize("is_late", [True, False])
def test_a_run_that_is_told_to_stop_is_saved_there(saved, tmp_path, is_late):
    """A run that reached its time limit may resume; one that a criterion stopped may not."""

    class Stop(Timer):
        def time_remaining(self, stage="train"):
            return 0.0 if is_late else 1.0

        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 2

    assert saved(Stop(duration={"hours": 1})) == [2]
    state = torch.load(find_state(tmp_path), weights_only=True)
    assert state["exact_resume"]["should_stop"] is not is_late


def test_the_state_is_that_of_its_step_though_training_goes_on(saved, tmp_path, monkeypatch):
    """The weights change while they are being written."""
    release, original = threading.Event(), writer.torch.save

    def slow(state, file):
        assert release.wait(timeout=20.0)
        original(state, file)

    class Release(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.steps = getattr(self, "steps", {})
            self.steps[trainer.global_step] = pl_module.model.head.weight.detach().clone()
            if trainer.global_step == 5:
                release.set()

    monkeypatch.setattr(writer.torch, "save", slow)
    watcher = Release()
    assert saved(watcher, every_n_steps=4, keep_last=9) == [4, 6]
    early = torch.load(checkpoints(tmp_path / "checkpoints")[0].path / "state.ckpt")
    head = early["state_dict"]["model.head.weight"]
    assert early["global_step"] == 4
    assert torch.equal(head, watcher.steps[4])
    assert not torch.equal(head, watcher.steps[5])


def test_without_memory_training_waits(saved, monkeypatch):
    threads = []
    monkeypatch.setattr(callback, "available_bytes", lambda: 1000)
    original = callback.snapshot
    monkeypatch.setattr(
        callback,
        "snapshot",
        lambda state, copy: (threads.append(copy), original(state, copy=copy))[1],
    )
    assert saved(every_n_steps=3, keep_last=9) == [3, 6]
    assert threads == [False, False]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_fails_a_save_but_not_the_run(saved, full_disk, tmp_path, background):
    full_disk({2, 3})
    line = (
        r"the checkpoint of step %d could not be written to .*checkpoints: it needs about [\d,]+ "
        r"bytes, and [\d,]+ are free there \(\[Errno 28\] No space left on device\)\. Training cont"
    )
    with (
        pytest.warns(UserWarning, match=line % 4),
        pytest.warns(UserWarning, match=line % 6),
    ):
        assert saved(every_n_steps=2, keep_last=9, background=background, steps=8) == [2, 8]
    for found in checkpoints(tmp_path / "checkpoints"):
        assert fault(found.path) is None
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_too_many_failed_saves_in_a_row_stop_the_run(saved, full_disk, tmp_path):
    full_disk({2, 4, 5})
    with (
        pytest.warns(UserWarning, match="it stops after 2 failed saves in a row, so far 1"),
        pytest.raises(SaveFailedError, match="the checkpoint of step 5 could not be written"),
    ):
        saved(every_n_steps=1, keep_last=9, max_failed_saves=2, steps=9, background=False)
    assert [found.step for found in checkpoints(tmp_path / "checkpoints")] == [1, 3]


def test_a_run_whose_end_is_not_saved_has_failed(saved, full_disk):
    full_disk({2})
    with (
        pytest.warns(UserWarning, match="Training continues"),
        pytest.raises(SaveFailedError, match="of step 6"),
    ):
        saved(every_n_steps=3)


def test_what_a_checkpoint_cannot_hold_is_named(saved, tmp_path):
    class Keeper(Callback):
        def state_dict(self):
            return {"kept": [1, Path("x")]}

    with pytest.raises(
        ValueError, match=r"\['callbacks'\]\['.*Keeper'\]\['kept'\]\[1\] is a PosixPath"
    ):
        saved(Keeper())
    assert not list((tmp_path / "checkpoints").glob("*step*"))


def test_averaged_weights_are_those_of_the_checkpoint(saved, tmp_path):
    last = Weights()
    assert saved(EMAWeightAveraging(decay=0.5), last) == [6]
    averaged = load_model(tmp_path)
    assert not torch.equal(averaged.head.weight, last.weight)
    state = torch.load(find_state(tmp_path), weights_only=True)["current_model_state"]
    assert torch.equal(state["model.head.weight"], last.weight)


def test_a_snapshot_shares_nothing_and_keeps_ties():
    weight = torch.arange(6.0).reshape(2, 3)
    state = {
        "a": weight,
        "b": weight,
        "view": weight[1:],
        "turned": torch.eye(2).T,
        "n": [1, (2.0,)],
    }
    copied = snapshot.snapshot(state)
    weight.zero_()
    assert copied["a"] is copied["b"]
    assert copied["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert copied["view"].tolist() == [[3.0, 4.0, 5.0]]
    assert copied["n"] == [1, (2.0,)]
    square = torch.arange(4.0).reshape(2, 2)
    copied = snapshot.snapshot({"a": square, "b": square.T})
    assert torch.equal(copied["b"], copied["a"].T)
    assert snapshot.num_bytes(state) == 4 * (6 + 6 + 3 + 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"every_minutes": 0.0}, "every_minutes must be above 0, got 0.0"),
        ({"keep_last": 0}, "keep_last must be at least 1, got 0"),
        ({"keep_best": -1}, "keep_best must be at least 0, got -1"),
        ({"max_failed_saves": 0}, "max_failed_saves must be at least 1, got 0"),
        ({"mode": "best"}, "mode .*'best'"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**settings)
