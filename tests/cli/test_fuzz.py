"""Random changes of recipes and manifests: an error line, or the original values."""

import json
import random
import shutil
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.faults import mutations
from diffmm import checkpoint_folders
from diffmm.checkpoint_folders import MANIFEST_NAME, SEAL, STATE_NAME, find_whole, seal


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("image/digits_tiny", "mutate_text"),
        ("audio/sound_events_tiny", "mutate_recipes"),
    ],
)
def test_recipes(tmp_path, name, how):
    """A command must not raise, hang or fail without a message. Text recipes: test_faults.py."""
    faults = list(getattr(mutations, how)(name, 12, tmp_path, random.Random(f"{name} {how}")))
    assert len(faults) == 12
    assert [fault for fault in faults if fault.lost] == []


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["..", "/etc/passwd", STATE_NAME, f"../step_00000001/{STATE_NAME}"])
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
FIELDS = ("files", "step", "epoch", "metrics", "reason", "world_size")


def bounded(count):
    return settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def used(directory):
    """The step of the checkpoint that is used, and the warnings."""
    told = []
    path = find_whole(directory, warn=told.append)
    checkpoint_folders.best(directory, "a", "min")
    return torch.load(path / STATE_NAME, weights_only=True)["step"], told


@bounded(200)
@given(st.data())
def test_manifests_whose_bytes_are_others(tmp_path_factory, data):
    """A manifest contains its own hash: if it differs, the previous checkpoint is used."""
    folder = tmp_path_factory.mktemp("a")
    try:
        path = manifest_of(folder)
        content = path.read_bytes()
        place = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(max_size=5))
        changed = content[:place] + piece + content[place + data.draw(st.integers(0, 5)) :]
        path.write_bytes(changed)
        step, told = used(folder)
        try:
            same = json.loads(changed) == json.loads(content)
        except ValueError:
            same = False
        assert step == (2 if same else 1)
        assert same or "step_00000002" in told[0]
    finally:
        shutil.rmtree(folder)


@bounded(200)
@given(st.sampled_from(FIELDS), JUNK, st.booleans())
def test_manifests_that_lie_under_a_seal(tmp_path_factory, field, value, inside):
    """Invalid file names and steps in a manifest with a valid hash are rejected."""
    folder = tmp_path_factory.mktemp("a")
    try:
        path = manifest_of(folder)
        manifest = json.loads(path.read_text())
        before = deepcopy(manifest)
        if inside:
            manifest["files"][STATE_NAME] = value
        else:
            manifest[field] = value
        manifest.pop(SEAL)
        path.write_text(json.dumps({**manifest, SEAL: seal(manifest)}))
        step, told = used(folder)
        same = manifest["files"] == before["files"]
        assert step in ((1, 2) if same else (1,))
        assert step == 2 or "step_00000002" in told[0]
    finally:
        shutil.rmtree(folder)


def manifest_of(folder):
    """Copy the last of two complete checkpoints to a new folder."""
    for step in (1, 2):
        unfinished = checkpoint_folders.start(folder, step)
        torch.save({"step": step}, unfinished / STATE_NAME)
        checkpoint_folders.finish(unfinished, {"step": step, "epoch": 0, "metrics": {"a": 1.0}})
    return folder / "step_00000002" / MANIFEST_NAME
