"""The attention variants of the table, as overrides of a recipe."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.quality.tasks import BACKBONE, CONFIG
from diffmm.layers.feed_forward import FEED_FORWARDS
from diffmm.models import BackboneConfig
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.references import resolve
from diffmm.recipes.settings import load

SOFTMAX = "softmax"
"""The variant that all others are compared with."""

VARIANTS: dict[str, dict[str, str]] = {
    SOFTMAX: {},
    "softmax_gate": {"attention": "softmax", "output_gate": "element"},
    "softmax_exclusive": {"attention": "softmax", "exclusive": "true"},
    "diff_v1": {},
    "diff_v2": {},
    "diff_grouped": {},
    "diff_grouped_gate": {"attention": "diff_grouped", "output_gate": "element"},
}
"""Settings of the backbone, by variant; without `attention`, it is the variant's name."""

ABLATIONS: dict[str, dict[str, str]] = {
    "v1_shared_q": {"attention": "diff_v1", "share": "q"},
    "v1_shared_k": {"attention": "diff_v1", "share": "k"},
    "v1_constant_lambda": {"attention": "diff_v1", "lambda_init": "0.8"},
    "v1_no_norm": {"attention": "diff_v1", "headwise_norm": "false"},
    "v1_add": {"attention": "diff_v1", "combine": "add"},
}
"""Ablations of v1 (differential transformer, table 6, and its reviews)."""

HALF_HEADS = {
    "softmax_half_heads": {"attention": "softmax"},
    "v2_half_heads": {"attention": "diff_v2"},
}
"""Half as many heads of twice the size, that of the values of a head of v1."""

FEWER_KEYS = {"softmax_fewer_keys": {"attention": "softmax"}}
"""As few key heads as the grouped variants, whose attention needs them."""

CONTROLS: dict[str, dict[str, str]] = {
    **HALF_HEADS,
    **FEWER_KEYS,
    "v1_exclusive": {"attention": "diff_v1", "exclusive": "true"},
    "v2_exclusive": {"attention": "diff_v2", "exclusive": "true"},
}
"""Variants that separate what a second map gains from what other changes gain."""

ALTERNATIVES: dict[str, dict[str, str]] = {
    "clipped_softmax": {},
    "strided_sparse": {},
    "routed": {},
    "cosformer": {},
}
"""Lighter alternatives to a second map (`benchmarks.quality.alternatives`)."""

ALL = {**VARIANTS, **ABLATIONS, **CONTROLS, **ALTERNATIVES}

SIGNAL_PER_NOISE = 4
"""Signal heads per noise head and query heads per key head of the grouped variants."""


def overrides(
    variant: str, recipe: str, given: Sequence[str], backbones: Sequence[str] = (BACKBONE,)
) -> list[str]:
    """The overrides of a recipe for a variant, in addition to those of its task: those of each of
    the model's backbones, which are of equal size.

    Grouped differential attention needs grouped keys. Its feed-forward layers, and those of
    softmax with as few keys, get the parameters that it has less than the softmax model of the
    task. Alternatives are registered first.
    """
    if variant in ALTERNATIVES:
        from benchmarks.quality import alternatives  # registers attentions

        alternatives.register()
    settings = dict(ALL[variant])
    attention = settings.pop("attention", variant)
    if variant in HALF_HEADS:
        softmax = softmax_backbone(recipe, given, backbones[0])
        settings["num_heads"] = str(max(1, softmax.num_heads // 2))
    if attention == "diff_grouped" or variant in FEWER_KEYS:
        softmax = softmax_backbone(recipe, given, backbones[0])
        settings |= _with_fewer_keys(softmax, {**settings, "attention": attention})
    return [
        f"--vars.attention={attention}",
        *(f"{prefix}{name}={value}" for prefix in backbones for name, value in settings.items()),
    ]


def softmax_backbone(recipe: str, given: Sequence[str], prefix: str = BACKBONE) -> BackboneConfig:
    """A backbone of a task's softmax model, with the prefix of its settings."""
    values = load([find_recipe(recipe)], [*given, "--vars.attention=softmax"])
    config = resolve(values)[0]["model"]["init_args"]["model"]["init_args"]["config"]
    for name in prefix.removeprefix(CONFIG).rstrip(".").split("."):
        config = config[name]
    return BackboneConfig(**config)


def _with_fewer_keys(softmax: BackboneConfig, settings: dict[str, str]) -> dict[str, str]:
    num_kv_heads = max(1, softmax.num_heads // SIGNAL_PER_NOISE)
    arguments: dict[str, Any] = {**vars(softmax), **settings, "num_kv_heads": num_kv_heads}
    more = _attention_parameters(softmax) - _attention_parameters(BackboneConfig(**arguments))
    per_width = FEED_FORWARDS[softmax.feed_forward].num_matrices * softmax.dim
    step = 8 if softmax.dim >= 128 else 1
    width = step * round((softmax.resolved_feed_forward_width + more / per_width) / step)
    return {"num_kv_heads": str(num_kv_heads), "feed_forward_width": str(width)}


def _attention_parameters(config: BackboneConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.make_attention(0).parameters())
