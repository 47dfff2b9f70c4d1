"""User errors: one clear line each, exit code 2, and nothing left on the disk."""

import os
from pathlib import Path

import pytest
import torch

from diffmm.models import TextModel
from diffmm.models.weights import load_model, save_model

BACKBONE = "model.model.config.backbone"


def refused(run, *arguments):
    """Run a command that must be refused and leave nothing behind, and return its error
    messages."""
    result = run(*arguments)
    assert result.code == 2, result.err
    assert result.out == "" or arguments[0] != "check"
    assert os.listdir(".") == []
    return result.mistakes


# The mistakes, and their messages, which are the same for `fit` and `check`.
IMAGE = {
    "an unknown key": (
        {"trainer.max_stesp": 3},
        "unknown key trainer.max_stesp; did you mean 'max_steps'?",
    ),
    "an unknown key on top": (
        {"trianer": {"max_steps": 3}},
        "unknown key trianer; did you mean 'trainer'?",
    ),
    "an unknown key in a config": (
        {f"{BACKBONE}.num_haeds": 3},
        "unknown key model.init_args.model.init_args.config.backbone.num_haeds; "
        "did you mean 'num_heads'?",
    ),
    "an unknown key of a source": (
        {"data.source.init_args.val_fractoin": 0.5},
        "unknown key data.init_args.source.init_args.val_fractoin; did you mean 'val_fraction'?",
    ),
    "an unknown class": (
        {"model.model.class_path": "diffmm.models.ImageModle"},
        "model.init_args.model.class_path: diffmm.models has no ImageModle; "
        "did you mean 'ImageModel'?",
    ),
    "an unknown module": (
        {"data.class_path": "datamodule.ImageData"},
        "data.class_path: there is no module 'datamodule' (for 'datamodule.ImageData')",
    ),
    "a class of another kind": (
        {"data": {"class_path": "diffmm.models.ImageModel"}},
        "data.class_path must name a LightningDataModule, got 'diffmm.models.ImageModel'",
    ),
    "a number that is none": (
        {"model.optimizer.weight_decay": float("nan")},
        "model.init_args.optimizer.weight_decay must be finite, got nan",
    ),
    "a number that is none, referred to": (
        {"vars.learning_rate": float("inf")},
        "vars.learning_rate must be finite, got inf",
    ),
    "a number that float32 has no room for": (
        {"model.optimizer.betas": [0.9, 1e-300]},
        "model.init_args.optimizer.betas.1 must be 0, or between 1e-45 and 1e+30 in size, got "
        "1e-300",
    ),
    "a count beyond all counts": (
        {"data.batch_size": 10**20},
        "data.init_args.batch_size must be at most 1,000,000,000,000,000 in size, got "
        "100000000000000000000",
    ),
    "a number of a callback that is none": (
        {"trainer.callbacks.0.every_minutes": float("inf")},
        "trainer.callbacks.0.init_args.every_minutes must be finite, got inf",
    ),
    "a clip value that would turn the gradient": (
        {"trainer.gradient_clip_val": -1.0},
        "trainer.gradient_clip_val must be at least 0, got -1.0",
    ),
    "steps of no batches": (
        {"trainer.accumulate_grad_batches": 0},
        "trainer.accumulate_grad_batches must be at least 1, got 0",
    ),
    "a run of no steps": (
        {"trainer.max_steps": 0},
        "trainer.max_steps must be at least 1, or -1, got 0",
    ),
    "more than all batches": (
        {"trainer.limit_val_batches": 1.5},
        "trainer.limit_val_batches must be a number of batches of at least 0, or a fraction of "
        "them up to 1.0, got 1.5",
    ),
    "no time": (
        {"trainer.max_time": {"minutes": -5}},
        "trainer.max_time must be longer than 0 seconds, got {'minutes': -5}",
    ),
    "a seed that is none": (
        {"seed_everything": -3},
        "seed_everything must be in [0, 4294967295], got -3",
    ),
    "Muon without matrices": (
        {"model.finetune": {"freeze": "all_but_head"}, "model.optimizer.kind": "muon"},
        "model.init_args.optimizer: kind='muon' trains the linear layers inside blocks, and "
        "ImageModel has none that is trainable: use kind='adamw'",
    ),
    "an eps that float16 loses": (
        {"trainer.precision": "16-true"},
        "model.init_args.optimizer.eps: eps=1e-08 is too small for weights in float16, where "
        "squares of gradients below 0.000244 are 0: give the optimizer an eps of at least 0.00025, "
        "or train with precision 16-mixed or bf16-true",
    ),
    "text for a number": (
        {"trainer.max_steps": "many"},
        "trainer.max_steps must be int, got 'many'",
    ),
    "a fraction for a number": (
        {f"{BACKBONE}.depth": 2.5},
        "model.init_args.model.init_args.config.backbone.depth must be int, got 2.5",
    ),
    "an unknown attention": (
        {"vars.attention": "diff_v3"},
        "model.init_args.model.init_args.config.backbone: attention must be one of 'softmax', "
        "'diff_v1', 'diff_v2', 'diff_grouped', got 'diff_v3'; did you mean 'diff_v2'?",
    ),
    "heads that cannot be paired": (
        {"vars.attention": "diff_v1", f"{BACKBONE}.num_heads": 3, f"{BACKBONE}.head_dim": 16},
        "model.init_args.model.init_args.config.backbone: diff_v1 pairs its heads, so "
        "num_heads must be even, got 3",
    ),
    "a patch that does not divide the image": (
        {"model.model.config.patch_size": 3},
        "model.init_args.model.init_args.config: image_size 8x8 is not a multiple of patch_size "
        "3x3",
    ),
    "data of another image size": (
        {"data.image_size": 16},
        "data.init_args.image_size=(16, 16), but the model's image_size is 8",
    ),
    "a number out of its range": (
        {"model.optimizer.learning_rate": -1.0, "vars.learning_rate": None},
        "model.init_args.optimizer: learning_rate must be positive and at most 1000, got -1.0",
    ),
    "a broken reference": (
        {"model.optimizer.learning_rate": "${vars.learning_rat}"},
        "model.init_args.optimizer.learning_rate refers to vars.learning_rat, which does not "
        "exist; "
        "did you mean 'vars.learning_rate'?",
    ),
    "a missing argument": (
        {"model.schedule": {"kind": "linear"}},
        "model.init_args.schedule.total_steps is missing: ScheduleConfig needs it",
    ),
    "no reference, though it looks like one": (
        {"model.optimizer.learning_rate": "${vars.learning"},
        "model.init_args.optimizer.learning_rate: ${vars.learning cannot be read",
    ),
    "a model of no class": (
        {"model.model": {"init_args": {}}},
        "model.init_args.model.class_path is missing: it names the class to create",
    ),
    "nothing for a number": (
        {"model.schedule.warmup_steps": None},
        "model.init_args.schedule",
    ),
    "a missing part": (
        {"data": {}},
        "data is missing: it needs a class_path and init_args",
    ),
    "no batch": (
        {"data.batch_size": 0},
        "data: batch_size must be at least 1, got 0",
    ),
}


