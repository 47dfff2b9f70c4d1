"""Records of optimizer steps, and the files in which skipped ones are reported."""

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor

logger = logging.getLogger(__name__)

LOG_NAME = "bad_steps.jsonl"
"""File in the run directory with one line per skipped step."""

BATCH_NAME = "bad_batch_step"
"""Prefix of the files with the last batches that a stopped run writes."""

NUM_SHOWN = 16
"""Maximum number of sample ids per process in a message; `LOG_NAME` contains all of them."""


@dataclass
class StepRecord:
    """What this process did in an optimizer step.

    Attributes:
        step: Number of the step, counted from 1.
        epoch: Epoch of the step, counted from 0.
        batches: Micro-batches of the step, with their indices in the epoch.
        losses: Loss of each micro-batch, as it was backpropagated.
    """

    step: int
    epoch: int
    batches: list[tuple[int, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def report(self, rank: int, scale: float, *, is_loss_bad: bool) -> dict[str, Any]:
        """Return the losses and sample ids of this process for the report of a skipped step: of the
        micro-batches whose loss is not finite or, if only the gradient is not, of all of them.

        Args:
            rank: Rank of this process.
            scale: Factor by which the losses were multiplied.
            is_loss_bad: Whether a loss of any process is not finite.
        """
        report: dict[str, Any] = {"rank": rank, "losses": [], "samples": []}
        losses = torch.stack(self.losses).tolist()
        for loss, (_, batch) in zip(losses, self.batches, strict=True):
            if not is_loss_bad or not math.isfinite(loss):
                report["losses"].append(f"{loss / scale:.6g}")
                report["samples"] += sample_ids(batch)
        return report

    def save(self, directory: Path, rank: int) -> None:
        """Write the micro-batches to a file for `replay`, atomically."""
        path = directory / f"{BATCH_NAME}_{self.step:08d}_rank_{rank}.pt"
        unfinished = path.with_name(f".{path.name}")
        content = {
            "step": self.step,
            "epoch": self.epoch,
            "rank": rank,
            "batch_indices": [number for number, _ in self.batches],
            "batches": [move_data_to_device(batch, "cpu") for _, batch in self.batches],
        }
        torch.save(content, unfinished)
        unfinished.replace(path)


def write_report(
    trainer: Trainer, step: int, reports: list[dict[str, Any]], *, num_in_a_row: int, kind: str
) -> None:
    """Report a skipped step in a warning and in `LOG_NAME`.

    Args:
        trainer: Trainer of the first process.
        step: Number of the step, counted from 1.
        reports: `StepRecord.report` of each process.
        num_in_a_row: Number of consecutive skipped steps.
        kind: What is not finite, `"loss"` or `"gradient"`.
    """
    reports = [each for each in reports if each["losses"]]
    logger.warning(
        f"step {step} skipped ({num_in_a_row} in a row): its {kind} is not finite; "
        f"{'; '.join(map(_summary, reports))}"
    )
    line = json.dumps({"step": step, "bad": kind, "processes": reports})
    path = Path(trainer.default_root_dir, LOG_NAME)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        logger.warning(f"could not write to {path}: {error}")


def sample_ids(batch: Any) -> list[int]:
    """Return the positions of the samples in their dataset; empty if the batch has none."""
    return batch["index"].tolist() if isinstance(batch, dict) and "index" in batch else []


def _summary(report: dict[str, Any]) -> str:
    """Format a process's losses and samples for a message."""
    samples = report["samples"]
    shown = ", ".join(map(str, samples[:NUM_SHOWN])) or "unknown"
    more = f" and {len(samples) - NUM_SHOWN} more" if len(samples) > NUM_SHOWN else ""
    return f"rank {report['rank']}: loss {', '.join(report['losses'])}, samples {shown}{more}"
