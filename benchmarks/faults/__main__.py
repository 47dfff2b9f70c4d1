"""Injects faults into runs and counts those that they survive.

    python -m benchmarks.faults [--quick] [--seed 0] [--out FOLDER] [--only kills ...]

Kills and signals are sent to real runs of tiny recipes in separate processes. Their final weights,
optimizer state and every batch must be bitwise identical to those of an uninterrupted run. Exits
with 1 if anything was lost. Takes about six minutes on two cores; `--quick` takes one.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults import damage, disk, kills, mutations, neighbours, signals, strangers
from benchmarks.faults.runs import MODALITIES, Run, finish
from benchmarks.faults.tally import Fault, save, table


class Bench:
    """Uninterrupted runs, which are trained at their first use, and new runs to inject faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: dict[tuple[str, int], Run] = {}
        self._count = 0

    def whole(self, modality: str, num_processes: int) -> Run:
        key = (modality, num_processes)
        if key not in self._whole:
            run = Run(modality, self.folder / f"whole_{modality}_{num_processes}", num_processes)
            run.write_recipe()
            finish(run)
            self._whole[key] = run
        return self._whole[key]

    def new(self, modality: str, num_processes: int = 1, num_workers: int = 0) -> Run:
        self._count += 1
        folder = self.folder / f"run_{self._count:03d}"
        run = Run(modality, folder, num_processes, num_workers)
        run.write_recipe()
        return run

    def copy(self, modality: str) -> Run:
        """A finished run that may be changed."""
        self._count += 1
        run = Run(modality, self.folder / f"run_{self._count:03d}")
        shutil.copytree(self.whole(modality, 1).folder, run.folder)
        return run


def injected_kills(bench: Bench, rng: random.Random, quick: bool) -> Iterator[Fault]:
    for modality in MODALITIES:
        for num_processes in (1, 2):
            for num_workers in (0, 2):
                if quick and (modality, num_processes, num_workers) != ("text", 1, 0):
                    continue
                whole = bench.whole(modality, num_processes)
                run = bench.new(modality, num_processes, num_workers)
                yield from kills.break_run(run, whole, rng, num_kills=3)


def injected_signals(bench: Bench, rng: random.Random, quick: bool) -> Iterator[Fault]:
    cases = (("text", 2, 0), ("image", 2, 2), ("audio", 1, 2), ("stream", 1, 0))
    for modality, num_processes, num_workers in cases[-1:] if quick else cases:
        run = bench.new(modality, num_processes, num_workers)
        yield from signals.stop_run(run, bench.whole(modality, num_processes), rng)


def injected_damage(bench: Bench, rng: random.Random, quick: bool) -> Iterator[Fault]:
    for way in damage.WAYS:
        count = 50 if way == "bytes flipped" else 15
        whole = bench.whole("text", 1)
        yield from damage.damage_checkpoints(whole, way, count, bench.folder / "damaged", rng)
    for way in damage.WAYS:
        modality = rng.choice(list(MODALITIES))
        if not quick:
            yield damage.resume_damaged(bench.new(modality), bench.whole(modality, 1), way, rng)


def injected_full_disks(bench: Bench, rng: random.Random, quick: bool) -> Iterator[Fault]:
    for modality in ("text",) if quick else ("text", "image"):
        yield disk.full_for_good(bench.new(modality), bench.whole(modality, 1))
        if not quick:
            yield disk.full_for_a_while(bench.new(modality), bench.whole(modality, 1))


def injected_mutations(bench: Bench, rng: random.Random, quick: bool) -> Iterator[Fault]:
    for recipe, _ in list(MODALITIES.values())[: 1 if quick else None]:
        count = 10 if quick else 60
        yield from mutations.mutate_recipes(recipe, count, bench.folder, rng)
        yield from mutations.mutate_text(recipe, count, bench.folder, rng)
    run = bench.copy("text")
    yield from mutations.mutate_states(run, 8 if quick else 60, rng)


def injected_neighbours(bench: Bench, rng: random.Random, quick: bool) -> Iterator[Fault]:
    whole = bench.whole("text", 1)
    for how in ("auto",) if quick else ("auto", "resume"):
        yield neighbours.second_process(bench.new("text"), whole, how)
    for change in list(neighbours.CHANGES)[: 1 if quick else None]:
        yield neighbours.changed_data(bench.new("text"), whole, change, rng)


def injected_strangers(bench: Bench, rng: random.Random, quick: bool) -> Iterator[Fault]:
    yield from strangers.pipes(bench.whole("text", 1), bench.folder / "strangers")
    yield from strangers.lies(bench.folder / "strangers")
    yield from strangers.sealed_lies(bench.whole("text", 1), bench.folder / "strangers")


PARTS = {
    "kills": injected_kills,
    "signals": injected_signals,
    "damage": injected_damage,
    "disks": injected_full_disks,
    "neighbours": injected_neighbours,
    "strangers": injected_strangers,
    "mutations": injected_mutations,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Injects faults into runs.")
    parser.add_argument("--quick", action="store_true", help="a selection that takes one minute")
    parser.add_argument("--seed", type=int, default=0, help="seed of times and places of faults")
    parser.add_argument("--out", type=Path, help="folder for faults.json and temporary files")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    faults: list[Fault] = []
    start = time.monotonic()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        bench = Bench(Path(folder))
        for name in options.only:
            for fault in PARTS[name](bench, random.Random(f"{options.seed} {name}"), options.quick):
                faults.append(fault)
                print(
                    f"{time.monotonic() - start:6.0f} s  {fault.kind}: {fault.where}"
                    f"{f'  LOST: {fault.lost}' if fault.lost else ''}",
                    flush=True,
                )
    print(f"\n{table(faults)}")
    if options.out is not None:
        save(faults, options.out / "faults.json")
    return int(any(fault.lost for fault in faults))


if __name__ == "__main__":
    sys.exit(main())
