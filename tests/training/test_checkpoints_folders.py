"""Checkpoints on disk are complete, or their damage is detected."""

import json
import os
import re
import shutil
from functools import partial

import pytest

from diffmm import checkpoint_folders
from diffmm.checkpoint_folders import (
    LATEST_NAME,
    MANIFEST_NAME,
    SEAL,
    STATE_NAME,
    best,
    checkpoints,
    clean,
    fault,
    find_state,
    find_whole,
    finish,
    prune,
    seal,
    start,
)


@pytest.fixture
def save(tmp_path):
    """`save(3)` writes a checkpoint of step 3 to `tmp_path/checkpoints`."""

    def write(step, **metrics):
        unfinished = start(tmp_path / "checkpoints", step)
        (unfinished / STATE_NAME).write_bytes(bytes(range(256)) * (1 + step))
        return finish(unfinished, {"step": step, "metrics": metrics})

    return write


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "checkpoints"


def steps(directory):
    return [found.step for found in checkpoints(directory)]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_is_whole_and_named_by_latest(save, directory):
    path = save(7)
    assert path == directory / "step_00000007"
    assert sorted(os.listdir(directory)) == [LATEST_NAME, "step_00000007"]
    assert (directory / LATEST_NAME).read_text() == "step_00000007\n"
    assert fault(path) is None
    assert find_whole(directory) == path
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    assert manifest["step"] == 7
    assert manifest["files"][STATE_NAME]["size"] == 8 * 256


def test_there_may_be_none_yet(directory):
    assert find_whole(directory) is None
    directory.mkdir()
    assert find_whole(directory) is None


