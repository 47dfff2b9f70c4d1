"""Tensors that follow from a module's settings."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """A tensor in float32 that goes where its module goes, but is neither trained nor saved.

    It keeps its precision in a module that is cast to half, and its values in one whose memory is
    made anew (`to_empty`).

    Args:
        values: in float32 on the CPU, whatever torch's default device.

    Attributes:
        value: the same on the module's device, or torch's default device at first.
    """

    value: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self._values = values
        device = torch.get_default_device()
        self.register_buffer("value", values.to(device, copy=True), persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Write the values anew."""
        self.value.copy_(self._values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Constant":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < 4 else moved

        super()._apply(move, recurse)
        self.reset_parameters()
        return self
