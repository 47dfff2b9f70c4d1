"""Training of small models on small data, to compare attention variants and settings.

    python -m benchmarks.small_models [--tasks letters,digits] [--attentions softmax,diff_v1]
        [--settings plain,qk_norm+warmup_100] [--rates 1e-3,2e-3] [--seeds 0,1,2]
        [--letters DIR] [--out DIR]

A cell is one training run of a tiny recipe: a task, an attention, a setting made of `PARTS`, a peak
learning rate and a seed. Cells of one task and seed see the same samples in the same order. Each
result is appended to `OUT/cells.jsonl`, and cells in that file are not run again, so that a table
can be filled by several sessions and processes (`--part 0/4` runs every fourth cell). The table
shows, for each setting, the rate with the best mean over the seeds, and the results of all seeds
with it.

`--trace` prints statistics of the attention layers at steps 0, 10, 50 and 200 instead of the table
(see `Trace`). `--steps N` shortens the runs, for a quick test.

The task `letters` reads the folder that `benchmarks.letters` creates; the others need no files. On
a CUDA device, the step is one CUDA graph, because launching such small kernels takes longer than
running them.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.engine import (
    Batch,
    Data,
    Run,
    append,
    cached_batches,
    read,
    tail_mean,
)
from diffmm.layers.attention import Attention, DiffAttentionV1

Change = Callable[[nn.Module], None]

CONFIG = "--model.model.config."
LETTERS = (
    "--data.source={class_path: datamodules.image.ImageFolder, "
    "init_args: {train: LETTERS/train, val: LETTERS/val}}",
    "--data.channels=1",
    "--data.num_workers=2",
    "--data.transform={mean: [0.5], std: [0.25], crop_pct: 1.0, scale: [0.7, 1.0], "
    "ratio: [0.9, 1.1], hflip: 0.0, color_jitter: 0.0}",
    "--vars.image_size=24",
    "--vars.steps=900",
    "--model.schedule.warmup_steps=100",
    f"{CONFIG}patch_size=4",
    f"{CONFIG}num_classes=26",
)
LARGER = (
    "--trainer.precision=bf16-mixed",
    "--vars.steps=600",
    "--model.schedule.warmup_steps=100",
    "--vars.sequence_length=512",
    "--data.batch_size=32",
    f"{CONFIG}backbone.dim=512",
    f"{CONFIG}backbone.depth=8",
    f"{CONFIG}backbone.num_heads=16",
    f"{CONFIG}backbone.qk_norm=false",
    f"{CONFIG}backbone.init_std=0.02",
)
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "letters": ("image/digits_tiny", LETTERS),
    "digits": ("image/digits_tiny", ()),
    "text": ("text/stdlib_tiny", ()),
    "masked_text": ("text/stdlib_mlm_tiny", ()),
    "masked_digits": ("image/digits_mae_tiny", ()),
    "sounds": ("audio/sound_events_tiny", ()),
    "masked_sounds": ("audio/sound_events_mae_tiny", ()),
    "mixed_sounds": ("audio/sound_events_multilabel_tiny", ()),
    "text_25m": ("text/stdlib_tiny", LARGER),
}
"""Recipes and overrides, by task."""


def rescale(names: tuple[str, ...], std: float | None = None) -> Change:
    """Reinitialize the weights of the linear layers called `names` from a normal distribution of
    standard deviation `std`; by default, one over the square root of the number of inputs."""

    def change(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(names):
                deviation = module.in_features**-0.5 if std is None else std
                nn.init.trunc_normal_(
                    module.weight, std=deviation, b=2 * deviation, a=-2 * deviation
                )

    return change


def torch_default(model: nn.Module) -> None:
    """Reinitialize linear layers with torch's default standard deviation, one over the square root
    of three times the number of inputs; residual projections are still scaled down by depth."""
    blocks = sum(isinstance(module, Attention) for module in model.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            deviation = (3 * module.in_features) ** -0.5
            if name.endswith(("out_proj", "down_proj")):
                deviation *= (2 * blocks) ** -0.5
            nn.init.trunc_normal_(module.weight, std=deviation, b=2 * deviation, a=-2 * deviation)


def embedding_std(std: float) -> Change:
    """Reinitialize token embeddings (and a head that is tied to them)."""

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)

    return change


def fan_in_stem(model: nn.Module) -> None:
    """Reinitialize convolutions with a variance of one over the number of inputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)


