"""All shipped recipes: header, values and model; the tiny ones are trained for a step."""

import csv
import re
from functools import cache
from pathlib import Path

import pytest

from diffmm.recipes.catalog import FIELDS, description, fields, recipe_names, recipe_root
from diffmm.recipes.memory import fake_shapes
from diffmm.recipes.mistakes import find_mistakes
from diffmm.recipes.references import resolve
from diffmm.recipes.settings import load
from diffmm.recipes.summary import num_devices
from diffmm.recipes.trainer import RecipeCLI, silence_noise

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")

TINY = (
    "audio_text/sounds_tiny",
    "image_text/shapes_tiny",
    "image_text/shapes_captions_tiny",
    "audio/sound_events_mae_tiny",
    "audio/sound_events_multilabel_tiny",
    "audio/sound_events_tiny",
    "image/digits_mae_tiny",
    "image/digits_tiny",
    "multimodal/shapes_and_sounds_tiny",
    "text/many_shot_tiny",
    "text/needles_tiny",
    "text/recall_tiny",
    "text/stdlib_mlm_tiny",
    "text/stdlib_tiny",
)

ONE_OF_EACH = (
    "audio/sound_events_tiny",
    "image/digits_mae_tiny",
    "text/stdlib_mlm_tiny",
    "image_text/shapes_captions_tiny",
    "image_text/shapes_tiny",
    "multimodal/shapes_and_sounds_tiny",
)
"""A recipe of each modality, to be trained with every attention."""

# Name, and the number of parameters (in millions) in its description.
PROMISED = {
    "text/wikitext103": 124,
    "text/fineweb_edu_350m": 350,
    "text/mlm_encoder": 124,
    "text/paper_830m": 830,
    "text/paper_1_4b": 1_400,
    "text/paper_2_8b": 2_800,
    # The paper's 3B does not count the embedding of 308 M.
    "text/paper_3b": 3_171 + 308,
    "text/paper_6_8b": 6_800,
    "text/paper_13b": 13_100,
    "text/paper_13b_64gpu": 13_100,
    "image/cifar10": 16,
    "image/imagenet_vit_s": 22.05,
    "image/imagenet_vit_b": 86.6,
    "image/imagenet_mae": 111.9,
    "audio/speech_commands": 21.4,
    "audio/audioset_ast": 86.6,
    "image/finetune": 21.7,
    "image/finetune_layer_decay": 21.7,
    "image/finetune_lora": 22.0,
    "audio/finetune": 21.4,
    "audio_text/clotho": 32.4,
    "audio_text/librispeech_100": 21.9,
    "audio_text/prompts_ctc_tiny": 0.513,
    "audio_text/prompts_transcription_tiny": 0.74,
    "image_text/coco_captions": 36.2,
    "image_text/cc3m_clip_b16": 149.8,
    "image_text/clip_art": 9.7,
    "image_text/emoji": 9.7,
    "text/finetune": 10.76,
    "text/instruct": 10.76,
}

OWN_DATA = ("audio/finetune", "image/finetune", "text/finetune")
"""Recipes for a user's own data, on any machine."""

FROM_WEIGHTS = ("image/finetune_layer_decay", "image/finetune_lora", "text/instruct")
"""Recipes for a user's own data that start from trained weights."""

RECIPES = sorted((*TINY, *PROMISED))


def values(name, *overrides):
    return {**load([recipe_root() / f"{name}.yaml"], overrides), "run_dir": "runs"}


@cache
def built(name):
    """The recipe's parts, for tests that only read them."""
    return find_mistakes(values(name))


