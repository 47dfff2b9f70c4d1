"""The cells of the table: each is one training run, kept as it ends."""

import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.quality.engine import Data, Row, Run, append, cached_batches, read, tail_mean
from benchmarks.quality.plan import MOST_STEPS, Cell, Settings, pending
from benchmarks.quality.prepared import check_same_data, fingerprint, unpack
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.variants import overrides

NUM_POINTS = 6
"""Number of validations per cell, evenly spaced."""
CELLS = "cells"
"""Folder of results, with a file per task."""


def kept_in(out: Path, task: str) -> Path:
    """The file of a task's cells."""
    return out / CELLS / f"{task}.jsonl"


def read_cells(out: Path) -> list[Row]:
    """The rows of all tasks."""
    return [row for path in sorted((out / CELLS).glob("*.jsonl")) for row in read(path)]


class Bench:
    """Runs cells, keeping the batches of their tasks and seeds on the device.

    Args:
        data: Folder of prepared data.
        out: Folder of the results.
        settings: What the table is made of.
        equal_time: Whether cells of equal time are run, too, which have more steps. If not, cells
            may share the device, and their times are not compared.
        shared: Whether other processes use the device, so that times are not compared either.
    """

    def __init__(
        self,
        data: Path,
        out: Path,
        settings: Settings,
        *,
        equal_time: bool = True,
        shared: bool = False,
    ) -> None:
        self.data = data
        self.out = out
        self.settings = settings
        self.equal_time = equal_time
        self.shared = shared
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._held: dict[tuple[str, int], Data] = {}

    def make(self, cell: Cell) -> Run:
        """The untrained model of a cell."""
        spec = TASKS[cell.task]
        if cell.task == "text":
            unpack(self.data, self.out)
        of_task = spec.given(cell.size, self.data.resolve(), self.out.resolve())
        given = [
            *of_task,
            *overrides(cell.variant, spec.recipe, of_task, spec.backbones),
            f"--vars.learning_rate={cell.rate}",
            f"--vars.seed={cell.seed}",
            f"--vars.steps={cell.steps}",
            f"--model.schedule.warmup_steps={min(100, cell.steps // 6)}",
        ]
        if cell.task != "text" and cell.size == "full":
            given.append(f"--data.num_workers={min(8, os.cpu_count() or 1)}")
        return Run(spec.recipe, given, cell.steps, compile=cell.compiled)

    def batches(self, cell: Cell) -> Data:
        """The batches of a cell, which all variants of a task and seed share."""
        key = cell.task, cell.seed
        if key not in self._held:
            most = self.settings.num_steps(cell.task)
            if self.equal_time:  # faster variants take more steps in the same time
                most = int(MOST_STEPS * most) + 1
            of_data = fingerprint(self.data, cell.task) or "generated"
            name = f"{cell.task}_{cell.size}_{cell.seed}_{most}_{of_data}.pt"

            def make() -> Run:
                run = self.make(cell)
                run.num_steps = most
                return run

            self._held[key] = cached_batches(self.out / "batches" / name, make).to(self.device)
        return self._held[key]

    def forget(self, cells: Iterable[Cell]) -> None:
        """Free the batches that none of `cells` needs."""
        needed = {(cell.task, cell.seed) for cell in cells}
        self._held = {key: data for key, data in self._held.items() if key in needed}

    def training(self, cell: Cell) -> Generator[None, None, tuple[Run, Row]]:
        """Train a cell, stopping after each step; ends with its run and row."""
        kept = kept_in(self.out, cell.task)
        of_data = fingerprint(self.data, cell.task)
        check_same_data(read(kept), cell.task, of_data, kept)
        data = self.batches(cell)
        start = time.monotonic()
        run = self.make(cell)
        points = sorted({-(-cell.steps * part // NUM_POINTS) for part in range(1, NUM_POINTS + 1)})
        curve = yield from run.training(
            data, self.device, evaluate_at=points, captured=TASKS[cell.task].graph
        )
        last = {n: v for n, v in curve.points[-1].items() if n != "step"}
        row = {
            **asdict(cell),
            "data": of_data,
            **last,
            "train_loss": tail_mean(curve.losses),
            "parameters": run.num_parameters,
            "seconds_per_step": curve.seconds_per_step,
            "timed": self.equal_time and not self.shared,
            "points": curve.points,
            "wall_seconds": time.monotonic() - start,
            "device": device_name(self.device),
            "torch": torch.__version__,
        }
        return run, row


def device_name(device: str) -> str:
    """The name of the GPU, or `CPU` with the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread(s)"


def next_cells(
    rows: Sequence[Row],
    settings: Settings,
    pairs: Sequence[tuple[str, str]],
    *,
    equal_time: bool = True,
) -> list[Cell]:
    """The cells that can be run now: tasks in order, and seed by seed, so that variants of a seed
    follow each other."""
    cells = [
        cell
        for pair in pairs
        for cell in pending(rows, settings, *pair)
        if equal_time or cell.budget == "tokens"
    ]
    order = list(dict.fromkeys(task for task, _ in pairs))
    return sorted(
        cells, key=lambda cell: (order.index(cell.task), cell.budget != "tokens", cell.seed)
    )


def fill(
    bench: Bench,
    pairs: Sequence[tuple[str, str]],
    deadline: float,
    *,
    equal_time: bool = True,
    together: int = 1,
) -> Iterator[Row]:
    """Run cells until all are there or the time is over, `together` of them in turns; each row is
    kept as it ends."""
    running: dict[Cell, Generator[None, None, tuple[Run, Row]]] = {}
    while True:
        waiting = [
            cell
            for cell in next_cells(
                read_cells(bench.out), bench.settings, pairs, equal_time=equal_time
            )
            if cell not in running
        ]
        bench.forget([*running, *waiting[:1]])
        over = time.monotonic() >= deadline
        for cell in waiting[: 0 if over else together - len(running)]:
            running[cell] = bench.training(cell)
        if not running:
            if waiting:
                print(f"the time is over: {len(waiting)} cells or more are left", flush=True)
            return
        cell, row = first_end(running)
        del running[cell]
        append(kept_in(bench.out, cell.task), row)
        yield row


def first_end(running: dict[Cell, Generator[None, None, tuple[Run, Row]]]) -> tuple[Cell, Row]:
    """Take steps of all cells in turns until one of them has ended, and return it with its row."""
    while True:
        for cell, training in running.items():
            try:
                next(training)
            except StopIteration as end:
                return cell, end.value[1]
