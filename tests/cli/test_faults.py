"""`python -m benchmarks.faults --quick` loses nothing, and its checks detect losses."""

import json
import logging
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.faults import damage, kills
from benchmarks.faults.__main__ import main
from benchmarks.faults.mutations import outcome
from benchmarks.faults.recorder import record_path
from benchmarks.faults.runs import NUM_STEPS, Run, differences
from benchmarks.faults.tally import Fault, table
from diffmm import checkpoint_folders
from diffmm.checkpoint_folders import STATE_NAME, find_state

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs the processes of Linux")
@pytest.mark.filterwarnings("ignore")  # which a process of its own prints
def test_nothing_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["faults", "--quick", "--out", str(tmp_path)])
    code = main()
    out = capsys.readouterr().out
    assert code == 0, out
    faults = json.loads((tmp_path / "faults.json").read_text())
    kinds = {fault["kind"] for fault in faults}
    assert kinds >= {"SIGTERM", "SIGUSR1", "SIGINT", "checkpoints: bytes flipped"}
    assert kinds >= {"two runs in one folder", "changed data", "FIFOs", "headers with wrong sizes"}
    assert any(kind.startswith("SIGKILL") for kind in kinds)
    assert [fault for fault in faults if fault["lost"]] == []
    assert f"| **all** | {len(faults)} | {len(faults)} | 0 |" in out


@pytest.fixture
def run(tmp_path):
    """The files of a finished run."""
    run = Run("text", tmp_path / "first")
    for step in (NUM_STEPS - 2, NUM_STEPS):
        state = {
            "global_step": step,
            "state_dict": {"model.weight": torch.arange(100.0)},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
            "lr_schedulers": [{"last_epoch": step}],
        }
        unfinished = checkpoint_folders.start(run.checkpoints, step)
        torch.save(state, unfinished / STATE_NAME)
        checkpoint_folders.finish(unfinished, {"step": step})
    samples = record_path(run.samples, 0)
    samples.parent.mkdir()
    lines = [{"begins": 0}]
    for step in range(4):
        lines.append({"place": [0, step], "step": step, "samples": [step, 9], "digest": "a"})
    samples.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run


def copy(run, name):
    other = Run(run.modality, run.folder.with_name(name))
    shutil.copytree(run.folder, other.folder)
    return other


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("state_dict", lambda state: state["state_dict"]["model.weight"].add_(1e-6), "state_dict"),
        (
            "optimizer",
            lambda state: state["optimizer_states"][0]["state"][0]["step"].add_(1),
            "optimizer_states",
        ),
        ("step", lambda state: state.update(global_step=3), "ended at step 3"),
    ],
)
def test_other_values_are_seen(run, part, change, told):
    other = copy(run, "second")
    assert differences(other, run) == []
    state = torch.load(find_state(other.directory), weights_only=True)
    change(state)
    unfinished = checkpoint_folders.start(other.checkpoints, NUM_STEPS)
    torch.save(state, unfinished / STATE_NAME)
    checkpoint_folders.finish(unfinished, {"step": NUM_STEPS})
    (line,) = differences(other, run)
    assert told in line


@pytest.mark.parametrize(
    ("place", "samples", "digest", "told"),
    [
        (2, [2, 8], "a", "other samples in 1 batches, from (0, 2)"),
        (2, [2, 9], "b", "other samples in 1 batches, from (0, 2)"),
        (4, [2, 9], "a", "other batches"),
    ],
)
def test_other_samples_are_seen(run, place, samples, digest, told):
    """A wrong batch is detected even if another repetition of it was correct."""
    other = copy(run, "second")
    line = {"place": [0, place], "step": place, "samples": samples, "digest": digest}
    with record_path(other.samples, 0).open("a") as file:
        file.write(f"{json.dumps(line)}\n")
    (difference,) = differences(other, run)
    assert told in difference


def test_a_place_that_was_lost_is_seen(run):
    assert kills.newest(run) == NUM_STEPS
    assert kills.resumed_elsewhere(run, 1, NUM_STEPS) == []
    (line,) = kills.resumed_elsewhere(run, 0, NUM_STEPS)
    assert line == f"it resumed at step [0], but step {NUM_STEPS} was complete"


def test_a_save_that_was_cut_off_is_seen(run):
    assert kills.marks_of_a_save(run.checkpoints) == set()
    checkpoint_folders.start(run.checkpoints, 99)
    ((name, _),) = kills.marks_of_a_save(run.checkpoints)
    assert name == ".unfinished-step_00000099"


@pytest.mark.parametrize("way", damage.WAYS)
def test_damage_that_goes_unnoticed_is_seen(run, tmp_path, monkeypatch, way):
    rng = random.Random(0)
    cases = list(damage.damage_checkpoints(run, way, 10, tmp_path / "damaged", rng))
    assert [case.lost for case in cases] == [""] * 10
    monkeypatch.setattr(checkpoint_folders, "fault", lambda folder, read=True: None)
    cases = list(damage.damage_checkpoints(run, way, 10, tmp_path / "damaged", rng))
    assert any("is used instead of" in case.lost for case in cases)


def test_what_a_command_does_not_tell_is_seen(monkeypatch):
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    assert outcome("check", "nowhere.yaml") == []
    assert logger.level == level

    def fails(verb, arguments):
        raise KeyError("step")

    monkeypatch.setattr("diffmm.cli.check.run", fails)
    (line,) = outcome("check", "nowhere.yaml")
    assert line.startswith("KeyError at test_faults.py:")


def test_the_table_counts_by_kind():
    faults = [Fault("a", "x"), Fault("b", "y"), Fault("a", "z").and_lost(["one", "two"])]
    assert faults[2].lost == "one; two"
    assert table(faults).splitlines()[2:] == [
        "| a | 2 | 1 | 1 |",
        "| b | 1 | 1 | 0 |",
        "| **all** | 3 | 2 | 1 |",
    ]
