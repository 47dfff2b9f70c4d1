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
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffmm.layers.attention import Attention, DiffAttentionV1
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.settings import load
from diffmm.recipes.trainer import RecipeCLI
from diffmm.training.optimizer import parameter_groups

Batch = dict[str, Tensor]
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
    f"{CONFIG}patch_size=4",
    f"{CONFIG}num_classes=26",
)
LARGER = (
    "--trainer.precision=bf16-mixed",
    "--vars.steps=600",
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


@dataclass
class Data:
    """All training batches of a run, `[steps, B, ...]` per field, and its validation batches."""

    train: Batch
    val: list[Batch]

    def to(self, device: str) -> "Data":
        train = {name: value.to(device) for name, value in self.train.items()}
        return Data(train, [{n: v.to(device) for n, v in batch.items()} for batch in self.val])


class SmallRun:
    """The untrained model and the data of a recipe with the changes of a cell."""

    def __init__(self, cell: Cell, letters: Path, steps: int | None) -> None:
        recipe, changes = TASKS[cell.task]
        parts = [PARTS[part] for part in cell.setting.split("+")]
        given = [
            *(text.replace("LETTERS", str(letters)) for text in changes),
            f"--vars.attention={cell.attention}",
            f"--vars.learning_rate={cell.rate}",
            f"--vars.seed={cell.seed}",
            "--trainer.logger=false",
            f"--trainer.accelerator={'gpu' if torch.cuda.is_available() else 'cpu'}",
            "--trainer.callbacks=null",
            "--trainer.enable_checkpointing=false",
            *(override for overrides, _ in parts for override in overrides),
        ]
        with tempfile.TemporaryDirectory() as run_dir:
            values = {**load([find_recipe(recipe)], given), "run_dir": run_dir}
            cli: Any = RecipeCLI(values)
        self.task, self.data, self.trainer = cli.model, cli.datamodule, cli.trainer
        for _, change in parts:
            if change is not None:
                change(self.task.model)
        self.num_steps: int = steps or self.trainer.max_steps

    def collect(self) -> Data:
        """Load the training batches, in order, and the validation batches."""
        self.data.prepare_data()
        self.data.setup("fit")
        batches: list[Batch] = []
        loader = self.data.train_dataloader()
        for epoch in range(self.num_steps):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                batches.append(batch)
                if len(batches) == self.num_steps:
                    train = {k: stacked([b[k] for b in batches]) for k in batch}
                    limit = self.trainer.limit_val_batches
                    val = list(self.data.val_dataloader())
                    return Data(train, val[:limit] if isinstance(limit, int) else val)
        raise AssertionError("an epoch without batches")

    def loss(self, batch: Batch) -> Tensor:
        """The training loss of a batch."""
        loss: Tensor = self.task.training_loss(batch, 0)
        return loss

    def optimizer(self, device: str) -> torch.optim.AdamW:
        config = self.task.optimizer_config
        groups = parameter_groups(self.task.model, config)
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
        cuda = device == "cuda"
        return torch.optim.AdamW(
            groups, betas=config.betas, eps=config.eps, fused=cuda or None, capturable=cuda
        )

    def train(self, data: Data, device: str, trace: "Trace | None" = None) -> list[float]:
        """Train with the recipe's gradient clipping, and return the losses of all steps."""
        model = self.task.model.to(device).train()
        optimizer = self.optimizer(device)
        peaks = [float(group["lr"]) for group in optimizer.param_groups]
        batch = {name: value[0].clone() for name, value in data.train.items()}
        losses = torch.zeros(self.num_steps, device=device)
        graph, loss = None, torch.zeros((), device=device)

        def step() -> Tensor:
            with self.trainer.precision_plugin.forward_context():
                loss = self.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), self.trainer.gradient_clip_val)
            optimizer.step()
            return loss.detach()

        for number in range(self.num_steps):
            for name, value in data.train.items():
                batch[name].copy_(value[number])
            factor = self.task.schedule_config.factor(number)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"].fill_(peak * factor)
            if trace is not None and number in trace.steps:
                trace.look(number, self, batch)
            if graph is not None:
                graph.replay()
            elif device == "cuda" and trace is None and number == 3:
                # After three steps, all memory is allocated and the optimizer has its state.
                optimizer.zero_grad(set_to_none=True)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    loss = step()
                graph.replay()
            elif device == "cuda":
                # Graph capture requires warmup steps on another stream.
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    optimizer.zero_grad(set_to_none=True)
                    loss = step()
                torch.cuda.current_stream().wait_stream(side)
            else:
                optimizer.zero_grad(set_to_none=True)
                loss = step()
            losses[number] = loss
        return losses.tolist()

    @torch.no_grad()
    def evaluate(self, data: Data) -> dict[str, float]:
        """Return the task's validation metrics."""
        self.task.model.eval()
        metrics: dict[str, Any] = self.task.make_metrics()
        for metric in metrics.values():
            metric.to(next(self.task.model.parameters()).device)
        for batch in data.val:
            with self.trainer.precision_plugin.forward_context():
                self.task.update_metrics(batch, metrics)
        return {name: float(metric.compute()) for name, metric in metrics.items()}


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack batches; waveforms are padded with zeros to the longest clip."""
    if tensors[0].ndim != 2 or not tensors[0].is_floating_point():
        return torch.stack(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.stack([pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors])


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

    def look(self, step: int, run: SmallRun, batch: Batch) -> None:
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
    losses = run.train(data, device)
    metrics = run.evaluate(data)
    tail = losses[-max(1, len(losses) // 20) :]
    return {
        **asdict(cell),
        **{name: round(value, 5) for name, value in metrics.items()},
        "train_loss": round(sum(tail) / len(tail), 5),
        "parameters": sum(p.numel() for p in run.task.model.parameters()),
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
    done = read(path)
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
            run.train(data[key], device, Trace(f"{cell.task} {cell.attention} {cell.setting}"))
            continue
        row = run_cell(cell, data[key], device, options.letters, options.steps)
        print(json.dumps(row), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if not options.trace:
        print(table(read(path)))


def batches(cell: Cell, options: argparse.Namespace) -> Data:
    """The batches of all cells of a task and seed, cached in the output folder."""
    path: Path = options.out / f"batches_{cell.task}_{cell.seed}_{options.steps}.pt"
    if not path.exists():
        data = SmallRun(cell, options.letters, options.steps).collect()
        unfinished = path.with_suffix(f".{os.getpid()}")  # other processes may read `path`
        torch.save(asdict(data), unfinished)
        unfinished.replace(path)
    return Data(**torch.load(path))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
