"""Lightning checkpoints as tensors and plain values: reading one never runs code from it."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(file: Path, *, weights: bool = True, optimizer: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, its tensors on the CPU and mapped: those that nobody looks at are
    not read.

    Args:
        file: The file, or a folder of shares (see `diffmm.models.sharded_states`).
        weights, optimizer: Whether to read these parts of shares.

    Raises:
        ValueError: naming the file, if it is not a complete Lightning checkpoint of tensors and
        plain values.
    """
    if file.is_dir():
        # Not earlier: it takes half a second.
        from diffmm.models.sharded_states import is_sharded_state, read_sharded_state

        if not is_sharded_state(file):
            raise ValueError(f"{file} is a folder, but not one of shares: it has no meta.pt")
        return read_sharded_state(file, weights=weights, optimizer=optimizer)
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is not a complete checkpoint of tensors and plain values: it is no archive, "
            f"as "
            f"torch.save writes them"
        )
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is not a complete checkpoint of tensors and plain values: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{file} is not a Lightning checkpoint: it has no state_dict")
    return checkpoint