@pytest.mark.parametrize("verb", ["fit", "check"])
@pytest.mark.parametrize("case", IMAGE)
def test_mistakes_in_a_recipe(run, recipe, case, verb):
    changes, message = IMAGE[case]
    path = recipe(**changes)
    command = ("fit", "--config", path) if verb == "fit" else ("check", path)
    mistakes = refused(run, *command)
    assert any(mistake.startswith(message) for mistake in mistakes), mistakes


@pytest.mark.parametrize("verb", ["fit", "check"])
def test_every_mistake_is_told_at_once(run, recipe, verb):
    path = recipe(
        **{
            "trainer.max_stesp": 3,
            "trainer.limit_val_batches": "some",
            "vars.attention": "diff_v1",
            f"{BACKBONE}.num_heads": 3,
            f"{BACKBONE}.head_dim": 16,
            "model.optimizer.learning_rate": -1.0,
            "data.bacth_size": 3,
        }
    )
    command = ("fit", "--config", path) if verb == "fit" else ("check", path)
    mistakes = refused(run, *command)
    for part in ("max_stesp", "limit_val_batches", "num_heads", "learning_rate", "bacth_size"):
        assert sum(part in mistake for mistake in mistakes) >= 1, part
    assert all("\n" not in mistake for mistake in mistakes)


