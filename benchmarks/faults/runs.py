"""Tiny runs for fault injection, and the comparison of their results."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.faults.processes import Attempt
from benchmarks.faults.recorder import Record, read_record, record_path
from diffmm.checkpoint_folders import Checkpoint, checkpoints, fault, find_state
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.settings import load, override

NUM_STEPS = 40
SAVED_EVERY = 2
SECONDS_PER_RUN = 240.0
"""Time limit of a run in seconds; a run usually takes a few seconds."""

COMMON: dict[str, Any] = {
    "trainer.max_steps": NUM_STEPS,
    "trainer.val_check_interval": 9,
    "trainer.limit_val_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_model_summary": False,
    "trainer.enable_progress_bar": False,
    "trainer.callbacks": [
        {
            "class_path": "diffmm.training.Checkpoints",
            "init_args": {
                "dirpath": "${run_dir}/checkpoints",
                "monitor": "val/loss",
                "every_n_steps": SAVED_EVERY,
            },
        },
        {
            "class_path": "benchmarks.faults.recorder.SampleRecorder",
            "init_args": {"folder": "${run_dir}/../samples"},
        },
    ],
    "model.model.config.backbone.dropout": 0.1,
    "model.model.config.backbone.depth": 2,
}

MODALITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (
        "text/stdlib_tiny",
        {
            "vars.sequence_length": 32,
            "data.source": {"class_path": "datamodules.text.TextFolder"},
            "data.validation_fraction": 0.3,
            "data.batch_size": 4,
        },
    ),
    "stream": (
        "text/stdlib_tiny",
        {
            "vars.sequence_length": 32,
            "data.source": {"class_path": "datamodules.text.HuggingFaceText"},
            "data.validation_fraction": 0.3,
            "data.batch_size": 4,
            "data.stream_shares": 4,
        },
    ),
    "image": (
        "image/digits_tiny",
        {"data.batch_size": 100, "model.mixing": {"mixup_alpha": 0.5, "cutmix_alpha": 0.5}},
    ),
    "audio": (
        "audio/sound_events_tiny",
        {
            "data.source.num_clips": 128,
            "data.source.num_val_clips": 16,
            "data.batch_size": 8,
            "data.augment": {"gain_db": [-6, 6], "snr_db": [10, 20]},
        },
    ),
}
"""Recipes and overrides that make them tiny; all with dropout and augmentation."""


@dataclass(frozen=True)
class Run:
    """A run of one of `MODALITIES`, in a separate folder.

    Attributes:
        modality: Key of `MODALITIES`.
        folder: Folder of its recipe and its run directory.
        num_processes: Number of processes, which communicate through gloo.
        num_workers: Number of workers per process.
    """

    modality: str
    folder: Path
    num_processes: int = 1
    num_workers: int = 0

    @property
    def directory(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of the records; outside of the run directory, whose disk may be full."""
        return self.folder / "samples"

    @property
    def name(self) -> str:
        return f"{self.modality}, {self.num_processes} processes, {self.num_workers} workers"

    def write_recipe(self, **changes: Any) -> Path:
        """Write the recipe and its data."""
        recipe, settings = MODALITIES[self.modality]
        values = load([find_recipe(recipe)])
        several = {"trainer.devices": self.num_processes, "trainer.strategy": "ddp"}
        settings = {**COMMON, **settings, **(several if self.num_processes > 1 else {})}
        settings["data.num_workers"] = self.num_workers
        texts = write_texts(self.folder.parent / "texts")
        if self.modality == "text":
            settings["data.source.init_args.path"] = str(texts)
        elif self.modality == "stream":
            settings["data.source.init_args"] = {
                "name": "text",
                "data_files": str(texts / "*.txt"),
                "streaming": True,
                "shuffle_buffer": 5,
            }
        for key, value in {**settings, **changes}.items():
            override(values, key, value)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    def start(self, how: str = "auto") -> Attempt:
        """Start or resume the run with the same command (`auto`), or resume it (`resume`)."""
        arguments = ["fit", "--resume", str(self.directory), "--trust"]
        if how != "resume":
            arguments = ["fit", "--config", str(self.folder / "recipe.yaml")]
            arguments += ["--resume", "auto", "--run_dir", str(self.directory)]
        return Attempt(arguments, self.folder / "log.txt", self.num_processes)

    def whole(self) -> list[Checkpoint]:
        """Its complete checkpoints, oldest first."""
        return [found for found in checkpoints(self.checkpoints) if fault(found.path) is None]

    def records(self) -> list[Record]:
        """The record of each process."""
        return [read_record(self.samples, rank) for rank in range(self.num_processes)]

    def times_begun(self) -> int:
        """How often training has started or resumed."""
        return self._count("begins")

    def num_batches(self) -> int:
        """Number of batches so far, including repeated ones."""
        return self._count("place")

    def _count(self, key: str) -> int:
        path = record_path(self.samples, 0)
        return path.read_bytes().count(f'"{key}"'.encode()) if path.exists() else 0


def wait(attempt: Attempt, is_over: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds, the run has ended, or the time limit is reached."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not is_over() and attempt.is_running:
        time.sleep(0.002)


def finish(run: Run) -> None:
    """Run to the end without interruption.

    Raises:
        RuntimeError: If the run fails.
    """
    attempt = run.start()
    codes = attempt.wait(SECONDS_PER_RUN)
    if any(codes):
        raise RuntimeError(f"{run.name}: exit codes {codes}\n{attempt.printed}")


def differences(run: Run, whole: Run) -> list[str]:
    """Return the differences between an interrupted run and an uninterrupted one."""
    found = []
    state, expected = (
        torch.load(find_state(each.directory), weights_only=True) for each in (run, whole)
    )
    if state["global_step"] != expected["global_step"]:
        found.append(f"it ended at step {state['global_step']} of {expected['global_step']}")
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        if not same(state[part], expected[part]):
            found.append(f"its {part} has other values")
    for rank, (record, other) in enumerate(zip(run.records(), whole.records(), strict=True)):
        if record.batches.keys() != other.batches.keys():
            found.append(f"rank {rank} took other batches")
        elif record.batches != other.batches:
            wrong = [key for key in record.batches if record.batches[key] != other.batches[key]]
            found.append(f"rank {rank} took other samples in {len(wrong)} batches, from {wrong[0]}")
    return found


def same(value: Any, other: Any) -> bool:
    """Whether two states are bitwise equal."""
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(value, other)
    if isinstance(value, dict):
        keys = isinstance(other, dict) and value.keys() == other.keys()
        return keys and all(same(value[key], other[key]) for key in value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return len(value) == len(other) and all(map(same, value, other))
    return value == other


def write_texts(folder: Path) -> Path:
    """Write a small text corpus, and return its folder."""
    if not folder.exists():
        folder.mkdir(parents=True)
        for number in range(24):
            lines = (f"Line {line} of text {number}.\n" for line in range(12))
            (folder / f"{number}.txt").write_text("".join(lines))
    return folder
