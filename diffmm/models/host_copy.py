"""Copies from a device to the host that do not wait for the device."""

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host; on the CPU, the tensor itself.

    Args:
        tensor: Tensor on any device. Its copy begins when the device has computed it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = tensor.to("cpu", non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def wait(self) -> Tensor:
        """Wait for the copy, and return it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensor
