"""`diffmm check` and its memory estimate."""

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.memory import HALF_PRECISIONS, estimate_memory, fake_shapes
from diffmm.recipes.mistakes import find_mistakes
from diffmm.recipes.settings import load

CAPTIONS = "image_text/shapes_captions_tiny"
MEDIA = "--model.model.config.media"
TINY = (
    *("text/stdlib_tiny", "image/digits_tiny", "audio/sound_events_multilabel_tiny"),
    *(CAPTIONS, f"{CAPTIONS} {MEDIA} cross_attention"),
)


def findings(name, *overrides):
    """What is found in a recipe; the name may be followed by overrides, too."""
    name, *given = name.split()
    found = find_mistakes({**load([find_recipe(name)], [*given, *overrides]), "run_dir": "runs"})
    assert not found.mistakes
    return found


def estimate(name, *overrides, precision="32-true", **settings):
    found = findings(name, *overrides)
    shapes = fake_shapes(found.model, found.data)
    return estimate_memory(found.model, shapes, precision=precision, **settings)


@pytest.mark.parametrize(
    ("settings", "is_cut"),
    [
        (["--trainer.max_steps", "150"], True),
        (["--vars.steps", "150"], False),
        (["--trainer.max_steps", "150", "--model.schedule.kind", "constant"], False),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "2"], False),
    ],
)
def test_a_run_that_ends_before_its_schedule_is_doubted(run, settings, is_cut):
    result = run("check", "image/digits_tiny", *settings)
    assert result.code == 0, result.err
    doubt = "trainer.max_steps 150 ends the run before its schedule of 450 steps: for a shorter"
    assert (doubt in result.err) == is_cut


def test_reports_size_step_and_memory(run):
    result = run("check", "text/stdlib_tiny", "--trainer.accumulate_grad_batches", "3")
    assert result.code == 0, result.err
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    model = findings("text/stdlib_tiny").model.model
    count = sum(parameter.numel() for parameter in model.parameters())
    assert lines["model"] == "TextModel under CausalLM"
    assert lines["attention"].startswith("diff_v2, 3 layers of")
    assert lines["parameters"].startswith(f"{count:,} (")
    assert f"{model.embedding.weight.numel():,} in the embedding" in lines["parameters"]
    size = findings("text/stdlib_tiny").data.batch_size
    samples, tokens = f"{3 * size:,} samples", f"{3 * size * 128:,} tokens"
    assert lines["step"] == f"{samples}, {tokens} ({size} per batch x 3 batches)"
    assert lines["memory"].startswith("about ")
    assert not Path("runs").exists()


@pytest.mark.parametrize(("media", "num_tokens"), [("prefix", 64), ("cross_attention", 99)])
def test_reports_captioning_with_both_kinds_of_media(run, media, num_tokens):
    """The texts fill what the media leave of the decoder's length."""
    result = run("check", CAPTIONS, MEDIA, media)
    assert result.code == 0, result.err
    assert f"32 samples, {32 * num_tokens:,} tokens (32 per batch)" in result.out
    model = findings(CAPTIONS, MEDIA, media).model.model
    assert f"{sum(p.numel() for p in model.parameters()):,} (" in result.out
    result = run("check", CAPTIONS, MEDIA, "cross")
    assert result.code == 2
    assert "config.media must be one of 'prefix', 'cross_attention', got 'cross'" in result.err


def test_reports_transcripts(run):
    result = run("check", "audio_text/prompts_ctc_tiny")
    assert result.code == 0, result.err
    assert "16 samples, 1,536 tokens (16 per batch)" in result.out


def test_muon_has_one_momentum_where_adamw_has_two_moments():
    name = "text/stdlib_tiny"
    adamw, muon = estimate(name), estimate(name, "--model.optimizer.kind", "muon")
    model = findings(name).model.model
    inside = (module for block in model.backbone.blocks for module in block.modules())
    matrices = [m.weight for m in inside if isinstance(m, torch.nn.Linear) and m.out_features > 8]
    assert adamw.optimizer - muon.optimizer == 4 * sum(weight.numel() for weight in matrices)
    assert adamw.weights == muon.weights


def test_counts_the_devices_and_what_is_frozen(run):
    result = run(
        "check",
        "image/digits_tiny",
        *("--trainer.devices", "4", "--trainer.num_nodes", "2"),
        *("--model.finetune.freeze", "all_but_head"),
    )
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert lines["step"] == "512 samples (64 per batch x 8 devices)"
    head = findings("image/digits_tiny").model.model.head
    assert lines["trained"] == f"{sum(p.numel() for p in head.parameters()):,}"


@pytest.mark.parametrize(
    "strategy",
    [
        ("--trainer.strategy", "fsdp2_tp2"),
        (
            *("--trainer.strategy", "diffmm.training.FSDP2Strategy"),
            *("--trainer.strategy.tensor_parallel_size", "2"),
        ),
    ],
)
def test_devices_that_share_heads_share_samples(run, strategy):
    result = run("check", "image/digits_tiny", "--trainer.devices", "4", *strategy)
    assert result.code == 0, result.err
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert lines["step"] == "128 samples (64 per batch x 2 groups of 2 devices)"
    assert "gathered" in lines["memory"]


