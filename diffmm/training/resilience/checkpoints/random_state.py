"""The state of every random number generator that training draws from."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of this process's generators, as tensors and plain values.

    Args:
        device: Device whose generator is included, in addition to those of Python, NumPy and torch
            on the CPU.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore this process's generators from `state`.

    If the device is of another type than the saved one, its generator is seeded from the state.
    """
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cpu":
        return
    module = torch.get_device_module(device)
    current: Tensor = module.get_rng_state(device)
    saved = state.get("device")
    if saved is not None and saved.shape == current.shape:
        module.set_rng_state(saved, device)
    else:
        module.manual_seed(_number(state))


def branch_random_state(state: dict[str, Any], rank: int, device: torch.device) -> None:
    """Seed a process without a saved state from the state of another process and its own rank."""
    seed = _number(state) + rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _number(state: dict[str, Any]) -> int:
    digest = hashlib.sha256(state["torch"].numpy().tobytes()).digest()
    return int.from_bytes(digest[:7])
