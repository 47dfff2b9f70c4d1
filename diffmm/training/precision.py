"""Batch fields that keep their precision under low-precision training."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch.plugins import Precision
from torch import nn


def exact_fields(model: nn.Module) -> tuple[str, ...]:
    """Return the batch fields that must not be cast, as declared by the configs of the model's
    submodules."""
    configs = (getattr(module, "config", None) for module in model.modules())
    found = (getattr(config, "exact_fields", ()) for config in configs)
    return tuple(dict.fromkeys(field for fields in found for field in fields))


def keep_exact(plugin: Precision, fields: Sequence[str]) -> None:
    """Keep a precision plugin (`bf16-true`, `16-true`) from casting these batch fields to fewer
    bits."""
    plugin.convert_input = partial(_converted, plugin, fields)  # type: ignore[method-assign]


def _converted(plugin: Precision, fields: Sequence[str], batch: Any) -> Any:
    cast = type(plugin).convert_input(plugin, batch)
    for field in fields if isinstance(cast, dict) else ():
        if field in cast and cast[field].element_size() < batch[field].element_size():
            cast[field] = batch[field]
    return cast