def test_a_misspelt_override_of_a_variable_changes_nothing_silently(run, recipe):
    assert refused(run, "fit", "--config", recipe(), "--vars.atention", "softmax") == [
        "vars.atention has no effect: nothing refers to it; did you mean 'attention'?"
    ]


def test_an_unknown_recipe_is_told_with_the_nearest(run):
    for command in (("fit", "--config"), ("check",)):
        assert refused(run, *command, "image/digits_tinny") == [
            "there is no recipe 'image/digits_tinny'; did you mean 'image/digits_tiny'? "
            "(diffmm recipes lists them)"
        ]
    assert refused(run, "fit", "--config", "mine.yaml") == ["there is no recipe file mine.yaml"]


def test_a_sequence_longer_than_the_positions(run, recipe, text_changes):
    path = recipe("text/stdlib_tiny", **text_changes, **{"model.model.config.max_length": 16})
    message = (
        "data.init_args.sequence_length=32 is longer than the model's positions allow: "
        "max_length=16"
    )
    assert refused(run, "fit", "--config", path) == [message]
    assert refused(run, "check", path) == [message]


def test_pairs_that_a_contrastive_model_cannot_take(run, recipe):
    changes = {"data.max_tokens": 80, "data.image_size": 16, "trainer.accumulate_grad_batches": 2}
    path = recipe("image_text/shapes_tiny", **changes)
    assert refused(run, "check", path) == [
        "data.init_args.image_size=(16, 16), but the model's image_size is 32",
        "data.init_args.max_tokens=80 is longer than the positions of the model's text tower "
        "allow: max_length=64",
        "trainer.accumulate_grad_batches=2 is not supported by contrastive training, which cannot "
        "compare samples of different micro-batches: use a larger batch_size (with "
        "activation_checkpointing, if memory is short) or more devices",
    ]


def test_towers_without_data_and_data_without_towers(run, recipe):
    both = "multimodal/shapes_and_sounds_tiny"
    for name, media, other in (("audio", "sounds", "Image"), ("image", "images", "Audio")):
        path = recipe(both, **{f"model.model.config.{name}": None})
        assert refused(run, "check", path) == [
            f"ImageAudioTextData has {media}, but the model has no {name} tower: set "
            f"model.init_args.model.init_args.config.{name}, or use other data"
        ]
        data = {"class_path": f"datamodules.{other}TextData", "init_args": {"max_tokens": 80}}
        size = {"image_size": 32} if other == "Image" else {"sample_rate_hz": 8000}
        data["init_args"] |= size
        path = recipe(both, data=data)
        assert refused(run, "check", path)[-1] == (
            f"the model has an {name} tower, but {other}TextData has no {media} to train it: use "
            f"datamodules.ImageAudioTextData, leave out the tower, or freeze it "
            f"(--model.{name}.freeze all)"
        )


def test_a_model_and_data_that_disagree(run, recipe):
    path = recipe("audio/sound_events_tiny", **{"data.sample_rate_hz": 16000})
    assert "data.init_args.sample_rate_hz=16000, but the model's sample_rate_hz is 8000" in refused(
        run, "check", path
    )
    path = recipe("audio/sound_events_tiny", **{"data.clip_seconds": 1.5})
    assert refused(run, "check", path) == [
        "data.init_args.clip_seconds=1.5 is longer than the model's clip_seconds=1"
    ]
    path = recipe("text/stdlib_tiny", **{"data.objective": "masked"})
    assert refused(run, "check", path) == [
        "data.init_args.objective='masked', but the model's causal is True"
    ]
    path = recipe("text/stdlib_tiny", **{"data.tokenizer": "gpt2"})
    assert "the model's tokenizer is 'bytes', but the data's is 'gpt2'" in refused(
        run, "check", path
    )


