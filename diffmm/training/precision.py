"""What low precision must not touch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch.plugins import Precision
from torch import nn


def exact_fields(model: nn.Module) -> tuple[str, ...]:
    """The fields of a batch that a model needs as they are, by what its parts declare."""
    configs = (getattr(module, "config", None) for module in model.modules())
    found = (getattr(config, "exact_fields", ()) for config in configs)
    return tuple(dict.fromkeys(field for fields in found for field in fields))


def keep_exact(plugin: Precision, fields: Sequence[str]) -> None:
    """Have a precision plugin (`bf16-true`, `16-true`) leave these fields of a batch as they are,
    where it would cast them to fewer bits."""
    plugin.convert_input = partial(_converted, plugin, fields)  # type: ignore[method-assign]


def _converted(plugin: Precision, fields: Sequence[str], batch: Any) -> Any:
    cast = type(plugin).convert_input(plugin, batch)
    for field in fields if isinstance(cast, dict) else ():
        if field in cast and cast[field].element_size() < batch[field].element_size():
            cast[field] = batch[field]
    return cast