def norm_eps(eps: float) -> Change:
    """Change the eps of the headwise norm."""

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, DiffAttentionV1) and module.norm is not None:
                module.norm.eps = eps

    return change


def norm_gain(gain: float | None) -> Change:
    """Change the initial weight of the headwise norm; by default, to the size of a new value."""

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, DiffAttentionV1) and module.norm is not None:
                projection = module.v_proj
                size = projection.weight.std().item() * projection.in_features**0.5
                nn.init.constant_(module.norm.weight, size if gain is None else gain)

    return change


BACKBONE = f"{CONFIG}backbone."
ROW = frozenset({"task", "attention", "setting", "rate", "seed"})
"""Names of what every row has."""
PARTS: dict[str, tuple[tuple[str, ...], Change | None]] = {
    "plain": ((), None),
    "former": (
        (
            f"{BACKBONE}qk_norm=false",
            f"{BACKBONE}init_std=0.02",
            "--model.schedule.warmup_steps=40",
        ),
        norm_gain(1.0),
    ),
    "qk_norm": ((f"{BACKBONE}qk_norm=true",), None),
    "qk_init": ((), rescale(("q_proj", "k_proj"))),
    "qkv_init": ((), rescale(("q_proj", "k_proj", "v_proj"))),
    "torch_init": ((), torch_default),
    "embedding_0.06": ((), embedding_std(0.06)),
    "embedding_0.1": ((), embedding_std(0.1)),
    "init_0.02": ((f"{BACKBONE}init_std=0.02",), None),
    "init_0.07": ((f"{BACKBONE}init_std=0.07",), None),
    "stem": ((), fan_in_stem),
    "zero_out": ((), rescale(("out_proj",), 1e-6)),
    "gain_0.1": ((), norm_gain(0.1)),
    "gain_1": ((), norm_gain(1.0)),
    "gain": ((), norm_gain(None)),
    "lambda_0.1": ((f"{BACKBONE}lambda_init=0.1",), None),
    "lambda_0.5": ((f"{BACKBONE}lambda_init=0.5",), None),
    "lambda_0.8": ((f"{BACKBONE}lambda_init=0.8",), None),
    "no_norm": ((f"{BACKBONE}headwise_norm=false",), None),
    "eps_0.01": ((), norm_eps(1e-2)),
    "warmup_100": (("--model.schedule.warmup_steps=100",), None),
    "warmup_200": (("--model.schedule.warmup_steps=200",), None),
    "heads_of_8": ((f"{BACKBONE}num_heads=8", f"{BACKBONE}head_dim=8"), None),
    "heads_of_32": ((f"{BACKBONE}head_dim=32",), None),
    "layernorm": ((f"{BACKBONE}norm=layernorm",), None),
    "layer_scale": ((f"{BACKBONE}layer_scale=0.1",), None),
}
"""Parts of a setting, joined by plus signs: overrides of the recipe, and changes that are applied
to the new model in this order. `former` is the previous default of the tiny recipes (see
docs/lab_notes.md, "A slow start")."""
ONLY_V1 = ("lambda", "no_norm", "eps", "gain")
"""Parts that only apply to v1; `gain` is the initial weight of its headwise norm."""


@dataclass(frozen=True)
class Cell:
    """One training run."""

    task: str
    attention: str
    setting: str
    rate: float
    seed: int


