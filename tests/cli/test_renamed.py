"""Runs, recipes and weights with names of earlier versions."""

import importlib
import inspect
import json

import pytest
import torch
import yaml

from datamodules.audio import SoundTable
from diffmm.checkpoint_folders import SEAL, find_state, measure, seal
from diffmm.models.weights import load_model
from diffmm.renamed import ARGUMENTS, CLASSES, FIELDS, STATES, WEIGHTS, with_new_names

CONFIG = "model.model.config."
WITH_TOKENS = {f"{CONFIG}cls_token": True, f"{CONFIG}num_reg_tokens": 2, f"{CONFIG}pool": "cls"}


def in_old_names(values):
    """Convert current values to the names of version 0.1."""
    if isinstance(values, list):
        return [in_old_names(value) for value in values]
    if not isinstance(values, dict):
        return values
    old_fields = {new: old for old, new in FIELDS.items()}
    old = {old_fields.get(key, key): in_old_names(value) for key, value in values.items()}
    if old.get("class_path") == "datamodules.image.Digits":
        old["class_path"] = "datamodules.image_sources.Digits"
    return old


def age(run):
    """Convert a run's config and newest checkpoint to the names of version 0.1."""
    config = run / "config.yaml"
    config.write_text(yaml.safe_dump(in_old_names(yaml.safe_load(config.read_text()))))
    state = find_state(run)
    checkpoint = torch.load(state, weights_only=True)
    old_weights = {new: old for old, new in WEIGHTS.items()}
    checkpoint["state_dict"] = {
        ".".join([*name.split(".")[:-1], old_weights.get(last, last)]): weight
        for name, weight in checkpoint["state_dict"].items()
        for last in [name.split(".")[-1]]
    }
    old_states = {new: old for old, new in STATES.items()}
    checkpoint["callbacks"] = {
        old_states.get(name, name): state for name, state in checkpoint["callbacks"].items()
    }
    checkpoint["model"] = in_old_names(checkpoint["model"])
    torch.save(checkpoint, state)
    path = state.parent / "manifest.json"
    manifest = json.loads(path.read_text())
    size, digest = measure(state)
    manifest["files"][state.name] = {"size": size, "sha256": digest}
    del manifest[SEAL]
    path.write_text(json.dumps({**manifest, SEAL: seal(manifest)}))
    return state


def test_an_old_run_goes_on_and_its_weights_load(run, recipe, tmp_path):
    path = recipe(**WITH_TOKENS, **{"trainer.max_steps": 4})
    straight = tmp_path / "straight"
    assert run("fit", "--config", path, "--run_dir", straight).code == 0
    old = tmp_path / "old"
    shorter = ("--trainer.max_steps", "2")
    assert run("fit", "--config", path, "--run_dir", old, *shorter).code == 0
    state = age(old)
    saved = torch.load(state, weights_only=True)
    assert {"model.class_token", "model.registers"} <= set(saved["state_dict"])
    assert "BadNumbers" in saved["callbacks"]
    with pytest.warns(FutureWarning, match="class_token is now cls_token; num_registers"):
        load_model(old)
    message = "config.yaml has old names: datamodules.*Digits is now datamodules.image.Digits"
    with pytest.warns(FutureWarning, match=message):
        assert run("fit", "--resume", old, "--trainer.max_steps", "4").code == 0
    ends = [torch.load(find_state(folder), weights_only=True) for folder in (straight, old)]
    for name, weight in ends[0]["state_dict"].items():
        torch.testing.assert_close(ends[1]["state_dict"][name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(("old", "new"), CLASSES.items())
def test_every_new_name_is_there(old, new):
    module, _, name = new.rpartition(".")
    if name[0].isupper():
        assert hasattr(importlib.import_module(module), name)
    else:
        importlib.import_module(new)
    with pytest.warns(FutureWarning, match=f"here.yaml has old names: {old} is now {new}"):
        values = with_new_names({"a": [{"class_path": old}]}, "here.yaml")
    assert values["a"][0]["class_path"] == new


@pytest.mark.parametrize(("cls", "arguments"), ARGUMENTS.items())
def test_every_new_argument_is_there(cls, arguments):
    module, _, name = cls.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    for old, new in arguments.items():
        assert new in parameters
        assert old not in parameters
        node = {"class_path": cls, "init_args": {old: 1, "kept": 2}}
        with pytest.warns(FutureWarning, match=f"{old} of {cls} is now {new}"):
            values = with_new_names({"a": node}, "here.yaml")
        assert values["a"]["init_args"] == {new: 1, "kept": 2}
    # The same name has another meaning elsewhere.
    other = {"class_path": "a.B", "init_args": dict.fromkeys(arguments, 1)}
    assert with_new_names({"a": other}, "here.yaml") == {"a": other}


def test_a_renamed_class_does_what_it_did(tmp_path):
    """Under its old name, the table has other default columns, and several labels per clip."""
    (tmp_path / "a.csv").write_text("path,tags\na.wav,x;y\n")
    (tmp_path / "b.csv").write_text("path,tags\nb.wav,x\n")
    old = {
        "train": str(tmp_path / "a.csv"),
        "val": str(tmp_path / "b.csv"),
        "labels_column": "tags",
    }
    with pytest.warns(FutureWarning, match="Manifest is now datamodules.audio.SoundTable"):
        node = with_new_names(
            {"class_path": "datamodules.audio_sources.Manifest", "init_args": old}, "here.yaml"
        )
    assert node["class_path"] == "datamodules.audio.SoundTable"
    splits = SoundTable(**node["init_args"]).splits()
    assert splits.train.labels == [(0, 1)]
    assert splits.multi_label


def test_names_that_only_begin_alike_stay():
    values = {"class_path": "datamodules.text_sourcesX.A", "class_tokens": 1, "text": "class_token"}
    assert with_new_names(values, "here.yaml") == values
