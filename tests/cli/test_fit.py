"""`diffmm fit` and `diffmm finetune`: runs, and the files that they keep."""

import csv
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

from diffmm.checkpoint_folders import find_state
from diffmm.cli.fit import command_for_processes
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.settings import load
from diffmm.recipes.trainer import RecipeCLI
from diffmm.runs.directories import new_run
from diffmm.training import Classification, OptimizerConfig


def built(name, *overrides):
    return RecipeCLI({**load([find_recipe(name)], overrides), "run_dir": "runs"})


@pytest.mark.parametrize("attention", ["softmax", "diff_v2"])
def test_overrides_reach_all_that_refers_to_them(attention):
    cli = built(
        "image/digits_mae_tiny",
        f"--vars.attention={attention}",
        *("--vars.learning_rate", "1e-5", "--vars.steps", "177", "--vars.seed", "5"),
    )
    config = cli.model.model.config
    assert config.encoder.backbone.attention == attention
    assert config.decoder.attention == attention
    assert cli.model.optimizer_config.learning_rate == 1e-5
    assert cli.model.schedule_config.total_steps == cli.trainer.max_steps == 177
    assert cli.model.seed == cli.datamodule.seed == 5
    assert os.environ["PL_GLOBAL_SEED"] == "5"


@pytest.mark.parametrize("given", [1, 1.0, 0.5])
def test_one_batch_is_not_taken_for_all_of_them(given):
    limit = ("--trainer.limit_val_batches", "${vars.validated}", "--vars.validated", str(given))
    cli = built("image/digits_tiny", *limit)
    assert type(cli.trainer.limit_val_batches) is type(given)
    assert cli.trainer.limit_val_batches == given


def test_an_override_of_a_reference_leaves_the_others():
    cli = built("image/digits_tiny", "--model.schedule.total_steps", "500")
    assert cli.model.schedule_config.total_steps == 500
    assert cli.trainer.max_steps != 500


def test_a_run_keeps_its_config_checkpoints_and_logs(run, recipe):
    result = run("fit", "--config", recipe(), "--name", "first", "--vars.attention", "diff_v2")
    assert result.code == 0
    directory = Path("runs/recipe/first")
    assert f"run: {directory}" in result.out
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["vars"]["attention"] == "diff_v2"
    backbone = config["model"]["init_args"]["model"]["init_args"]["config"]["backbone"]
    assert backbone["attention"] == "${vars.attention}"
    assert sorted(os.listdir(directory / "checkpoints")) == [
        "LATEST",
        "LOGS",
        "step_00000002",
    ]
    assert list((directory / "tensorboard").glob("events*"))
    with (directory / "csv" / "version_0" / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "lambda/layer_00"):
        assert any(row[name] for row in logged), name
    assert sorted(os.listdir(directory)) == ["checkpoints", "config.yaml", "csv", "tensorboard"]


def test_a_shipped_recipe_keeps_its_header_and_its_name(run):
    quick = ("--trainer.fast_dev_run", "true")
    assert run("fit", "--config", "image/digits_tiny", "--name", "first", *quick).code == 0
    text = Path("runs/image/digits_tiny/first/config.yaml").read_text()
    header = find_recipe("image/digits_tiny").read_text().split("\n\n")[0]
    assert text.startswith(header)


def test_a_saved_config_is_a_recipe_of_the_same_run(run, recipe):
    run("fit", "--config", recipe(), "--name", "first")
    saved = "runs/recipe/first/config.yaml"
    assert run("fit", "--config", saved, "--name", "again").code == 0
    assert Path("runs/recipe/again/config.yaml").read_text() == Path(saved).read_text()
    weights = [
        torch.load(find_state(Path("runs/recipe", name)), weights_only=True)["state_dict"]
        for name in ("first", "again")
    ]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_no_secret_of_the_environment_is_written(run, recipe, monkeypatch):
    secret = "987654321"
    monkeypatch.setenv("DIFFMM_TEST_SECRET", secret)
    path = recipe(**{"data.seed": "${oc.env:DIFFMM_TEST_SECRET}"})
    assert run("fit", "--config", path, "--name", "first").code == 0
    files = [file for file in Path("runs").rglob("*") if file.is_file()]
    assert len(files) > 3
    for file in files:
        assert secret.encode() not in file.read_bytes(), file


def test_runs_are_told_apart_by_time_or_name(run, tmp_path):
    monday = new_run("text/stdlib_tiny", None, None)
    assert monday.parent == Path("runs/text/stdlib_tiny")
    monday.mkdir(parents=True)
    # Both may start in the same second.
    assert new_run("text/stdlib_tiny", None, None) != monday
    assert new_run("folder/mine.yaml", "a", None) == Path("runs/mine/a")
    assert new_run("runs/image/mine/2026/config.yaml", "a", None) == Path("runs/mine/a")
    assert new_run("text/stdlib_tiny", "a", str(tmp_path / "b")) == tmp_path / "b"


