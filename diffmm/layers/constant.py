"""Constant tensors that are derived from a module's settings."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """A float32 tensor that moves with its module but is neither trained nor saved.

    It stays in float32 when the module is cast to half precision, and keeps its values when the
    module's memory is reallocated by `to_empty`. If the module was created on the meta device and
    gets its weights by `load_state_dict(assign=True)`, it gets its values on the CPU.

    Args:
        values: A float32 tensor on the CPU, independent of torch's default device.

    Attributes:
        value: The values on the module's device; initially on torch's default device.
    """

    value: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self._values = values
        device = torch.get_default_device()
        self.register_buffer("value", values.to(device, copy=True), persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Restore the values."""
        self.value.copy_(self._values)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *others: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
        if local_metadata.get("assign_to_params_buffers") and self.value.is_meta:
            self.value = self._values.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Constant":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < 4 else moved

        super()._apply(move, recurse)
        self.reset_parameters()
        return self