class SmallRun(Run):
    """The untrained model and the data of a recipe with the changes of a cell."""

    def __init__(self, cell: Cell, letters: Path, steps: int | None) -> None:
        recipe, changes = TASKS[cell.task]
        parts = [PARTS[part] for part in cell.setting.split("+")]
        given = [
            *(text.replace("LETTERS", str(letters)) for text in changes),
            f"--vars.attention={cell.attention}",
            f"--vars.learning_rate={cell.rate}",
            f"--vars.seed={cell.seed}",
            *(override for overrides, _ in parts for override in overrides),
        ]
        super().__init__(recipe, given, steps)
        for _, change in parts:
            if change is not None:
                change(self.task.model)


class Trace:
    """Prints statistics of all attention layers at a few steps of a run.

    Columns: the gradient norm of each projection; the root mean square of the heads, before the
    headwise norm in v1; the fraction of their energy that is common to all tokens of a sample, and
    that of the layer's whole output; the norm of the output relative to that of the residual
    stream; the standard deviation of the attention logits.
    """

    steps = (0, 10, 50, 200)

    def __init__(self, title: str) -> None:
        self.title = title
        print(
            f"{title:<28} step layer   q       k       v       out     heads   common  "
            f"out common  out/stream  logits"
        )

    def __call__(self, run: Run, step: int, batch: Batch) -> None:
        if step not in self.steps:
            return
        seen: dict[tuple[int, str], Tensor] = {}
        hooks = []
        layers = [m for m in run.task.model.modules() if isinstance(m, Attention)]
        for layer in layers:
            hooks += list(self._watch(layer, seen))
        run.task.model.zero_grad(set_to_none=True)
        run.loss(batch).backward()
        for hook in hooks:
            hook.remove()
        for layer in layers:
            index = layer.layer_index
            grads = [
                float(getattr(layer, f"{name}_proj").weight.grad.norm())
                for name in ("q", "k", "v", "out")
            ]
            heads, out, stream = (seen[index, name] for name in ("heads", "out", "stream"))
            print(
                f"{self.title:<28} {step:4d} {index:5d}   "
                + " ".join(f"{grad:.1e}" for grad in grads)
                + f" {float(heads.pow(2).mean().sqrt()):.1e} {common_share(heads):8.3f}"
                f" {common_share(out):10.3f} {float(out.norm() / stream.norm()):11.3f}"
                f" {float(seen[index, 'logits']):8.3f}"
            )
        run.task.model.zero_grad(set_to_none=True)

    def _watch(self, layer: Attention, seen: dict[tuple[int, str], Tensor]) -> Iterator[Any]:
        index = layer.layer_index

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[index, "heads"] = inputs[0].detach().flatten(2)

        def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[index, "out"] = output.detach()

        def project(x: Tensor, rope: Any) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = type(layer).project(layer, x, rope)
            first_q, first_k = q.flatten(2, -2)[:, :, 0], k.flatten(2, -2)[:, :, 0]
            seen[index, "logits"] = (first_q @ first_k.mT).detach().std() * layer.head_dim**-0.5
            seen[index, "stream"] = x.detach()
            return q, k, v

        norm = getattr(layer, "norm", None)
        yield (norm or layer.out_proj).register_forward_pre_hook(before)
        yield layer.register_forward_hook(after)
        layer.project = project  # type: ignore[method-assign]
        yield _Restore(layer)


class _Restore:
    def __init__(self, layer: Attention) -> None:
        self.layer = layer

    def remove(self) -> None:
        del self.layer.project


def common_share(x: Tensor) -> float:
    """The fraction of the energy of `[B, N, ...]` that is common to all tokens of a sample."""
    x = x.flatten(2)
    return float(x.mean(1).pow(2).sum() * x.shape[1] / x.pow(2).sum())


