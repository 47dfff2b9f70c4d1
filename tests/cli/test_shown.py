"""Output of commands: the complete recipe, a recipe's own settings, progress in a pipe."""

import re
from pathlib import Path

import pytest
import yaml

from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.explanation import explain
from diffmm.recipes.settings import load
from diffmm.training import progress
from diffmm.training.progress import ProgressLines, duration


def test_print_config_is_what_the_run_would_save(run, recipe):
    command = ("fit", "--config", recipe(), "--vars.attention", "softmax", "--name", "a")
    printed = run(*command, "--print_config")
    assert printed.code == 0
    assert not Path("runs").exists()
    assert run(*command).code == 0
    assert Path("runs/recipe/a/config.yaml").read_text() == printed.out
    assert "${vars.attention}" in printed.out
    shipped = run("fit", "--config", "image/digits_tiny", "--print_config", "written").out
    assert shipped.startswith("# A small vision transformer")
    assert yaml.safe_load(shipped) == load([find_recipe("image/digits_tiny")])


def test_print_config_resolved_is_the_same_recipe_without_variables(run, recipe):
    printed = run("fit", "--config", recipe(), "--vars.steps", "177", "--print_config=resolved")
    values = yaml.safe_load(printed.out)
    assert values["model"]["init_args"]["schedule"]["total_steps"] == 177
    assert "vars" not in values
    assert set(re.findall(r"\$\{[^}]*\}", printed.out)) == {"${run_dir}"}
    Path("resolved.yaml").write_text(printed.out)
    assert run("check", "resolved.yaml").code == 0
    broken = run(
        "fit", "--config", "resolved.yaml", "--seed_everything", "${nowhere}", "--print_config"
    )
    assert broken.code == 0  # as it is written
    broken = run(
        *("fit", "--config", "resolved.yaml", "--seed_everything", "${nowhere}"),
        *("--print_config", "resolved"),
    )
    assert broken.mistakes == ["seed_everything refers to nowhere, which does not exist"]


def test_print_config_of_own_data_is_yaml_on_stdout(run, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("A text. " * 50)
    result = run("fit", "--config", "text/finetune", "--data", tmp_path, "--print_config")
    source = yaml.safe_load(result.out)["data"]["init_args"]["source"]
    assert source["init_args"]["root"] == str(tmp_path)
    assert "has 3 texts" in result.err


@pytest.mark.parametrize("verb", ["fit", "finetune"])
def test_help_after_a_recipe_shows_its_settings_and_values(run, verb):
    result = run(verb, "--config", "image/digits_tiny", "--vars.attention", "diff_v1", "--help")
    assert result.code == 0
    lines = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in result.out.splitlines()]
    comment = "softmax, diff_v1 or diff_v2: the only setting to change for a comparison"
    assert ["--vars.attention diff_v1", comment] in lines
    for key in (
        "--model.model.config.backbone.attention diff_v1",
        "--model.schedule.total_steps 450",
    ):
        assert any(line[0] == key and line[1].startswith("${vars.") for line in lines), key
    assert ["--data.batch_size 64"] in lines
    assert not any("limit_predict_batches" in line[0] for line in lines)
    assert result.out.index("--data.batch_size 64") < result.out.index(f"usage: diffmm {verb}")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "name", ["text/wikitext103", "image/finetune", "audio/speech_commands", "image/cifar10"]
)
def test_what_help_shows_are_overrides_that_change_nothing(name):
    """All printed settings of a recipe, passed as overrides, give the same recipe."""
    values = load([find_recipe(name)])
    shown = [line.split("  ")[1] for line in explain([find_recipe(name)], values).splitlines()]
    overrides = []
    for setting in shown:
        key, _, value = setting.partition(" ")
        if not key.endswith("class_path") and "${" not in value:
            overrides.append(f"{key}={value}")
    assert len(overrides) > 30
    from diffmm.recipes.references import resolve

    same = load([find_recipe(name)], overrides)
    run_dir = {"run_dir": "a"}
    assert resolve({**same, **run_dir}) == resolve({**values, **run_dir})


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"trainer.enable_model_summary": True}, "Trainable params"),
        (
            {
                "trainer.callbacks": [
                    {"class_path": "lightning.pytorch.callbacks.ModelSummary"},
                    {"class_path": "lightning.pytorch.callbacks.RichProgressBar"},
                ]
            },
            "Trainable params",
        ),
        ({"model.finetune": {"freeze": "all_but_head"}}, " parameters, of which "),
    ],
)
def test_a_recipe_may_ask_for_lightning_s_summary(run, recipe, settings, shown, caplog):
    result = run("fit", "--config", recipe(**{"trainer.max_steps": 1, **settings}))
    assert shown in result.out + result.err + caplog.text


