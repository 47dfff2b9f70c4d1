"""`diffmm fit --resume`: interrupted runs continue as if they had not been interrupted."""

import csv
import os
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffmm.checkpoint_folders import MANIFEST_NAME, checkpoints, find_state, finish, start
from diffmm.cli import main
from diffmm.training.task import Task

EVERY_STEP = {
    "trainer.callbacks.0.monitor": None,
    "trainer.callbacks.0.every_n_steps": 1,
    "trainer.callbacks.0.keep_last": 9,
    "trainer.max_steps": 4,
}
"""Four steps, and a checkpoint after each."""

LONGER = {**EVERY_STEP, "trainer.max_steps": 6, "trainer.val_check_interval": 3}


@pytest.fixture
def samples(monkeypatch):
    """The samples of every training batch."""
    seen = []
    original = Task.training_step

    def training_step(task, batch, batch_idx):
        seen.append(batch["index"].tolist())
        return original(task, batch, batch_idx)

    monkeypatch.setattr(Task, "training_step", training_step)
    return seen


@pytest.fixture(scope="module")
def killed(recipe_in, tmp_path_factory):
    """A folder with a recipe, and one of its runs of four steps that was killed after two."""
    folder = tmp_path_factory.mktemp("killed")
    path = recipe_in(folder, **EVERY_STEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", str(path), "--name", "first"]) == 0
    cut_back(folder / "runs/recipe/first", 2)
    return folder


@pytest.fixture
def interrupted(run, killed, tmp_path):
    """Copies of the recipe and, in the working directory, of the run."""
    shutil.copytree(killed / "runs", "runs")
    return Path(shutil.copy(killed / "recipe.yaml", tmp_path)), Path("runs/recipe/first")


def cut_back(directory, step):
    """Change a run as if it had been killed soon after this step."""
    for found in checkpoints(directory / "checkpoints"):
        if found.step > step:
            shutil.rmtree(found.path)


def steps_of(directory):
    return torch.load(find_state(directory), weights_only=True)["global_step"]


def weights_of(directory):
    return torch.load(find_state(directory), weights_only=True)["state_dict"]


def same(weights, others):
    return all(torch.equal(weights[name], others[name]) for name in weights)


VARIANTS = {
    "text, accumulated": ("text/stdlib_tiny", {"trainer.accumulate_grad_batches": 2}),
    "images, workers": ("image/digits_tiny", {"data.num_workers": 2, "data.batch_size": 500}),
    "sound": ("audio/sound_events_tiny", {"data.source.num_clips": 64}),
    "masked images": (
        "image/digits_mae_tiny",
        {"data.batch_size": 50, "trainer.limit_train_batches": 2},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_ends_with_the_same_bits(run, recipe, text_changes, samples, variant):
    name, changes = VARIANTS[variant]
    changes = {**changes, **(text_changes if name.startswith("text") else {})}
    path = recipe(name, **LONGER, **changes)
    assert run("fit", "--config", path, "--name", "whole").code == 0
    whole, directory = list(samples), Path("runs/recipe/first")
    shutil.copytree("runs/recipe/whole", directory)
    cut_back(directory, 3 if "images" in variant else 2)
    samples.clear()
    assert run("fit", "--resume", directory).code == 0
    assert samples == whole[-len(samples) :]
    assert 0 < len(samples) < len(whole)
    assert same(weights_of(Path("runs/recipe/whole")), weights_of(directory))


def test_resume_goes_on_with_the_same_run(run, interrupted):
    _, directory = interrupted
    config = (directory / "config.yaml").read_text()
    result = run("fit", "--resume", directory)
    assert result.code == 0, result.err
    assert os.listdir("runs/recipe") == ["first"]
    assert steps_of(directory) == 4
    assert (directory / "config.yaml").read_text() == config


@pytest.mark.parametrize("kept", [2, 0])
def test_every_step_is_logged_once(run, interrupted, kept):
    """Steps that the killed run had logged and that are repeated are logged once."""
    _, directory = interrupted
    cut_back(directory, kept)
    assert run("fit", "--resume", directory).code == 0
    cut_back(directory, kept)
    assert run("fit", "--resume", directory).code == 0
    steps = []
    for file in sorted((directory / "csv").rglob("metrics.csv")):
        with file.open() as opened:
            steps += [int(row["step"]) for row in csv.DictReader(opened) if row["train/loss"]]
    assert steps == [0, 1, 2, 3]
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]


def test_a_finished_run_stays_as_it_is(run, recipe):
    path = recipe(**EVERY_STEP)
    assert run("fit", "--config", path, "--name", "first").code == 0
    weights = weights_of(Path("runs/recipe/first"))
    assert run("fit", "--resume", "runs/recipe/first").code == 0
    assert same(weights, weights_of(Path("runs/recipe/first")))


def test_auto_goes_on_with_a_run_of_just_these_settings_or_starts_one(run, interrupted):
    path, directory = interrupted
    command = ("fit", "--config", path, "--resume", "auto")
    assert run(*command).code == 0
    assert steps_of(directory) == 4
    assert os.listdir("runs/recipe") == ["first"]
    assert run(*command, "--vars.learning_rate", "0.5", "--name", "other").code == 0
    assert sorted(os.listdir("runs/recipe")) == ["first", "other"]


def test_auto_with_a_name_is_about_that_run(run, interrupted):
    path, directory = interrupted
    command = ("fit", "--config", path, "--resume", "auto", "--name")
    assert run(*command, "second").code == 0
    assert steps_of(Path("runs/recipe/second")) == 4
    assert steps_of(directory) == 2
    result = run(*command, "first", "--vars.learning_rate", "0.5")
    assert result.mistakes == [
        "runs/recipe/first holds a run with other settings: choose another name, or resume it "
        "as it is (--resume runs/recipe/first)"
    ]
    assert run(*command[:5], "--run_dir", directory).code == 0
    assert steps_of(directory) == 4


@pytest.mark.parametrize("how", ["run", "auto"])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(run, interrupted, how):
    path, directory = interrupted
    shutil.rmtree(directory / "checkpoints")
    command = ("--resume", directory) if how == "run" else ("--config", path, "--resume", "auto")
    result = run("fit", *command)
    assert result.code == 0, result.err
    assert f"warning: {directory} has no checkpoint yet: it starts from the beginning" in result.err
    assert os.listdir("runs/recipe") == ["first"]
    assert steps_of(directory) == 4


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(run, interrupted):
    _, directory = interrupted
    state = find_state(directory)
    os.truncate(state, state.stat().st_size // 2)
    result = run("fit", "--resume", directory)
    assert result.code == 0, result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("diffmm: warning:")]
    assert "using step_00000001 instead of step_00000002 (state.ckpt has " in line
    assert steps_of(directory) == 4


def test_no_whole_checkpoint_is_bad_input(run, interrupted):
    _, directory = interrupted
    for found in checkpoints(directory / "checkpoints"):
        (found.path / MANIFEST_NAME).unlink()
    before = sorted(Path("runs").rglob("*"))
    for command in (("fit", "--resume", directory), ("generate", directory, "a")):
        result = run(*command)
        assert result.code == 2
        assert result.mistakes == [
            f"no checkpoint in {directory}/checkpoints is complete: step_00000002 (it has no "
            f"manifest.json), step_00000001 (it has no manifest.json)"
        ]
    assert sorted(Path("runs").rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("attention: diff_v2", "attention: softmax"), "another architecture: attention"),
        (("batch_size: 64", "batch_size: 32"), "was 64 samples and is now 32"),
        (
            ("max_steps: 4", "max_steps: 4\n  accumulate_grad_batches: 2"),
            "accumulate_grad_batches=1",
        ),
    ],
)
def test_resume_refuses_what_would_be_another_run(run, interrupted, change, message):
    _, directory = interrupted
    config = directory / "config.yaml"
    assert change[0] in config.read_text()
    config.write_text(config.read_text().replace(*change))
    before = sorted(Path("runs/recipe/first/checkpoints").rglob("*"))
    result = run("fit", "--resume", directory)
    assert result.code == 2, result.err
    assert message in result.mistakes[0]
    assert sorted(Path("runs/recipe/first/checkpoints").rglob("*")) == before


