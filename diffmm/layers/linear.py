"""torch's layers with weights, with a configurable standard deviation of the initial weights."""

from typing import Any

from torch import Tensor, nn

INIT_STD = 0.02
"""Default standard deviation of initial weights."""


def draw_normal(tensor: Tensor, std: float) -> None:
    """Fill a tensor with draws from a normal distribution with this standard deviation, truncated
    to [-2, 2]. On the meta device there is nothing to fill, and torch takes milliseconds for it."""
    if not tensor.is_meta:
        nn.init.trunc_normal_(tensor, std=std)


class Started(nn.Module):
    """Mixin for the layers of this file: their initialization.

    Attributes:
        init_std: If set, `reset_parameters` draws weights from a normal distribution with this
            standard deviation, truncated to [-2, 2], and sets biases to zero. None uses torch's
            default initialization.
    """

    init_std: float | None = None
    weight: Any
    bias: Any

    def reset_parameters(self) -> None:
        """Initialize the weight and the bias."""
        if self.init_std is None:
            super().reset_parameters()  # type: ignore[misc]
            return
        draw_normal(self.weight, self.init_std)
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


class Conv3d(Started, nn.Conv3d):
    """`torch.nn.Conv3d`."""


PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose `weight` is initialized by `init_weights` and has weight decay."""


def init_weights(module: nn.Module, std: float) -> None:
    """Initialize a projection or an embedding with weights of this standard deviation and biases
    of zero; leave other modules unchanged. The layers of this file keep the standard deviation
    for each later `reset_parameters`."""
    if isinstance(module, Started):
        module.init_std = std
        module.reset_parameters()
    elif isinstance(module, (*PROJECTIONS, nn.Embedding)):
        draw_normal(module.weight, std)
        bias: Any = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
