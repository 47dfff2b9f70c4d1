"""Weights of 8 or 4 bits as plain tensors in a file, and the numbers that they stand for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

QUANTIZATION_KEY = "quantization"
"""Key of `{"bits": 8 or 4, "widths": {name: width}}` in the safetensors metadata: the number of
bits, and the last axis of each quantized weight."""

SCALE = "_scale"
"""Added to the name of a quantized weight, this is the name of its scales."""


def pack(values: Tensor, bits: int) -> Tensor:
    """Integers of 8 bits as they are, or of 4 bits (-8 to 7) two per byte, the first in the lower
    half: `[out, in]` to `[out, ceil(in / 2)]`."""
    if bits == 8:
        return values
    nibbles = torch.nn.functional.pad(values & 15, (0, values.shape[1] % 2)).to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack`, for weights `[out, width]`."""
    if bits == 8:
        return packed
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :width].to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def dequantized(weights: Mapping[str, Tensor], settings: Any) -> dict[str, Tensor]:
    """The weights of a file with quantized ones, all in floating point:

        weight[o, i] = values[o, i] * scale[o, i // (in / groups)]

    Args:
        weights: All tensors of the file.
        settings: The value of `QUANTIZATION_KEY`.

    Raises:
        ValueError: If the settings do not fit the tensors; the message names them.
    """
    found = dict(weights)
    for name, (values, scale) in integers(weights, settings).items():
        groups = values.float().unflatten(1, (scale.shape[1], -1))
        found[name] = (groups * scale.float().unsqueeze(-1)).flatten(1)
        del found[name + SCALE]
    return found


def integers(weights: Mapping[str, Tensor], settings: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The integers `[out, in]` and scales `[out, groups]` of each quantized weight. Arguments and
    errors as in `dequantized`."""
    try:
        bits, widths = settings["bits"], dict(settings["widths"])
        if bits not in (8, 4):
            raise ValueError(f"bits must be 8 or 4, got {bits!r}")
        found = {}
        for name, width in widths.items():
            values, scale = unpack(weights[name], bits, width), weights[name + SCALE]
            groups = scale.shape[1]
            fits = values.shape[1] == width and groups > 0 and width % groups == 0
            if not fits or scale.shape[0] != values.shape[0]:
                raise ValueError(
                    f"{name} of width {width} does not fit its tensor "
                    f"{tuple(weights[name].shape)} and scales {tuple(scale.shape)}"
                )
            found[name] = values, scale
        return found
    except (KeyError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"its quantized weights are incomplete ({error})") from error
