"""Torch's layers with weights, which know how large their weights start."""

from typing import Any

from torch import nn

INIT_STD = 0.02
"""Standard deviation of weights at the start, where a config gives no other."""


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


class Conv3d(Started, nn.Conv3d):
    """`torch.nn.Conv3d`."""


PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose `weight` starts at a size of its own and takes weight decay."""


def init_weights(module: nn.Module, std: float) -> None:
    """Start a projection or an embedding with weights of this size and biases of zero; leave every
    other module as it is. The layers of this file then start so at each `reset_parameters`."""
    if isinstance(module, Started):
        module.init_std = std
        module.reset_parameters()
    elif isinstance(module, (*PROJECTIONS, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std)
        bias: Any = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
