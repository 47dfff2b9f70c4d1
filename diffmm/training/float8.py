"""Linear layers in float8, by torchao."""

import torch
from torch import nn

from diffmm.models.parameters import block_matrices

LEAST_CAPABILITY = (8, 9)
"""The first compute capability of NVIDIA GPUs with matrix products in float8 (Ada, Hopper)."""

MULTIPLE = 16
"""Matrix products in float8 need widths that are multiples of this."""


def use_float8(model: nn.Module, device: torch.device) -> None:
    """Convert the linear layers inside the blocks of `model` in place, so that their matrix
    products run in float8, forward and backward, with one scale per tensor that is computed anew at
    every step (`torchao.float8.convert_to_float8_training`). The head and v2's `lambda_proj` are
    left as they are. Parameters keep their names, dtypes and identities.

    Args:
        model: Model of `diffmm.models`.
        device: Device on which it is trained.

    Raises:
        ValueError: If torchao is not installed, the device has no float8, or the model has no
            suitable layers.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ValueError(
            f"fp8=True needs torchao ({error}): install diffmm[fp8], or drop fp8"
        ) from error
    if capability(device) < LEAST_CAPABILITY:
        raise ValueError(
            f"fp8=True needs a GPU of compute capability 8.9 or later, got {name_of(device)}: drop "
            f"fp8"
        )
    names = {name.removesuffix(".weight") for name in block_matrices(model)}
    if not names:
        raise ValueError(
            f"fp8=True converts the linear layers inside blocks, and {type(model).__name__} has "
            f"none: drop fp8"
        )
    for name in sorted(names):
        shape = tuple(model.get_parameter(f"{name}.weight").shape)
        if any(size % MULTIPLE for size in shape):
            raise ValueError(
                f"fp8=True needs linear layers whose widths are multiples of {MULTIPLE}, but the "
                f"weight of {name} is {shape[0]} x {shape[1]}: change its widths, or drop fp8"
            )
    convert_to_float8_training(
        model,
        module_filter_fn=lambda module, name: name in names,
        # The number of tokens in a batch need not be a multiple.
        config=Float8LinearConfig(pad_inner_dim=True),
    )


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) for every other device."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


def name_of(device: torch.device) -> str:
    """A device's name for messages."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type}"
