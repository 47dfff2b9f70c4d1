"""Throughput of a recipe's data loader without the model, and whether training waits for it.

    python -m benchmarks.data [RECIPE ...] [--workers 0,1,2,4] [--needed SAMPLES_PER_SECOND]

For each recipe (a file or a name; by default all tiny ones), the training data loader alone is
read with each number of workers, for `--seconds` after its workers have started. Its rate is
compared with the rate at which the model trains on this machine, with steps of the recipe's batch
size on a single batch in memory. `--needed` gives that rate for a model that trains on another
machine, in samples per second of one process; a recipe for a GPU needs it on a machine without one.

Waiting is the fraction of a training step spent waiting for data: without workers, loading and
training alternate; with workers, they overlap. (On a CPU they also share its cores, which is not
taken into account.)
"""

import argparse
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import lightning
import torch
from torch.utils._pytree import tree_map

from diffmm.recipes.catalog import find_recipe, recipe_names
from diffmm.recipes.memory import plain_trainer
from diffmm.recipes.out_of_memory import setting_key
from diffmm.recipes.references import resolve
from diffmm.recipes.settings import load, override
from diffmm.recipes.trainer import RecipeCLI

ONE_DEVICE = {
    "trainer.accelerator": "auto",
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
    "trainer.precision": "32-true",
}
"""Settings of a trainer that can be created on any machine; it does not train."""


class Rate(NamedTuple):
    """Throughput of a data loader, per second."""

    samples: float
    tokens: float
    mebibytes: float

    @property
    def volume(self) -> str:
        """The rate in tokens for text, and in bytes for other data."""
        if self.tokens:
            return f"{self.tokens:,.0f} tokens/s"
        return f"{self.mebibytes:,.1f} MiB/s"


def batches(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Iterate over the batches of successive epochs."""
    for epoch in count():
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        yield from loader


def loading_rate(loader: Any, *, seconds: float) -> Rate:
    """The steady rate of a loader, measured after startup and the first prefetched batches."""
    stream = batches(loader)
    for _ in range(1 + loader.num_workers * (loader.prefetch_factor or 0)):
        next(stream)
    samples = tokens = num_bytes = 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        batch = next(stream)
        samples += len(batch["index"])
        tokens += batch["tokens"].numel() if "tokens" in batch else 0
        num_bytes += sum(tensor.nbytes for tensor in batch.values())
    return Rate(samples / passed, tokens / passed, num_bytes / passed / 2**20)


def training_rate(
    task: Any, batch: dict[str, torch.Tensor], *, half: bool, seconds: float
) -> float:
    """Samples per second of training steps on one batch: forward, backward and optimizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task.trainer = plain_trainer()
    task.to(device).train()
    optimizer = task.configure_optimizers()["optimizer"]
    batch = tree_map(lambda tensor: tensor.to(device), batch)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = task.training_loss(batch, 0)
        loss.backward()
        optimizer.step()

    return len(batch["index"]) * _rate(step, seconds, device)


def _rate(step: Callable[[], None], seconds: float, device: torch.device) -> float:
    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(3):
        step()
    start, steps = wait(), 0
    while time.perf_counter() - start < seconds:
        step()
        steps += 1
    return steps / (wait() - start)


def waiting(loaded: float, needed: float, *, num_workers: int) -> float:
    """The fraction of a step spent waiting for data, from both rates in samples per second."""
    if num_workers == 0:
        return needed / (needed + loaded)
    return max(0.0, 1 - loaded / needed)


def verdict(rates: dict[int, Rate], needed: float) -> str:
    """Describe whether the data or the model is the bottleneck, and with how many workers."""
    enough = [number for number, rate in rates.items() if number > 0 and rate.samples >= needed]
    idle = min(waiting(rate.samples, needed, num_workers=n) for n, rate in rates.items())
    if 0 in rates and waiting(rates[0].samples, needed, num_workers=0) < 0.1:
        return "the model is the bottleneck, even without workers"
    if enough:
        return f"the model is the bottleneck with num_workers {min(enough)} or more"
    best = max(rates, key=lambda number: rates[number].samples)
    return (
        f"the data is the bottleneck: at best {rates[best].samples / needed:.2f} of what the model "
        f"takes ({best} workers), {idle:.0%} of the time is waiting"
    )


def measure(
    recipe: str, *, workers: Sequence[int], needed: float | None, seconds: float
) -> tuple[dict[int, Rate], float | None]:
    """Return the loading rate per number of workers, and the rate at which the model trains."""
    values = {**load([find_recipe(recipe)]), "run_dir": "runs"}
    resolved = resolve(values)[0]["trainer"]
    for key, value in ONE_DEVICE.items():
        override(values, setting_key(values, key), value)
    cli = RecipeCLI(values)
    data: Any = cli.datamodule
    data.trainer = None  # as one process
    data.prepare_data()
    data.setup("fit")
    rates, batch = {}, None
    for number in workers:
        data.num_workers = number
        loader = data.train_dataloader()
        rates[number] = loading_rate(loader, seconds=seconds)
        batch = batch or next(iter(loader))
    trains_here = resolved.get("accelerator") == "cpu" or torch.cuda.is_available()
    if needed is None and batch is not None and trains_here:
        half = "16" in str(resolved.get("precision"))
        needed = training_rate(cli.model, batch, half=half, seconds=seconds)
    return rates, needed


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, one line per recipe and number of workers, and a verdict per recipe."""
    parser = argparse.ArgumentParser(description="Throughput of a recipe's data loader.")
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="all tiny ones by default")
    parser.add_argument("--workers", default="0,1,2,4", help="numbers of workers, comma-separated")
    parser.add_argument("--needed", type=float, help="samples per second that the model trains on")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement")
    options = parser.parse_args(arguments)
    workers = [int(number) for number in options.workers.split(",")]
    if options.needed is not None and options.needed <= 0:
        parser.error(f"--needed must be positive, got {options.needed}")

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) per "
        f"process, torch {torch.__version__}, lightning {lightning.__version__}"
    )
    print(f"\n{'recipe':34} {'workers':>7} {'samples/s':>10} {'volume':>18} {'waiting':>8}")
    for recipe in options.recipes or [name for name in recipe_names() if name.endswith("_tiny")]:
        rates, needed = measure(
            recipe, workers=workers, needed=options.needed, seconds=options.seconds
        )
        for number, rate in rates.items():
            wait = needed and waiting(rate.samples, needed, num_workers=number)
            share = "" if wait is None else f"{wait:.0%}"
            print(
                f"{recipe:34} {number:7} {rate.samples:10,.0f} {rate.volume:>18} {share:>8}",
                flush=True,
            )
        if needed is None:
            print(f"{'':34} the model is for a GPU: give --needed")
        else:
            print(f"{'':34} the model takes {needed:,.0f} samples/s: {verdict(rates, needed)}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    main()