def reseal(folder, alter):
    """Alter a manifest and give it a valid hash, as an attacker would."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    alter(manifest)
    manifest[SEAL] = seal(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def change(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


DAMAGE = {
    "a flipped bit": (
        lambda folder: flip(folder / STATE_NAME, 300),
        "the contents of state.ckpt have changed since it was written",
    ),
    "cut off": (
        lambda folder: os.truncate(folder / STATE_NAME, 100),
        "state.ckpt has 100 bytes of 1024",
    ),
    "a lost file": (
        lambda folder: (folder / STATE_NAME).unlink(),
        "state.ckpt cannot be read: No such file or directory",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST_NAME).unlink(), "it has no manifest.json"),
    "half a manifest": (
        lambda folder: os.truncate(folder / MANIFEST_NAME, 30),
        "its manifest.json is damaged",
    ),
    "an empty manifest": (
        lambda folder: (folder / MANIFEST_NAME).write_text("{}"),
        "its manifest.json is damaged",
    ),
    "no JSON object": (
        lambda folder: (folder / MANIFEST_NAME).write_text("[1]"),
        "its manifest.json is damaged",
    ),
    "no text": (
        lambda folder: (folder / MANIFEST_NAME).write_bytes(b"\xff\xfe"),
        "its manifest.json is damaged",
    ),
    "another number": (
        lambda folder: change(folder / MANIFEST_NAME, '"number": 3', '"number": 7'),
        "its manifest.json is damaged",
    ),
    "deep nesting": (
        lambda folder: (folder / MANIFEST_NAME).write_text("[" * 100_000),
        "its manifest.json is damaged",
    ),
    "a pipe for a manifest": (
        lambda folder: pipe(folder / MANIFEST_NAME),
        "its manifest.json is damaged",
    ),
    "a pipe for a state": (
        lambda folder: pipe(folder / STATE_NAME),
        "state.ckpt is not a regular file",
    ),
}
SEALED = {
    "no files": lambda manifest: manifest.update(files={}),
    "files in a list": lambda manifest: manifest.update(files=[STATE_NAME]),
    "a file without a size": lambda manifest: manifest["files"][STATE_NAME].pop("size"),
    "a hash that is no text": lambda manifest: manifest["files"][STATE_NAME].update(sha256=1),
    "a file elsewhere": lambda manifest: manifest["files"].update(
        {"../step_00000002/state.ckpt": manifest["files"][STATE_NAME]}
    ),
    "a file from the root": lambda manifest: manifest["files"].update(
        {"/etc/passwd": manifest["files"][STATE_NAME]}
    ),
    "no step": lambda manifest: manifest.pop("step"),
    "a step that is no number": lambda manifest: manifest.update(step="3"),
    "a step below zero": lambda manifest: manifest.update(step=-3),
    "no number": lambda manifest: manifest.pop("number"),
    "half a number": lambda manifest: manifest.update(number=2.5),
    "metrics in a list": lambda manifest: manifest.update(metrics=[1.0]),
    "a metric that is no number": lambda manifest: manifest["metrics"].update({"val/loss": "low"}),
}
DAMAGE |= {
    what: (partial(reseal, alter=alter), "its manifest.json is damaged")
    for what, alter in SEALED.items()
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(save, directory, damage):
    for step in (1, 2, 3):
        save(step)
    harm, message = DAMAGE[damage]
    harm(directory / "step_00000003")
    line = f"{directory}: using step_00000002 instead of step_00000003 ({message}): remove the"
    with pytest.warns(UserWarning, match=re.escape(line)):
        assert find_whole(directory) == directory / "step_00000002"
    refusal = f"checkpoint {directory}/step_00000003 is damaged: {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(refusal)}$"):
        find_state(directory / "step_00000003")


def test_every_broken_checkpoint_is_named_in_one_line(save, directory):
    for step in (1, 2, 3, 4):
        save(step)
    for step in (2, 3):
        flip(directory / f"step_0000000{step}" / STATE_NAME, 0)
    (directory / "step_00000004" / MANIFEST_NAME).unlink()
    start(directory, 5)
    lines = []
    assert find_whole(directory, warn=lines.append) == directory / "step_00000001"
    (line,) = lines
    for name in ("step_00000002 (", "step_00000003 (", "step_00000004 (", "step_00000005 (it is"):
        assert name in line
    shutil.rmtree(directory / "step_00000001")
    with pytest.raises(ValueError, match="no checkpoint in .* is complete: step_00000004 (.*), "):
        find_whole(directory)


@pytest.mark.parametrize("content", [None, "", "step_00000009\n", "../elsewhere\n"])
def test_a_wrong_latest_loses_nothing(save, directory, content):
    save(1)
    path = save(2)
    (directory / LATEST_NAME).unlink()
    if content is not None:
        (directory / LATEST_NAME).write_text(content)
    assert find_whole(directory) == path


@pytest.mark.parametrize("moment", range(20))
@pytest.mark.parametrize("again", [False, True])
def test_whenever_a_save_is_cut_off_a_whole_one_is_left(
    save, directory, monkeypatch, moment, again
):
    """Interrupt a save at each of its changes to the disk, in turn."""
    save(1)
    last = 2 if again else 1
    save(last)
    calls = []

    class CutOffError(BaseException):
        pass

    def counted(function):
        def call(*arguments, **settings):
            calls.append(function)
            if len(calls) > moment:
                raise CutOffError
            return function(*arguments, **settings)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", counted(os.fsync))
        patched.setattr("pathlib.Path.rename", counted(checkpoint_folders.Path.rename))
        patched.setattr("pathlib.Path.replace", counted(checkpoint_folders.Path.replace))
        patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            save(2)
        except CutOffError:
            assert len(calls) == moment + 1
        else:
            assert len(calls) <= moment
    found = find_whole(directory, warn=lambda line: None)
    assert fault(found) is None
    assert steps(directory)[-1] in (last, 2)
    clean(directory)
    assert find_whole(directory).name in ("step_00000001", "step_00000002")[last - 1 :]
    assert all(name.startswith(("step_", "LATEST")) for name in os.listdir(directory))


def test_a_broken_checkpoint_of_the_same_step_is_replaced(save, directory):
    save(1)
    flip(save(2) / STATE_NAME, 0)
    path = save(2)
    assert find_whole(directory) == path
    assert sorted(os.listdir(directory)) == [LATEST_NAME, "step_00000001", "step_00000002"]


def test_the_newest_is_the_one_that_was_written_last(save, directory):
    for step in (5, 6, 3):  # as in a run resumed from an earlier step
        save(step)
    assert steps(directory) == [5, 6, 3]
    assert find_whole(directory).name == "step_00000003"


def test_the_last_and_the_best_are_kept(save, directory):
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3), (4, 0.2), (5, 0.9)):
        save(step, loss=loss)
    save(6)
    assert [found.step for found in best(directory, "loss", "min")] == [2, 4, 3, 1, 5]
    assert best(directory, "loss", "max")[0].step == 5
    prune(directory, keep_last=2, keep_best=2, monitor="loss", mode="min")
    assert steps(directory) == [2, 4, 5, 6]
    prune(directory, keep_last=1, keep_best=1, monitor="loss", mode="max")
    assert steps(directory) == [5, 6]
    prune(directory, keep_last=1, keep_best=1, monitor=None, mode="min")
    assert steps(directory) == [6]


def test_pruning_counts_no_broken_one(save, directory):
    for step in (1, 2, 3):
        save(step)
    os.truncate(directory / "step_00000003" / STATE_NAME, 10)
    prune(directory, keep_last=1, keep_best=0, monitor=None, mode="min")
    assert sorted(path.name for path in directory.glob("step_*")) == [
        "step_00000002",
        "step_00000003",
    ]


def test_a_run_its_checkpoints_and_a_folder_all_name_a_state(save, tmp_path):
    save(1)
    state = save(2) / STATE_NAME
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/step_00000002"):
        assert find_state(path) == state
    for path in (state, tmp_path / "nowhere", tmp_path / "nowhere.ckpt"):
        assert find_state(path) == path


def test_a_run_of_lightnings_own_checkpoints_serves_too(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for number, name in enumerate(("a.ckpt", "b.ckpt")):
        path = tmp_path / "checkpoints" / name
        path.touch()
        os.utime(path, (number, number))
    assert find_state(tmp_path) == tmp_path / "checkpoints" / "b.ckpt"
