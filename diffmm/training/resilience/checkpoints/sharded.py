"""Sharded checkpoints, of which every process writes its own shard (FSDP2, tensor parallelism)."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch.distributed.tensor import DTensor

from diffmm import checkpoint_folders
from diffmm.checkpoint_folders import STATE_NAME
from diffmm.training.resilience.checkpoints.exact import gather
from diffmm.training.resilience.checkpoints.snapshot import num_bytes, snapshot
from diffmm.training.resilience.checkpoints.writer import SaveFailedError, failed

TENSORS = ("state_dict", "optimizer_states")
"""Entries of a state that are sharded."""


def is_sharded(state: dict[str, Any]) -> bool:
    """Whether the weights in the state are sharded over processes."""
    return any(isinstance(tensor, DTensor) for tensor in state["state_dict"].values())


def write_sharded(
    trainer: Trainer, directory: Path, state: dict[str, Any], facts: dict[str, Any]
) -> Path | SaveFailedError:
    """Write a checkpoint on all processes together, and return its folder or the error."""
    needed = num_bytes(state)  # in total: a sharded tensor counts with its global size
    plain = snapshot({key: value for key, value in state.items() if key not in TENSORS})
    shares = {key: state[key] for key in TENSORS if key in state}
    unfinished: Path | None = None
    error: Exception | None = None
    hashes: dict[str, tuple[int, str]] = {}
    if trainer.is_global_zero:
        try:
            unfinished = checkpoint_folders.start(directory, facts["step"])
        except OSError as refused:
            error = refused
    unfinished = trainer.strategy.broadcast(unfinished)
    if unfinished is not None:
        try:
            trainer.strategy.save_checkpoint({**plain, **shares}, unfinished / STATE_NAME)
            # Each process hashes its own files, so that none has to read the whole checkpoint.
            own = sorted((unfinished / STATE_NAME).glob(f"__{trainer.global_rank}_*"))
            hashes = {f"{STATE_NAME}/{file.name}": checkpoint_folders.measure(file) for file in own}
        except Exception as refused:
            error = refused
    results = gather(trainer, (error and (str(error) or type(error).__name__), hashes))
    failures = [failure for failure, _ in results if failure]
    hashes = {name: found for _, files in results for name, found in files.items()}
    outcome: Path | SaveFailedError | None = None
    if trainer.is_global_zero:
        try:
            if failures or unfinished is None:
                raise OSError(failures[0])
            outcome = checkpoint_folders.finish(unfinished, facts, hashes)
        except OSError as refused:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
            outcome = failed(directory, facts["step"], needed, refused)
    return trainer.strategy.broadcast(outcome)  # type: ignore[return-value]
