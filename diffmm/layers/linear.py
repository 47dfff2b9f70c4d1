"""Torch's layers with weights, which know how large their weights start."""

from typing import Any

from torch import nn


class Started(nn.Module):
    """What the layers of this file share.

    Attributes:
        init_std: standard deviation of the weights that `reset_parameters` draws from a normal
            distribution, cut off at -2 and 2, beside biases of zero. None leaves both to torch.
    """

    init_std: float | None = None
    weight: Any
    bias: Any

    def reset_parameters(self) -> None:
        """Start anew."""
        if self.init_std is None:
            super().reset_parameters()  # type: ignore[misc]
            return
        nn.init.trunc_normal_(self.weight, std=self.init_std)
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(self.bias)


class Linear(Started, nn.Linear):
    """`torch.nn.Linear`."""


class Embedding(Started, nn.Embedding):
    """`torch.nn.Embedding`."""


class Conv1d(Started, nn.Conv1d):
    """`torch.nn.Conv1d`."""


class Conv2d(Started, nn.Conv2d):
    """`torch.nn.Conv2d`."""