def test_a_run_is_never_started_twice(run, recipe):
    assert run("fit", "--config", recipe(), "--name", "first").code == 0
    before = sorted(Path("runs").rglob("*"))
    result = run("fit", "--config", recipe(), "--name", "first")
    assert result.code == 2
    assert result.mistakes == [
        "runs/recipe/first already holds a run: choose another name, or resume it "
        "(--resume runs/recipe/first)"
    ]
    assert sorted(Path("runs").rglob("*")) == before


def test_finetune_starts_a_new_run_from_weights(run, recipe):
    path = recipe(**{"vars.learning_rate": 1e-2})
    run("fit", "--config", path, "--name", "first")
    checkpoint = find_state(Path("runs/recipe/first").resolve())
    still = ("--vars.learning_rate", "1e-12", "--vars.seed", "3")
    command = ("finetune", "--config", path, "--weights", checkpoint, "--name", "second", *still)
    assert run(*command).code == 0
    first = torch.load(checkpoint, weights_only=True)["state_dict"]
    second = torch.load(find_state(Path("runs/recipe/second")), weights_only=True)
    for name, tensor in second["state_dict"].items():
        is_new = name.startswith("model.head.")
        assert torch.allclose(tensor, first[name], atol=1e-6) != is_new, name
    config = yaml.safe_load(Path("runs/recipe/second/config.yaml").read_text())
    assert config["model"]["init_args"]["finetune"]["weights"] == str(checkpoint)


def test_a_failure_in_training_is_a_failure_and_keeps_the_run(run, recipe, monkeypatch):
    loss_sum = Classification.loss_sum

    def fails(task, batch, batch_idx):
        if task.global_step > 0:
            raise ValueError("a bug")
        return loss_sum(task, batch, batch_idx)

    monkeypatch.setattr(Classification, "loss_sum", fails)
    with pytest.raises(ValueError, match="a bug"):
        run("fit", "--config", recipe(), "--name", "first")
    assert Path("runs/recipe/first/config.yaml").is_file()


def test_what_a_recipe_leaves_out_is_left_to_the_classes(tmp_path):
    """The parser adds no defaults, which takes long, and nothing warns about a missing key."""
    values = load([find_recipe("image/digits_tiny")])
    del values["trainer"]["callbacks"], values["seed_everything"]
    values["run_dir"] = str(tmp_path)
    cli = RecipeCLI(values)
    optimizer = values["model"]["init_args"]["optimizer"]
    assert vars(cli.config.trainer).keys() == values["trainer"].keys()
    assert vars(cli.config.model.init_args.optimizer).keys() == optimizer.keys()
    assert cli.model.optimizer_config == OptimizerConfig(2e-3, weight_decay=0.05)
    assert cli.trainer.callbacks


def test_further_processes_share_the_run_directory(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["diffmm", "fit", "--config", "x"])
    with command_for_processes(tmp_path, is_new=True):
        assert sys.argv == ["diffmm", "fit", "--config", "x", "--run_dir", str(tmp_path)]
    assert sys.argv == ["diffmm", "fit", "--config", "x"]


def test_weights_that_are_not_finite_end_the_run_with_one_line(run, recipe, monkeypatch):
    def overflows(task, outputs, batch, batch_idx):
        task.model.head.weight.data[0, 0] = float("inf")

    monkeypatch.setattr(Classification, "on_train_batch_end", overflows)
    result = run("fit", "--config", recipe(**{"trainer.max_steps": 6}))
    assert result.code == 1
    (line,) = result.mistakes
    assert "weights (the first is model.head.weight) are not finite after step 1" in line
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("image/digits_mae_tiny", "image/digits_tiny"),
        ("audio/sound_events_mae_tiny", "audio/sound_events_tiny"),
    ],
)
def test_a_masked_autoencoder_starts_the_classifier_of_its_name(run, recipe, first, then):
    changes = {"data.batch_size": 4}
    if first.startswith("audio"):
        changes |= {"data.source.num_clips": 8, "data.source.num_val_clips": 4}
    assert run("fit", "--config", recipe(first, **changes), "--name", "first").code == 0
    changes["vars.learning_rate"] = 1e-12
    path = recipe(then, **changes)
    command = ("finetune", "--config", path, "--weights", "runs/recipe/first", "--name", "then")
    result = run(*command)
    assert result.code == 0, result.err
    weights, started = (
        torch.load(find_state(Path("runs/recipe", name)), weights_only=True)["state_dict"]
        for name in ("first", "then")
    )
    names = [name for name in started if not name.startswith("model.head.")]
    assert len(names) > 40
    for name in names:
        before = weights[name.replace("model.", "model.encoder.", 1)]
        torch.testing.assert_close(started[name], before, atol=1e-6, rtol=0)
