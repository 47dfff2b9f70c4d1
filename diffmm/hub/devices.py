"""Devices by their names."""

import torch

from diffmm.checks import reason_of


def find_device(name: str | torch.device) -> torch.device:
    """The device of this name; `"auto"` is the accelerator, if there is one.

    Raises:
        ValueError: If the device does not exist.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(name)!r} is not available: {reason_of(error)}") from error
    return torch.device(name)