def run_cell(
    cell: Cell, data: Data, device: str, letters: Path, steps: int | None
) -> dict[str, Any]:
    """Train and evaluate a cell."""
    start = time.monotonic()
    run = SmallRun(cell, letters, steps)
    losses = run.train(data, device).losses
    metrics = run.evaluate(data)
    return {
        **asdict(cell),
        **{name: round(value, 5) for name, value in metrics.items()},
        "train_loss": round(tail_mean(losses), 5),
        "parameters": run.num_parameters,
        "seconds": round(time.monotonic() - start, 1),
    }


def headline(row: dict[str, Any]) -> float:
    """Accuracy or mean average precision in percent, or the loss."""
    for name in ("accuracy", "mean_average_precision"):
        if name in row:
            return float(100 * row[name])
    return float(row["loss"])


def table(rows: list[dict[str, Any]]) -> str:
    """Format one line per task, attention and setting: the best rate and its result per seed."""
    lines = [
        "| task | attention | setting | best rate | mean | seeds | other rates |",
        "|" + "---|" * 7,
    ]
    groups: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        key = (row["task"], row["attention"], row["setting"])
        groups.setdefault(key, {}).setdefault(row["rate"], []).append(headline(row))
    for (task, attention, setting), by_rate in sorted(groups.items()):
        means = {rate: statistics.mean(values) for rate, values in by_rate.items()}
        sign = -1 if task.startswith(("text", "masked")) else 1
        best = max(
            means, key=lambda rate: sign * means[rate] if math.isfinite(means[rate]) else -1e9
        )
        others = ", ".join(f"{r:g}: {m:.2f}" for r, m in sorted(means.items()) if r != best)
        seeds = " ".join(f"{value:.2f}" for value in by_rate[best])
        lines.append(
            f"| {task} | {attention} | {setting} | {best:g} | {means[best]:.2f} | {seeds} "
            f"| {others} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listed = {"tasks": "digits,text", "attentions": "softmax,diff_v1,diff_v2", "settings": "plain"}
    for name, default in {**listed, "rates": "1e-3,2e-3,4e-3,8e-3", "seeds": "0,1,2"}.items():
        parser.add_argument(f"--{name}", default=default, help="(default: %(default)s)")
    parser.add_argument("--letters", type=Path, default=Path("runs/letters"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("runs/small_models"), metavar="DIR")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every Nth cell from the Ith")
    parser.add_argument("--steps", type=int, metavar="N")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="make the batches and stop")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    cells = [
        Cell(task, attention, setting, float(rate), int(seed))
        for seed in options.seeds.split(",")
        for task in options.tasks.split(",")
        for setting in options.settings.split(",")
        for attention in options.attentions.split(",")
        for rate in options.rates.split(",")
        if attention == "diff_v1" or not any(name in setting for name in ONLY_V1)
    ]
    part, parts = map(int, options.part.split("/"))
    path = options.out / "cells.jsonl"
    done = read(path, ROW)
    data: dict[tuple[str, int], Data] = {}
    for cell in cells[part::parts]:
        if (
            any(all(row[k] == v for k, v in asdict(cell).items()) for row in done)
            and not options.trace
        ):
            continue
        key = (cell.task, cell.seed)
        if key not in data:
            data.clear()
            data[key] = batches(cell, options).to(device)
        if options.prepare:
            return
        if options.trace:
            run = SmallRun(cell, options.letters, options.steps)
            run.num_steps = min(run.num_steps, max(Trace.steps) + 1)
            title = f"{cell.task} {cell.attention} {cell.setting}"
            run.train(data[key], device, watch=Trace(title))
            continue
        row = run_cell(cell, data[key], device, options.letters, options.steps)
        print(json.dumps(row), flush=True)
        append(path, row)
    if not options.trace:
        print(table(read(path, ROW)))


def batches(cell: Cell, options: argparse.Namespace) -> Data:
    """The batches of all cells of a task and seed, cached in the output folder."""
    path: Path = options.out / f"batches_{cell.task}_{cell.seed}_{options.steps}.pt"
    return cached_batches(path, lambda: SmallRun(cell, options.letters, options.steps))


if __name__ == "__main__":
    main()