def test_resume_takes_no_recipe_or_name(run):
    result = run("fit", "--resume", "runs/x", "--name", "y")
    assert "--resume resumes a run unchanged" in result.mistakes[0]
    assert run("fit", "--resume", "runs/x").mistakes == [
        "runs/x is not a run directory: there is no runs/x/config.yaml"
    ]


def test_a_checkpoint_to_resume_is_answered_with_its_run(run, interrupted):
    _, directory = interrupted
    checkpoint = find_state(directory).parent
    assert run("fit", "--resume", checkpoint).mistakes == [
        f"{checkpoint} is not a run directory: there is no {checkpoint}/config.yaml; "
        f"it is in the run '{directory}'"
    ]


def test_a_folder_of_runs_is_answered_with_them(run, interrupted, tmp_path):
    directory = Path(interrupted[1]).resolve()
    shutil.copytree(directory, tmp_path / "all" / "text" / "one")
    (mistake,) = run("fit", "--resume", tmp_path / "all").mistakes
    assert mistake.endswith(f"; in it is '{tmp_path / 'all/text/one'}'")
    shutil.copytree(directory, tmp_path / "all" / "text" / "two")
    (mistake,) = run("fit", "--resume", tmp_path / "all").mistakes
    assert mistake.endswith(f"; in it are 2 runs, such as '{tmp_path / 'all/text/one'}'")


