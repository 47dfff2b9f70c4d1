"""Copies of a training state that are independent of further training."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.Size, torch.device)

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def snapshot(state: Any, name: str = "checkpoint", *, copy: bool = True) -> Any:
    """Copy `state` to tensors on the CPU and plain values.

    Tensors that share memory (tied weights) still share it in the copy.

    Args:
        state: Dicts, lists and tuples of tensors and plain values.
        name: Name of the state, for error messages.
        copy: Whether to copy tensors that are already on the CPU. If not, they are shared with
            training.

    Raises:
        ValueError: If a value could not be loaded without running code from the file; the message
            names it.
    """
    return _snapshot(state, name, copy, {})


def _snapshot(value: Any, name: str, copy: bool, seen: dict[tuple[Any, ...], Tensor]) -> Any:
    if isinstance(value, Tensor):
        if not copy and value.device.type == "cpu":
            return value.detach()
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.device)
        key = (*place, value.shape, value.stride(), value.dtype)
        if key not in seen or not value.numel():
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        return {key: _snapshot(item, f"{name}[{key!r}]", copy, seen) for key, item in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        items = [_snapshot(item, f"{name}[{i}]", copy, seen) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PLAIN):
        return value
    raise ValueError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot contain: checkpoints hold "
        f"only tensors and plain values, so that loading runs no code. Convert it to one of these"
    )


def num_bytes(state: Any) -> int:
    """Return the number of bytes of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(num_bytes, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(num_bytes, state))
    return 0


def available_bytes() -> int | None:
    """Return the memory available to this process, in bytes; `None` if it is unknown."""
    found = []
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError, KeyError, ValueError):
        # The limit of a container. Its file cache can be reclaimed.
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(counts["inactive_file"]))
    return min(found, default=None)
