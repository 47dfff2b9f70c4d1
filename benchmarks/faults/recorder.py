"""A callback that records every batch, so that two runs can be compared batch by batch."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer


class Batch(NamedTuple):
    """A batch of one process: the indices of its samples, and the hash of all tensors."""

    step: int
    samples: tuple[int, ...]
    digest: str


class SampleRecorder(Callback):
    """Appends a line to `FOLDER/rank_R.jsonl` when training starts or resumes, and at every batch.

    Each line is a single write, so that a killed process leaves no incomplete lines.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._append(trainer, {"begins": trainer.global_step})

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        digest = hashlib.sha256()
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        self._append(
            trainer,
            {
                "place": [trainer.current_epoch, batch_idx],
                "step": trainer.global_step,
                "samples": batch["index"].tolist(),
                "digest": digest.hexdigest()[:16],
            },
        )

    def _append(self, trainer: Trainer, line: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = record_path(self.folder, trainer.global_rank)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, f"{json.dumps(line)}\n".encode())
        finally:
            os.close(descriptor)


class Record(NamedTuple):
    """The record of one process.

    Attributes:
        begun_at: Steps at which training started or resumed.
        batches: Batches by epoch and number; a repeated batch has several entries if they differ.
    """

    begun_at: list[int]
    batches: dict[tuple[int, int], set[Batch]]


def record_path(folder: Path, rank: int) -> Path:
    """The path of a process's record."""
    return folder / f"rank_{rank}.jsonl"


def read_record(folder: Path, rank: int) -> Record:
    """Read the record of a process."""
    record = Record([], {})
    path = record_path(folder, rank)
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if "begins" in line:
            record.begun_at.append(line["begins"])
        else:
            batch = Batch(line["step"], tuple(line["samples"]), line["digest"])
            record.batches.setdefault(tuple(line["place"]), set()).add(batch)
    return record
