"""Untrusted recipes and runs: classes that they name are neither called nor imported."""

from pathlib import Path

import pytest
import yaml

from diffmm.recipes.mistakes import find_mistakes
from diffmm.recipes.settings import load, override
from diffmm.recipes.trainer import RecipeCLI

LEFT_BEHIND = "was_here"
MODULE = f"""
from pathlib import Path
import torch
from lightning.pytorch import Callback

Path({LEFT_BEHIND!r}).touch()


def call(*arguments, **keywords):
    Path({LEFT_BEHIND!r}).touch()


class Quiet(Callback):
    pass
"""

FUNCTION = {"class_path": "strange_code.call", "init_args": {}}
PLACES = {
    "model": FUNCTION,
    "data": FUNCTION,
    "data.source": FUNCTION,
    "model.model": "strange_code.call",
    "trainer.callbacks": [FUNCTION],
    "trainer.logger": "strange_code.call",
    "trainer.strategy": FUNCTION,
    "model.augment": {
        "class_path": "torchaudio.transforms.Spectrogram",
        "init_args": {"window_fn": "strange_code.call"},
    },
    "trainer.plugins": "${vars.code}",
}
"""Places in a recipe that can name code."""


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """A module on the import path that records its import."""
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "strange_code.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    return tmp_path / "work" / LEFT_BEHIND


REFUSAL = "'strange_code.call' is outside diffmm, datamodules, torch, timm and lightning"


def changes(place):
    return {"vars.code": "strange_code.call", place: PLACES[place]}


@pytest.mark.parametrize("place", PLACES)
def test_check_calls_and_imports_nothing_strange(place, run, recipe, strange):
    result = run("check", recipe(**changes(place)))
    assert result.code == 2
    name = place.rpartition(".")[2]
    assert any(REFUSAL in line and name in line for line in result.mistakes), result.err
    assert "--trust" in result.err
    assert not strange.exists()


@pytest.fixture
def strange_run(run, recipe, tmp_path):
    """`strange_run(place)` returns a run with a checkpoint, whose config was modified by another
    author."""

    def make(place):
        result = run("fit", "--config", recipe(), "--run_dir", "runs/mine")
        assert result.code == 0, result.err
        config = tmp_path / "work/runs/mine/config.yaml"
        values = load([config])
        for key, value in changes(place).items():
            override(values, key, value)
        config.write_text(yaml.safe_dump(values))
        return "runs/mine"

    return make


def test_no_verb_runs_the_code_of_a_strange_run(run, strange_run, strange):
    folder = strange_run("trainer.callbacks")
    config = ("--config", f"{folder}/config.yaml", "--weights", folder)
    for command in (
        ("fit", "--resume", folder),
        ("validate", *config),
        ("test", *config),
        ("predict", *config),
        ("check", f"{folder}/config.yaml"),
    ):
        result = run(*command)
        assert result.code == 2, command
        assert REFUSAL in result.err, command
        assert not strange.exists(), command
    with pytest.raises(Exception, match="is outside diffmm"):
        RecipeCLI({**load([Path(folder, "config.yaml")]), "run_dir": folder}, trust=False)
    assert not strange.exists()


def test_own_code_runs_when_it_is_trusted(run, recipe, strange):
    own = {"trainer.callbacks": [{"class_path": "strange_code.Quiet"}]}
    path = recipe(**own)
    assert run("check", path).code == 2
    assert run("check", path, "--trust").code == 0
    # A recipe given to `fit` is trusted.
    assert run("fit", "--config", path, "--run_dir", "runs/mine").code == 0
    assert strange.exists()
    assert run("fit", "--resume", "runs/mine", "--trainer.max_steps", "3").code == 2
    result = run("fit", "--resume", "runs/mine", "--trainer.max_steps", "3", "--trust")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "os.system", "model.class_path must name a LightningModule, got 'os.system'"),
        ("data", "os.system", "data.class_path must name a LightningDataModule"),
        ("model.model", "torch.hub.load", "class_path must name a Module, got 'torch.hub.load'"),
        ("data.source", "datamodules.text.StandardLibrary", "must name an ImageSource"),
    ],
)
def test_what_is_no_class_of_the_expected_base_is_not_called(key, value, message, recipe):
    values = {**load([recipe()]), "run_dir": "runs"}
    override(values, key, {"class_path": value})
    (found,) = [line for line in find_mistakes(values).mistakes if "class_path" in line]
    assert message in found


def test_paths_and_names_are_not_taken_for_code(recipe, tmp_path):
    values = {**load([recipe()]), "run_dir": str(tmp_path / "code.run")}
    override(values, "trainer.default_root_dir", "os.path")
    override(values, "model.finetune.weights", "os.path")
    assert not any("outside" in line for line in find_mistakes(values, trust=False).mistakes)
