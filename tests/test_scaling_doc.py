"""The figures in docs/scaling.md match the code and the document's own formulas."""

import re
import shlex
from pathlib import Path

import pytest

from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.memory import estimate_memory, fake_shapes
from diffmm.recipes.mistakes import find_mistakes
from diffmm.recipes.references import resolve
from diffmm.recipes.settings import load
from diffmm.recipes.summary import num_devices, tensor_parallel_size
from diffmm.training.parallel import StrategyRegistry

DOC = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
RECIPE = "text/paper_13b_64gpu"
PROSE = " ".join(DOC.split())
ROWS = re.findall(r"^\| (\(as it is\)|`--.*?`) \| ((?:\d+\.\d \| ?)+)$", DOC, re.MULTILINE)
COLUMNS = ("total", "weights", "gradients", "optimizer", "activations", "gathered")


def built(*overrides):
    values = {**load([find_recipe(RECIPE)], overrides), "run_dir": "runs"}
    found = find_mistakes(values)
    assert found.mistakes == []
    return found, resolve(values)[0]["trainer"]


def test_the_table_is_there():
    assert len(ROWS) == 6


@pytest.mark.parametrize(("settings", "figures"), ROWS, ids=[row[0] for row in ROWS])
def test_memory_is_what_check_says(settings, figures):
    overrides = shlex.split(settings.strip("`")) if settings.startswith("`") else []
    found, trainer = built(*overrides)
    memory = estimate_memory(
        found.model,
        fake_shapes(found.model, found.data),
        precision=trainer["precision"],
        num_shards=num_devices(trainer) if "fsdp" in trainer["strategy"] else 1,
        num_splits=tensor_parallel_size(trainer),
    )
    for name, figure in zip(COLUMNS, figures.split("|")[:-1], strict=True):
        assert f"{getattr(memory, name) / 2**30:.1f}" == figure.strip(), name


def test_the_arithmetic_is_right():
    found, trainer = built()
    config = found.model.model.config
    size = sum(p.numel() for p in found.model.parameters())
    gpus = num_devices(trainer)
    tokens = found.data.batch_size * config.max_length
    flop = 8 * size * tokens
    seconds = flop / (0.35 * 989e12)
    share = (gpus - 1) / gpus
    block = sum(p.numel() for p in found.model.model.backbone.blocks[0].parameters())
    sums = (4 * 2 + 2 * 4) * 8 * tokens * config.backbone.dim * 2 * 7 / 8 * config.backbone.depth
    for words in (
        f"{size:,} parameters",
        f"T = {tokens:,} tokens per GPU and n = {gpus} GPUs",
        f"| {flop / 1e12:.0f} TFLOP |",
        f"| {seconds:.2f} s |",
        f"| {12 * size * share / 1e9:.0f} GB |",
        f"| {12 * size * share / 300e9:.2f} s |",
        f"| {8 * size * share / 1e9:.0f} GB |",
        f"{4 * size / 1e9:.0f} GB through the eight ports of the machine",
        f"{3 * 4 * size / 12.5e9:.1f} s per step",
        f"8 x {4 * size / 2**30:.1f} = {32 * size / 2**30:.0f} GiB",
        f"A checkpoint is {12 * size / 2**30:.0f} GiB",
        f"its own {12 * size / gpus / 2**30:.1f} GiB",
        f"that takes {12 * size / trainer['num_nodes'] / 2e9:.0f} seconds",
        f"about {trainer['max_steps'] * seconds / 3600:.0f} hours",
        f"two blocks of {block / 1e6:.0f} M parameters",
        f"{sums / 1e9:.0f} GB per step and GPU, {sums / 300e9:.2f} s",
    ):
        assert words in PROSE, words


def test_strategies_it_names_are_there():
    named = set(re.findall(r"`(ddp|fsdp2\w*)`", DOC))
    assert named == {"ddp", "fsdp2", "fsdp2_tp2", "fsdp2_tp4", "fsdp2_tp8"}
    assert named <= set(StrategyRegistry)
