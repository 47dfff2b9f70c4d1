"""Lightning checkpoints as tensors and plain values: reading one never runs code from it."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(file: Path) -> dict[str, Any]:
    """What a checkpoint holds, its tensors on the CPU and mapped: those that nobody looks at are
    not read.

    Raises:
        ValueError: naming the file, if it is not a whole Lightning checkpoint of tensors and plain
            values.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is not a whole checkpoint of tensors and plain values: it is no archive, as "
            f"torch.save writes them"
        )
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is not a whole checkpoint of tensors and plain values: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{file} is not a Lightning checkpoint: it has no state_dict")
    return checkpoint
