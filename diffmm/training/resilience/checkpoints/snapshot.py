"""A copy of a training state, which training then no longer changes."""

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
    """`state` in tensors on the CPU and plain values, of which nothing is shared with training.

    Tensors that are one (tied weights) stay one.

    Args:
        state: dicts, lists and tuples of tensors and plain values.
        name: of the state, for the message.
        copy: tensors that are on the CPU already are copied; otherwise they are taken as they are.

    Raises:
        ValueError: naming a value that could not be loaded without running code from the file.
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
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: it is loaded as "
        f"tensors and plain values only, so that no code in it can run. Keep it as such"
    )


def num_bytes(state: Any) -> int:
    """Bytes of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(num_bytes, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(num_bytes, state))
    return 0


def available_bytes() -> int | None:
    """Memory that this process could still take; `None` where the system does not tell."""
    found = []
    with suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError, KeyError, ValueError):
        # Within a container; what it has cached of files can be given up.
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(counts["inactive_file"]))
    return min(found, default=None)
