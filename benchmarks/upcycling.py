"""Fine-tuning of upcycled models beside that of the softmax models they come from.

    python -m benchmarks.upcycling [--tasks text,fashion_mnist] [--data DATA] [--out DIR]
        [--variants softmax,diff_v1,naive_v1] [--seeds 0,1,2] [--minutes M] [--compile]
        [--size tiny]
    python -m benchmarks.upcycling --table [--out DIR]

For each task of `benchmarks.quality` and each seed, a softmax model is trained with the learning
rate `RATES[task]`. It is then trained further on new samples, as it is and upcycled
(`diffmm.interop.upcycle`), for a third of the steps with a new warmup and schedule. All models of a
seed start with the same outputs and see the same samples in the same order. The learning rate of
each is that of the best metric with the first seed among `FACTORS` times the rate of the first
training. Softmax models have a key head per four query heads, so that all attentions can follow.
The variants `naive_v1` and `naive_v2` are what upcycling replaces: differential models into which
every softmax weight of the same meaning is copied, while all else is initialized as usual.

Each run is appended to `OUT/upcycling.jsonl` as it ends, and not repeated. The table has the metric
of each seed, and the mean paired difference to fine-tuned softmax with its 95 % interval.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.engine import Data, Row, Run, append, cached_batches, read
from benchmarks.quality.prepared import check_same_data, fingerprint, unpack
from benchmarks.quality.tasks import BACKBONE, TASKS, Size
from benchmarks.quality.variants import SIGNAL_PER_NOISE, softmax_backbone
from diffmm.interop.upcycle import TARGETS, upcycle
from diffmm.models.weights import load_model, save_model
from diffmm.runs.seeds import half_width

SOFTMAX = "softmax"
VARIANTS = (SOFTMAX, *TARGETS)
NAIVE = {"naive_v1": "diff_v1", "naive_v2": "diff_v2"}
RATES = {"text": 2e-3, "fashion_mnist": 2e-3, "letters": 2e-3, "speech": 2e-3, "digits": 4e-3}
"""Learning rates of the first training."""

FACTORS = (0.1, 0.3, 1.0)
ROWS = "upcycling.jsonl"
NUM_POINTS = 4


class Bench:
    """Runs of one task.

    Args:
        task: Name of the task.
        size: Size of the models.
        data: Folder of prepared data.
        out: Folder of the results.
        compile: Whether models are compiled.
    """

    def __init__(self, task: str, size: Size, data: Path, out: Path, *, compile: bool) -> None:
        self.task, self.size, self.out, self.compile = task, size, out, compile
        self.spec = TASKS[task]
        self.folder = data.resolve()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.steps = self.spec.steps[size]
        self.more = max(1, self.steps // 3)
        self.fingerprint = fingerprint(self.folder, task)
        self.name = f"{task}_{size}_{self.fingerprint or 'generated'}"

    def make(self, seed: int, rate: float, steps: int) -> Run:
        """An untrained softmax model with a schedule of `steps`."""
        if self.task == "text":
            unpack(self.folder, self.out)
        given = self.spec.given(self.size, self.folder, self.out.resolve())
        num_heads = softmax_backbone(self.spec.recipe, given).num_heads
        settings = [
            *given,
            "--vars.attention=softmax",
            f"{BACKBONE}num_kv_heads={max(1, num_heads // SIGNAL_PER_NOISE)}",
            f"--vars.learning_rate={rate}",
            f"--vars.seed={seed}",
            f"--vars.steps={steps}",
            f"--model.schedule.warmup_steps={min(100, steps // 6)}",
        ]
        return Run(self.spec.recipe, settings, steps, compile=False)

    def batches(self, seed: int) -> Data:
        """The batches of both trainings."""
        total = self.steps + self.more
        path = self.out / "batches" / f"upcycling_{self.name}_{seed}_{total}.pt"
        rate = RATES[self.task]
        return cached_batches(path, lambda: self.make(seed, rate, total)).to(self.device)

    def base(self, seed: int, data: Data) -> Path:
        """The weights of the softmax model, trained if they do not exist."""
        path = self.out / "weights" / f"{self.name}_{seed}.safetensors"
        if not path.exists():
            run = self.make(seed, RATES[self.task], self.steps)
            if self.compile:
                run.compile()
            run.train(data, self.device)
            save_model(run.task.model.cpu(), path)
        return path

    def tune(self, seed: int, variant: str, factor: float) -> Row:
        """Train the model of a seed further."""
        data = self.batches(seed)
        model: nn.Module = load_model(self.base(seed, data))
        if variant in NAIVE:
            model = copied(model, NAIVE[variant], seed=seed)
        elif variant != SOFTMAX:
            model = upcycle(model, variant, signal_per_noise=SIGNAL_PER_NOISE, seed=seed)
        run = self.make(seed, factor * RATES[self.task], self.more)
        run.task.model = model
        later = Data({name: value[self.steps :] for name, value in data.train.items()}, data.val)
        model.to(self.device)
        before = run.evaluate(later)
        if self.compile:
            run.compile()
        points = sorted({-(-self.more * part // NUM_POINTS) for part in range(1, NUM_POINTS + 1)})
        curve = run.train(later, self.device, evaluate_at=points)
        return {
            "task": self.task,
            "size": self.size,
            "seed": seed,
            "variant": variant,
            "factor": factor,
            "data": self.fingerprint,
            "before": before[self.spec.metric],
            "metric": curve.points[-1][self.spec.metric],
            "points": curve.points,
            "seconds_per_step": curve.seconds_per_step,
            "parameters": run.num_parameters,
        }


def copied(model: Any, attention: str, *, seed: int) -> nn.Module:
    """A differential model with the softmax model's weights where both have them.

    The queries of the first maps of `diff_v2` are those of softmax. An odd number of key heads, of
    which `diff_v1` makes pairs, is doubled.
    """
    config = model.config.backbone
    head_dim, kv_heads = config.resolved_head_dim, config.num_kv_heads or config.num_heads
    copies = 2 if attention == "diff_v1" and kv_heads % 2 else 1
    backbone = replace(
        config,
        attention=attention,
        num_kv_heads=copies * kv_heads,
        feed_forward_width=config.resolved_feed_forward_width,
    )
    torch.manual_seed(seed)
    new = type(model)(replace(model.config, backbone=backbone))
    weights = new.state_dict()
    for name, tensor in model.state_dict().items():
        if weights[name].shape == tensor.shape:
            weights[name] = tensor
        elif "q_proj" in name:
            first = weights[name].unflatten(0, (-1, 2, head_dim))
            first[:, 0] = tensor.unflatten(0, (-1, head_dim))
        else:
            heads = tensor.unflatten(0, (-1, head_dim)).repeat_interleave(copies, dim=0)
            weights[name] = heads.flatten(0, 1)
    new.load_state_dict(weights)
    return new.eval()


def best_factor(rows: Sequence[Row], task: str, variant: str, seed: int) -> float | None:
    """The factor with the best metric of a seed; None before all have been run."""
    found = {row["factor"]: row["metric"] for row in rows_of(rows, task, variant, seed)}
    if set(found) < set(FACTORS):
        return None
    sign = TASKS[task].sign
    return max(found, key=lambda factor: sign * found[factor])


def rows_of(rows: Sequence[Row], task: str, variant: str, seed: int) -> list[Row]:
    wanted = {"task": task, "variant": variant, "seed": seed}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def pending(
    rows: Sequence[Row], task: str, seeds: Sequence[int], variants: Sequence[str] = VARIANTS
) -> list[tuple[int, str, float]]:
    """The runs of a task that can be made now, as `(seed, variant, factor)`."""
    left = []
    for variant in variants:
        best = best_factor(rows, task, variant, seeds[0])
        for seed in seeds:
            factors = FACTORS if seed == seeds[0] else () if best is None else (best,)
            done = {row["factor"] for row in rows_of(rows, task, variant, seed)}
            left += [(seed, variant, factor) for factor in factors if factor not in done]
    return sorted(left, key=lambda run: run[0])


def table(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """The results as Markdown."""
    lines = [
        "| task | attention | rate | before | after, by seed | mean | difference to softmax |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        values: dict[str, dict[int, float]] = {}
        for variant in (*VARIANTS, *NAIVE):
            best = best_factor(rows, task, variant, seeds[0])
            own = [
                row
                for seed in seeds
                for row in rows_of(rows, task, variant, seed)
                if row["factor"] == best
            ]
            if best is None or not own:
                continue
            found = values[variant] = {row["seed"]: row["metric"] for row in own}
            before = statistics.fmean(row["before"] for row in own)
            lines.append(
                f"| {task} | {variant} | {best:g} | {before:.4f} | "
                f"{', '.join(f'{value:.4f}' for value in found.values())} | "
                f"{statistics.fmean(found.values()):.4f} | {difference(found, values[SOFTMAX])} |"
            )
    return "\n".join(lines)


def difference(found: dict[int, float], softmax: dict[int, float]) -> str:
    """The mean paired difference with half of its interval."""
    pairs = [value - softmax[seed] for seed, value in found.items() if seed in softmax]
    if found is softmax or not pairs:
        return ""
    half = half_width(pairs)
    return f"{statistics.fmean(pairs):+.4f}" + ("" if half is None else f" ± {half:.4f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.upcycling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tasks", default="text,fashion_mnist,speech", help="(default: %(default)s)"
    )
    parser.add_argument("--variants", default=",".join(VARIANTS), help="(default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/quality"), metavar="DATA")
    parser.add_argument("--out", type=Path, default=Path("runs/upcycling"), metavar="DIR")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no run after this time")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument("--table", action="store_true", help="print the table")
    options = parser.parse_args(arguments)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    path = options.out / ROWS
    if options.table:
        print(table(read(path), seeds))
        return
    tasks = options.tasks.split(",")
    for task in tasks:
        if task not in RATES:
            parser.error(f"--tasks: {task!r} is not one of {', '.join(RATES)}")
    variants = options.variants.split(",")
    for variant in variants:
        if variant not in (*VARIANTS, *NAIVE):
            parser.error(f"--variants: {variant!r} is not one of {', '.join((*VARIANTS, *NAIVE))}")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    for task in tasks:
        bench = Bench(task, options.size, options.data, options.out, compile=options.compile)
        check_same_data(read(path), task, bench.fingerprint, path)
        while left := pending(read(path), task, seeds, variants):
            if time.monotonic() >= deadline:
                print(f"the time is over: {len(left)} runs or more are left", flush=True)
                return
            row = bench.tune(*left[0])
            append(path, row)
            print(
                f"{task} {row['variant']} rate x {row['factor']:g} seed {row['seed']}: "
                f"{row['before']:.4f} to {row['metric']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
