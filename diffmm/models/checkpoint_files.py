"""Reads Lightning checkpoints as tensors and plain values, without running code from the file."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from diffmm.checks import reason_of


def read_checkpoint(file: Path, *, weights: bool = True, optimizer: bool = False) -> dict[str, Any]:
    """Read a checkpoint, with its tensors on the CPU and memory-mapped, so that only the tensors in
    use are read from the disk.

    Args:
        file: Path of the file, or of a sharded checkpoint (see `diffmm.models.sharded_states`).
        weights, optimizer: Whether to read these parts of a sharded checkpoint.

    Raises:
        ValueError: If it is not a complete Lightning checkpoint of tensors and plain values; the
            message names the file.
    """
    if file.is_dir():
        # Imported here because the import takes half a second.
        from diffmm.models.sharded_states import is_sharded_state, read_sharded_state

        if not is_sharded_state(file):
            raise ValueError(f"{file} is not a sharded checkpoint: it has no meta.pt")
        return read_sharded_state(file, weights=weights, optimizer=optimizer)
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is not a complete checkpoint of tensors and plain values: it is not an "
            f"archive written by torch.save"
        )
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is not a complete checkpoint of tensors and plain values: {reason_of(error)}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{file} is not a Lightning checkpoint: it has no state_dict")
    return checkpoint
