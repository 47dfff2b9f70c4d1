"""Runs of two processes resume exactly, also as runs of one process."""

import json
import runpy
from pathlib import Path

import pytest
from forked import run_as_torchrun

from diffmm.checkpoint_folders import checkpoints

SCRIPT = Path(__file__).with_name("run_resume.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one():
    return runpy.run_path(str(SCRIPT))["run"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one):
    folder = tmp_path_factory.mktemp("processes")
    one(folder / "one", stop=5, dropout=0.0)
    run_as_torchrun(SCRIPT, 2, [str(folder)], tmp_path_factory.mktemp("logs"))
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("epochs", 7),
        ("within a step", 8),
        ("sharded", 4),
        ("sharded, within a step", 8),
        ("both media", 6),
    ],
)
def test_two_processes_go_on_with_the_same_bits(two, name, stop):
    assert two[name] == {"same batches": True, "same weights": True, "stopped after": stop}


def test_what_every_process_wrote_is_in_the_manifest(folder, two):
    (saved,) = checkpoints(folder / "sharded" / "whole" / "checkpoints")
    assert len([name for name in saved.manifest["files"] if name.endswith(".distcp")]) == 2
    assert saved.manifest["world_size"] == 2


def test_one_process_becomes_two(one, two, tmp_path):
    whole = one(tmp_path, dropout=0.0)
    grown = two["of one process"]
    assert grown["batches"] == whole["batches"][5:]
    for row, other in zip(grown["weights"], whole["weights"], strict=True):
        assert row == pytest.approx(other, abs=1e-5)


def test_two_processes_become_one(one, two, folder, tmp_path):
    whole = one(tmp_path, dropout=0.0)
    assert two["for one process"]["batches"] == whole["batches"][:5]
    rest = one(tmp_path / "rest", resume=folder / "two", dropout=0.0)
    assert rest["batches"] == whole["batches"][5:]
    for row, other in zip(rest["weights"], whole["weights"], strict=True):
        assert row == pytest.approx(other, abs=1e-5)


def test_it_says_so(one, folder, two):
    with pytest.warns(UserWarning, match="with 1 processes instead of 2: each step has the same"):
        one(folder / "two", resume=folder / "two", dropout=0.0, quiet=False)


def test_gradients_of_two_processes_are_not_for_one(one, folder, two):
    with pytest.raises(ValueError, match="of 2 processes was saved within an accumulated step"):
        one(folder / "rest", resume=folder / "unfinished", accumulate_grad_batches=3)
