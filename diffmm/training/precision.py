"""What low precision must not touch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch.plugins import Precision
from torch import nn

from diffmm.layers.spectrogram import LogMelSpectrogram
from diffmm.models.masked_autoencoder import MaskedAutoencoder


def exact_fields(model: nn.Module) -> tuple[str, ...]:
    """The fields of a batch that a model needs as they are: the smallest energies of a sound, and
    the pixels that a masked autoencoder compares with their patch's mean, are lost in bfloat16."""
    fields = []
    if any(isinstance(module, LogMelSpectrogram) for module in model.modules()):
        fields.append("waveforms")
    if isinstance(model, MaskedAutoencoder):
        fields.append("images")
    return tuple(fields)


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