@pytest.mark.parametrize("name", TINY)
def test_states_are_exact(name):
    task = findings(name).model
    size = sum(parameter.numel() for parameter in task.parameters())
    buffers = sum(b.numel() * b.element_size() for b in task.buffers())
    memory = estimate(name)
    assert memory.weights == 4 * size + buffers
    assert memory.gradients == 4 * size
    assert memory.optimizer == 8 * size
    assert memory.total == memory.activations + 16 * size + buffers
    for precision in HALF_PRECISIONS:
        assert estimate(name, precision=precision).optimizer == 4 * size
    assert estimate(name, num_shards=4).gradients == size


@pytest.mark.parametrize("name", TINY)
def test_activations_are_what_a_real_step_keeps(name):
    found = findings(name)
    shapes = fake_shapes(found.model, found.data)
    expected = estimate_memory(found.model, shapes, precision="32-true").activations

    task = findings(name).model.to_empty(device="cpu")
    for parameter in task.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for buffer in task.buffers():
        if buffer.is_floating_point():
            buffer.fill_(0.1)
    batch = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    weights = {parameter.data_ptr() for parameter in task.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.setdefault(storage.data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        task.training_loss(batch, 0)
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    assert sum(sizes) + 1.5 * max(sizes) == pytest.approx(expected, rel=0.02)


def test_activations_of_a_ctc_loss_are_those_of_the_longest_texts():
    name = "audio_text/prompts_ctc_tiny"
    found = findings(name)
    shapes = fake_shapes(found.model, found.data)
    expected = estimate_memory(found.model, shapes, precision="32-true").activations
    task = findings(name).model.to_empty(device="cpu")
    for parameter in (*task.parameters(), *task.buffers()):
        parameter.data.fill_(0.01)
    batch = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    batch["num_tokens"] += shapes["tokens"][0][1]
    batch["num_samples"] = torch.full_like(batch["num_tokens"], batch["waveforms"].shape[1])
    sizes: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        task.training_loss(batch, 0)
    kept = sum(sizes.values()) - sum(p.untyped_storage().nbytes() for p in task.parameters())
    assert kept + 1.5 * max(sizes.values()) == pytest.approx(expected, rel=0.02)


def test_activations_grow_with_the_batch_and_shrink_by_recomputing_and_half_precision():
    full = estimate("text/stdlib_tiny").activations
    double = estimate("text/stdlib_tiny", "--data.batch_size", "16").activations
    assert double == pytest.approx(2 * full, rel=0.05)
    half = estimate("text/stdlib_tiny", precision="bf16-mixed").activations
    assert 0.4 * full < half < 0.9 * full
    recomputed = estimate("text/stdlib_tiny", "--model.activation_checkpointing", "true")
    assert recomputed.activations < 0.6 * full


def test_a_misspelt_key_hides_no_other_mistake(run):
    result = run(
        "check",
        "text/stdlib_tiny",
        *("--trainer.max_stepps", "3", "--vars.attention", "diff_v3"),
        *("--model.init_args.model.init_args.config.backbone.dimm", "3"),
    )
    assert result.code == 2
    assert "unknown key trainer.max_stepps; did you mean 'max_steps'?" in result.err
    assert "backbone.dimm; did you mean 'dim'?" in result.err
    assert (
        "attention must be one of 'softmax', 'diff_v1', 'diff_v2', 'diff_grouped', got 'diff_v3'"
        in result.err
    )


@pytest.mark.parametrize("value", [float("inf"), 10**20, 3, "text", [1], True])
@pytest.mark.parametrize("key", ["trainer", "model", "data", "vars", "seed_everything"])
def test_a_value_in_the_place_of_a_part(run, recipe, key, value):
    result = run("check", recipe(**{key: value}))
    is_seed = key == "seed_everything" and value in (3, True)
    assert result.code == (0 if is_seed else 2)
    assert is_seed or any(key in line for line in result.mistakes)


CONFIG = "model.init_args.model.init_args.config"


@pytest.mark.parametrize(
    ("settings", "mistakes"),
    [
        (
            "backbone.dim=66 image_size=9 pool=meen",
            [
                f"{CONFIG}.pool must be one of 'cls', 'token'",
                f"{CONFIG}.backbone: num_heads must divide dim, got 4 heads for dim 66",
                f"{CONFIG}: image_size 9x9 is not a multiple of patch_size 2x2",
            ],
        ),
        (
            "backbone.num_heads=5 backbone.drop_path=3 patch_size=0",
            [
                f"{CONFIG}.backbone: drop_path must be in [0, 1), got 3",
                f"{CONFIG}.backbone: num_heads must divide dim, got 5 heads for dim 64",
                f"{CONFIG}: patch_size must be at least 1, got 0",
            ],
        ),
        (
            "backbone.rope=7d in_channels=0 num_classes=-1",
            [
                f"{CONFIG}.backbone.rope must be one of",
                f"{CONFIG}: num_classes must be at least 0, got -1",
                f"{CONFIG}: in_channels must be at least 1, got 0",
            ],
        ),
    ],
)
def test_no_mistake_hides_another(run, settings, mistakes):
    given = [f"--model.model.config.{setting}" for setting in settings.split()]
    found = run("check", "image/digits_tiny", *given).mistakes
    assert len(found) == len(mistakes), found
    for mistake, start in zip(found, mistakes, strict=True):
        assert mistake.startswith(start)
