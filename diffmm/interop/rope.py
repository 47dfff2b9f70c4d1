"""Rotary settings of Hugging Face transformers, in the form of all versions."""

import math
from typing import Any

from diffmm.interop.settings import TheirSettings
from diffmm.layers import RopeScaling
from diffmm.models import BackboneConfig

DEFAULT_BASE = 10000.0


def read(settings: TheirSettings) -> dict[str, Any]:
    """Read rotary settings as fields of `BackboneConfig`: `rope_parameters` (transformers 5), or
    `rope_theta` and `rope_scaling` (before).

    Raises:
        ValueError: If the kind of scaling depends on the length of the sequence (`dynamic`,
            `longrope`) or is unknown, or only a part of each head is rotated.
    """
    settings.only("partial_rotary_factor", 1.0, "all dimensions of a head are rotated")
    base = settings.take("rope_theta", float, DEFAULT_BASE)
    new, old = settings.take("rope_parameters", dict, {}), settings.take("rope_scaling", dict, {})
    length = settings.take("max_position_embeddings", int)
    length = settings.take("original_max_position_embeddings", int, length)
    inner = settings.inside("rope_parameters" if new else "rope_scaling", new or old)
    base = inner.take("rope_theta", float, base)
    inner.only("partial_rotary_factor", 1.0, "all dimensions of a head are rotated")
    kind = inner.take("rope_type", str, inner.take("type", str, "default"))
    scaling = None
    if kind not in ("default", "linear", "llama3", "yarn"):
        inner.refuse("rope_type", kind, "only 'default', 'linear', 'llama3' and 'yarn'")
    if kind == "linear":
        scaling = RopeScaling("linear", inner.take("factor", float))
    elif kind != "default":
        length = inner.take("original_max_position_embeddings", int, length)
        scaling = (_llama3 if kind == "llama3" else _yarn)(inner, length)
    inner.finish(ignored=())
    return {"rope_base": base, "rope_scaling": scaling}


def _llama3(inner: TheirSettings, length: int) -> RopeScaling:
    return RopeScaling(
        "llama3",
        inner.take("factor", float),
        original_length=length,
        low_frequency_factor=inner.take("low_freq_factor", float),
        high_frequency_factor=inner.take("high_freq_factor", float),
    )


def _yarn(inner: TheirSettings, length: int) -> RopeScaling:
    factor = inner.take("factor", float)
    attention_factor = inner.take("attention_factor", float, None)
    scales = [inner.take(name, float, 0.0) for name in ("mscale", "mscale_all_dim")]
    if attention_factor is None and all(scales) and factor > 1.0:
        above, below = (0.1 * scale * math.log(factor) + 1.0 for scale in scales)
        attention_factor = above / below
    return RopeScaling(
        "yarn",
        factor,
        original_length=length,
        beta_fast=inner.take("beta_fast", float, 32.0),
        beta_slow=inner.take("beta_slow", float, 1.0),
        truncate=inner.take("truncate", bool, True),
        attention_factor=attention_factor,
    )


def write(backbone: BackboneConfig) -> dict[str, Any]:
    """The rotary settings of a backbone, in the form that all versions of transformers read."""
    scaling = backbone.rope_scaling
    values: dict[str, Any] = {"rope_theta": backbone.rope_base}
    if scaling is None:
        return values
    inner: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.original_length is not None:
        inner["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        inner["low_freq_factor"] = scaling.low_frequency_factor
        inner["high_freq_factor"] = scaling.high_frequency_factor
    if scaling.kind == "yarn":
        inner |= {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate")}
        if scaling.attention_factor is not None:
            inner["attention_factor"] = scaling.attention_factor
    return values | {"rope_scaling": inner}