@pytest.mark.parametrize("given", ["", "checkpoints", "checkpoints/step_00000002", "a state"])
def test_weights_are_given_as_a_run_or_a_checkpoint(run, interrupted, given):
    path, directory = interrupted
    weights = find_state(directory) if given == "a state" else directory / given
    result = run("validate", "--config", path, "--weights", weights)
    assert result.code == 0, result.err


def test_finetune_notes_which_checkpoint_of_a_run_it_took(run, interrupted):
    path, directory = interrupted
    settings = ("--name", "second", "--trainer.fast_dev_run", "true")
    assert run("finetune", "--config", path, "--weights", directory, *settings).code == 0
    config = Path("runs/recipe/second/config.yaml").read_text()
    assert f"weights: {directory}/checkpoints/step_00000002/state.ckpt" in config


def test_a_finetuned_run_needs_the_weights_it_started_from_no_more(
    run, recipe, interrupted, monkeypatch
):
    path, first = interrupted
    weights = find_state(first)
    command = ("finetune", "--config", path, "--weights", weights, "--name", "second")
    assert run(*command).code == 0
    second = Path("runs/recipe/second")
    cut_back(second, 2)
    shutil.rmtree(first)
    # With a sharded model, pretrained weights are read before it is known that the run is resumed.
    started_from = []
    original = Task.configure_model

    def configure_model(task):
        started_from.append(task.finetune.weights)
        original(task)

    monkeypatch.setattr(Task, "configure_model", configure_model)
    assert run("fit", "--resume", second).code == 0
    assert started_from == [None]
    assert steps_of(second) == 4


def test_a_failure_right_after_a_checkpoint_names_it(run, interrupted):
    """A checkpoint with a valid manifest whose content is not what the run saved."""
    _, directory = interrupted
    state = torch.load(find_state(directory), weights_only=True)
    del state["optimizer_states"][0]["state"][0]["step"]
    unfinished = start(directory / "checkpoints", 2)
    torch.save(state, unfinished / "state.ckpt")
    finish(unfinished, {"step": 2})
    with pytest.raises(KeyError, match="step") as caught:
        run("fit", "--resume", directory)
    (note,) = caught.value.__notes__
    assert note.startswith(
        "raised when the run was resumed from runs/recipe/first/checkpoints/step_0000"
    )


def test_weights_that_are_no_tensors_are_refused(run, interrupted):
    _, directory = interrupted
    state = torch.load(find_state(directory), weights_only=True)
    name = next(name for name in state["state_dict"] if name.startswith("model."))
    state["state_dict"][name] = [1.0]
    torch.save(state, "changed.ckpt")
    result = run("validate", "--config", directory / "config.yaml", "--weights", "changed.ckpt")
    assert result.mistakes == [
        f"changed.ckpt contains a list as {name.removeprefix('model.')}, not a tensor"
    ]
