"""`imports`: modules of the user's own that a recipe imports."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from forked import run_diffmm
from PIL import Image

import diffmm

ROOT = Path(__file__).parents[2]
QUICK = (
    *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.num_sanity_val_steps", "0", "--trainer.enable_model_summary", "false"),
    *("--trainer.log_every_n_steps", "1"),
)
TRUST = (
    "imports: 'own_attention' is outside diffmm, datamodules, torch, timm and lightning: add "
    "--trust if you trust the author of this recipe"
)


def test_the_commands_of_the_guide_run_in_processes_of_their_own(tmp_path, tmp_path_factory):
    """The working directory is not on the import path, as with the `diffmm` script."""
    shutil.copy(ROOT / "docs/examples/own_attention.py", tmp_path)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "seven.png")
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    lines = block.strip().splitlines()
    assert len(lines) == 4
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "diffmm"
        if arguments[0] == "fit" and "--resume" not in arguments:
            arguments += QUICK
        arguments = ["3" if argument == "500" else argument for argument in arguments]
        (ended,) = run_diffmm(arguments, tmp_path, tmp_path_factory.mktemp("logs"))
        assert ended.code == 0, ended.err
    assert ended.out.startswith("seven.png: ")


@pytest.fixture
def imported(run, monkeypatch):
    """The run of a recipe that imports `own_attention`, which this process forgets again."""
    from diffmm.layers.attention import ATTENTIONS

    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copy(ROOT / "docs/examples/own_attention.py", ".")
    Path("text.txt").write_text("Once upon a time. " * 200)
    command = ("fit", "--config", "image/digits_tiny", "--vars.attention", "uniform_noise")
    result = run(*command, "--imports", "own_attention", "--name", "a", *QUICK)
    assert result.code == 0, result.err
    forget(ATTENTIONS)
    yield Path("runs/image/digits_tiny/a")
    forget(ATTENTIONS)


def forget(registry):
    registry.pop("uniform_noise", None)
    sys.modules.pop("own_attention", None)


def test_a_run_imports_nothing_without_trust(run, imported):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("seven.png")
    assert yaml.safe_load((imported / "config.yaml").read_text())["imports"] == "own_attention"
    for command in (("fit", "--resume", imported), ("validate", imported)):
        result = run(*command)
        assert result.code == 2
        assert TRUST in result.mistakes
    assert TRUST in run("check", imported / "config.yaml").mistakes
    hint = "The run's recipe imports own_attention: do so before (on the command line: --trust)"
    (mistake,) = run("predict", imported, "seven.png").mistakes
    assert mistake.endswith(hint)
    with pytest.raises(ValueError, match="got 'uniform_noise'.*imports own_attention: do so"):
        diffmm.load(imported)
    assert "own_attention" not in sys.modules
    assert run("compare", imported).code == 0
    assert "own_attention" not in sys.modules
    assert run("check", imported / "config.yaml", "--trust").code == 0
    assert diffmm.load(imported).model.config.backbone.attention == "uniform_noise"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no_such_module", "imports: there is no module 'no_such_module', neither installed nor"),
        ("own_attention.py", "imports must be a list of names of modules, without .py, got"),
        ("../x", "imports must be a list of names of modules, without .py, got '../x'"),
        ("3", "imports must be a list of names of modules, without .py, got 3"),
        ("broken", "imports: broken cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.parametrize("verb", ["fit --config", "check --trust"])
def test_what_cannot_be_imported(run, given, message, verb, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("broken.py").write_text("1 / 0")
    result = run(*verb.split(), "image/digits_tiny", "--imports", given)
    assert result.code == 2
    assert any(mistake.startswith(message) for mistake in result.mistakes), result.mistakes