def text(name):
    return (recipe_root() / f"{name}.yaml").read_text()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_these_are_all_recipes_there_are():
    assert recipe_names() == RECIPES
    files = [path for path in recipe_root().rglob("*") if path.is_file()]
    assert len(files) == len(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_what_a_user_wants_to_know(name):
    assert len(description(text(name))) > 20
    assert list(fields(text(name))) == list(FIELDS)
    said = fields(text(name))
    verb = "finetune" if name in FROM_WEIGHTS else "fit"
    command = f"diffmm {verb} --config {name}"
    command += " --data PATH" if name in (*OWN_DATA, *FROM_WEIGHTS) else ""
    assert said["Command"] == command + (" --weights RUN" if name in FROM_WEIGHTS else "")
    assert all(len(value) > 8 for value in said.values())
    # Figures that were not measured are marked as such.
    if name not in TINY:
        assert re.search(r"\b(none|nothing)\b", said["Measured"]), said["Measured"]


@pytest.mark.parametrize("name", RECIPES)
def test_lines_are_short_and_nothing_is_left_open(name):
    lines = text(name).splitlines()
    assert max(map(len, lines)) <= 100
    assert not re.search(r"TODO|TBD|FIXME|/root|/home|/work", text(name))


@pytest.mark.parametrize("name", RECIPES)
def test_there_are_no_mistakes_and_the_parser_agrees(name):
    found = built(name)
    assert found.mistakes == []
    assert found.model is not None
    assert found.data is not None
    assert all(parameter.is_meta for parameter in found.model.parameters())
    RecipeCLI(values(name), build=False)


@pytest.mark.parametrize("name", RECIPES)
def test_one_override_switches_the_attention_and_keeps_the_size(name):
    counts = {}
    # The decoders of the paper are of one kind, and two of their blocks show it.
    fewer = ["--model.model.config.backbone.depth", "2"] if name.startswith("text/paper") else []
    for attention in ATTENTIONS:
        if fewer or attention != values(name)["vars"]["attention"]:
            found = find_mistakes(values(name, "--vars.attention", attention, *fewer))
        else:
            found = built(name)
        model = found.model.model
        config = model.config
        towers = getattr(config, "towers", {"": getattr(config, "encoder", config)})
        backbones = [tower.backbone for tower in towers.values()]
        if "decoder" not in towers and hasattr(config, "decoder"):
            backbones.append(config.decoder)
        assert {backbone.attention for backbone in backbones} == {attention}
        assert all(backbone.num_heads >= 4 for backbone in backbones)
        counts[attention] = count(model)
    for number in counts.values():
        assert number == pytest.approx(counts["softmax"], rel=0.005)


@pytest.mark.parametrize("name", PROMISED)
def test_the_model_has_the_promised_size(name):
    model = built(name).model.model
    assert count(model) == pytest.approx(1e6 * PROMISED[name], rel=0.015)


@pytest.mark.parametrize("name", RECIPES)
def test_a_short_trial_needs_no_other_setting(name):
    """`--vars.steps 30`: the warmup is a fraction of the steps."""
    assert find_mistakes(values(name, "--vars.steps", "30")).mistakes == []


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_tiny")])
def test_tiny_recipes_warm_up_for_100_steps(name):
    assert built(name).model.schedule_config.num_warmup_steps == 100


@pytest.mark.parametrize("name", RECIPES)
def test_what_belongs_together_agrees(name):
    recipe = values(name)
    found = built(name)
    trainer, data = recipe["trainer"], found.data
    assert trainer["max_steps"] == "${vars.steps}"
    assert found.model.schedule_config.total_steps == recipe["vars"]["steps"]
    assert recipe["seed_everything"] == "${vars.seed}"
    assert data.seed == recipe["vars"]["seed"]
    assert trainer["use_distributed_sampler"] is False
    (checkpoints,) = [c for c in trainer["callbacks"] if "Checkpoint" in c["class_path"]]
    assert checkpoints["class_path"] == "diffmm.training.Checkpoints"
    assert {logger["class_path"].rsplit(".")[-1] for logger in trainer["logger"]} == {
        "CSVLogger",
        "TensorBoardLogger",
    }
    if trainer["accelerator"] == "gpu":
        # One flag switches between ways to use several devices.
        assert trainer["strategy"] in ("auto", "fsdp2")
        assert trainer["precision"] == "bf16-mixed"
        assert found.model.compile_model
        assert found.data.num_workers > 0
    if getattr(found.model, "mixing", None) is not None:
        assert data.batch_size % 2 == 0


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("text/paper")])
def test_the_papers_batches(name):
    recipe = values(name)
    found = built(name)
    trainer, _ = resolve(recipe)
    devices = num_devices(trainer["trainer"])
    samples = found.data.batch_size * devices * recipe["trainer"].get("accumulate_grad_batches", 1)
    tokens = samples * fake_shapes(found.model, found.data)["tokens"][0][1]
    assert tokens == (4 * 2**20 if name == "text/paper_3b" else 2**18)
    assert found.model.model.config.vocab_size == 100_288


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
# With four or eight clips, some classes are missing.
@pytest.mark.filterwarnings("ignore:No positive samples found in target")
@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "diff_v2") for name in TINY]
    + [(name, attention) for name in ONE_OF_EACH for attention in ("softmax", "diff_v1")],
)
def test_tiny_recipes_train(name, attention, tmp_path):
    small = ["--data.batch_size", "4", "--trainer.logger", "false", "--trainer.callbacks", "[]"]
    small += ["--trainer.fast_dev_run", "2", "--trainer.enable_progress_bar", "false"]
    if name.startswith("text/stdlib"):
        small += ["--data.source.init_args.max_bytes", "2000000"]
    recipe = values(name, "--vars.attention", attention, *small)
    silence_noise()
    cli = RecipeCLI({**recipe, "run_dir": str(tmp_path)})
    before = [parameter.detach().clone() for parameter in cli.model.parameters()]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["val/loss"].isfinite()
    after = list(cli.model.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    changed = [not a.equal(b) for a, b in zip(before, after, strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert list(Path(tmp_path).iterdir()) == []


def test_a_short_epoch_is_logged_and_not_warned_of(tmp_path):
    given = ["--data.batch_size", "4", "--trainer.callbacks", "[]", "--trainer.max_steps", "8"]
    given += ["--trainer.limit_train_batches", "3", "--trainer.log_every_n_steps", "4"]
    given += ["--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
    recipe = values("image/digits_tiny", *given)
    silence_noise()
    cli = RecipeCLI({**recipe, "run_dir": str(tmp_path)})
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as rows:
        steps = [row["step"] for row in csv.DictReader(rows) if row["train/loss"]]
    assert steps == ["3", "7"]