def test_no_secret_is_shown(run, recipe, monkeypatch):
    monkeypatch.setenv("DIFFMM_TEST_SECRET", "987654321")
    path = recipe(**{"data.seed": "${oc.env:DIFFMM_TEST_SECRET}"})
    for option in ("--help", "--print_config"):
        result = run("fit", "--config", path, option)
        assert "${oc.env:DIFFMM_TEST_SECRET}" in result.out
        assert "987654321" not in result.out


def test_progress_in_a_pipe_is_lines_and_each_validation_one(run, recipe, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    path = recipe(**{"trainer.max_steps": 4, "trainer.num_sanity_val_steps": 1})
    result = run("fit", "--config", path)
    assert result.code == 0
    assert "TPU" not in result.out + result.err
    assert "max_steps 4 ends the run before its schedule of" in result.err
    (about,) = (line for line in result.out.splitlines() if line.startswith("model: "))
    assert re.fullmatch(r"model: ImageModel, [\d,]+ parameters", about)
    lines = [line for line in result.out.splitlines() if line.startswith("step ")]
    number = r"[\d.e-]+"
    validation = rf"val/loss {number}  val/accuracy {number}  val/accuracy_top5 {number}"
    training = rf"train/loss {number}"
    rate = rf"  {number} steps/s  0:00:\d\d left"
    wait = r"(  \d+% waiting for data)?"
    expected = [
        rf"step 2/4  {training}{wait}",
        rf"step 2/4  {validation}",
        rf"step 3/4  {training}{rate}{wait}",
        rf"step 4/4  {training}{rate}{wait}",
        rf"step 4/4  {validation}",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert "━" not in result.out


def test_a_terminal_keeps_its_bar_and_gets_the_validations(run, recipe, monkeypatch):
    from diffmm.cli import fit

    monkeypatch.setattr(fit.sys.stdout, "isatty", lambda: True)
    result = run("fit", "--config", recipe())
    assert result.out.count("step ") == 1
    assert "step 2/2  val/loss" in result.out
    assert "train/loss:" in result.out  # written by the progress bar


def test_who_wants_no_bar_gets_no_lines(run, recipe):
    path = recipe(**{"trainer.callbacks": [], "trainer.enable_progress_bar": False})
    result = run("fit", "--config", path)
    assert result.code == 0
    assert "step " not in result.out


def test_lines_come_at_intervals(monkeypatch, capsys):
    class Trainer:
        is_global_zero, max_steps, global_step = True, -1, 0
        progress_bar_metrics: dict = {}  # noqa: RUF012
        progress_bar_callback = None

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    trainer, lines = Trainer(), ProgressLines(10.0)
    lines.on_train_start(trainer, None)
    lines.on_train_batch_end(trainer, None, None, None, 0)  # no completed step yet
    trainer.progress_bar_metrics = {"train/loss": 1.0, "train/data_wait": 0.25}
    for step in range(1, 26):
        now[0], trainer.global_step = float(step), step
        lines.on_train_batch_end(trainer, None, None, None, step)
    assert capsys.readouterr().out.splitlines() == [
        "step 1  train/loss 1  25% waiting for data",
        "step 11  train/loss 1  1 steps/s  25% waiting for data",
        "step 21  train/loss 1  1 steps/s  25% waiting for data",
    ]
    assert duration(3723.4) == "1:02:03"