def test_an_empty_folder_leaves_no_run_behind(run, recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    source = {"class_path": "datamodules.text.TextFolder"}
    source["init_args"] = {"root": str(tmp_path / "empty")}
    (mistake,) = refused(
        run, "fit", "--config", recipe("text/stdlib_tiny", **{"data.source": source})
    )
    assert str(tmp_path / "empty") in mistake


def test_labels_outside_the_classes_leave_no_run_behind(run, recipe):
    path = recipe(**{"model.model.config.num_classes": 4})
    (mistake,) = refused(run, "fit", "--config", path)
    assert "is outside the model's 4 classes" in mistake


def test_an_unreadable_image_is_named(run, recipe, tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            (folder / "broken.png").write_bytes(b"no image")
    source = {"class_path": "datamodules.image.ImageFolder"}
    source["init_args"] = {s: str(tmp_path / "images" / s) for s in ("train", "val")}
    changes = {"data.source": source, "data.channels": 1, "data.batch_size": 2}
    changes["data.num_workers"] = 1
    (mistake,) = refused(run, "fit", "--config", recipe(**changes))
    assert "broken.png" in mistake
    assert "Traceback" not in mistake


def test_a_gpu_where_there_is_none(run, recipe):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (mistake,) = refused(run, "fit", "--config", recipe(**{"trainer.accelerator": "gpu"}))
    assert "gpu" in mistake.lower() or "cuda" in mistake.lower()


@pytest.fixture
def text_weights(tmp_path) -> Path:
    """A file with the weights of a text model."""
    from diffmm.models import BackboneConfig, TextConfig

    backbone = BackboneConfig(dim=32, depth=1, num_heads=4, rope="1d")
    path = save_model(TextModel(TextConfig(320, 16, backbone)), tmp_path / "text.safetensors")
    assert isinstance(load_model(path), TextModel)
    return path


def test_weights_of_another_architecture(run, recipe, text_weights):
    for verb in ("finetune", "test", "predict"):
        (mistake,) = refused(run, verb, "--config", recipe(), "--weights", text_weights)
        assert str(text_weights) in mistake
        assert "another architecture" in mistake or "does not fit" in mistake


def test_weights_that_are_not_there(run, recipe):
    for verb in ("finetune", "validate"):
        (mistake,) = refused(run, verb, "--config", recipe(), "--weights", "no.ckpt")
        assert mistake == "there is no file of weights at no.ckpt"


def test_ckpt_path_is_refused_where_it_would_mix_two_runs(run, recipe):
    for arguments in (("--ckpt_path", "x.ckpt"), ("--ckpt_path=x.ckpt",)):
        (mistake,) = refused(run, "fit", "--config", recipe(), *arguments)
        assert "diffmm fit --resume RUN" in mistake
        assert "diffmm finetune --weights CKPT" in mistake


def test_a_verb_needs_its_arguments(run):
    assert refused(run, "fit") == ["diffmm fit needs --config RECIPE (diffmm recipes lists them)"]
    assert refused(run, "finetune", "--config", "image/digits_tiny") == [
        "diffmm finetune needs --weights CKPT to start from"
    ]
    assert refused(run, "test", "--config", "image/digits_tiny") == [
        "diffmm test needs a RUN, or --config RECIPE and --weights WEIGHTS"
    ]


def test_resume_takes_a_run_as_it_was(run):
    (mistake,) = refused(run, "fit", "--resume", "nowhere")
    assert mistake.startswith("nowhere is not a run directory: there is no nowhere/config.yaml")
    (mistake,) = refused(run, "fit", "--resume", "nowhere", "--name", "other")
    assert mistake.startswith("--resume resumes a run unchanged")


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "../../../x", "a/../../x", "/tmp/x", "a//b", "a/"]
)
@pytest.mark.parametrize("command", ["fit", "fit --resume auto", "sweep"])
def test_a_name_that_is_no_folder_of_the_recipes_runs(command, name, run):
    values = "0,1" if command == "sweep" else "0"
    command = (*command.split(), "--config", "image/digits_tiny", "--vars.seed", values)
    (mistake,) = refused(run, *command, f"--name={name}")
    assert mistake.startswith("--name must be the name of a folder in runs/image/digits_tiny")
    assert f"got {name!r}" in mistake


@pytest.mark.parametrize(
    ("verb", "option", "values"), [("fit", "--run_dir", "0"), ("sweep", "--sweep_dir", "0,1")]
)
def test_an_empty_directory_name(verb, option, values, run):
    command = (verb, "--config", "image/digits_tiny", "--vars.seed", values, f"{option}=")
    assert refused(run, *command) == [f"{option} must be a directory, got ''"]
