"""Training of one cell of a table: the model, the data and the optimizer of a recipe.

A cell is one training run of a recipe with overrides. Its batches are loaded first and kept on the
device, so that all cells of a task and seed see the same samples in the same order, and no cell
waits for data. On a CUDA device, the step is one CUDA graph, because launching the kernels of small
models takes longer than running them.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffmm.batch import inputs_of
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.settings import load
from diffmm.recipes.trainer import RecipeCLI
from diffmm.training.optimizer import parameter_groups
from diffmm.training.writing import Writing

Batch = dict[str, Tensor]
Row = dict[str, Any]
Watch = Callable[["Run", int, Batch], None]
"""Called before each step with the run, the number of the step and its batch."""
Training = Generator[None, None, "Curve"]
"""A training that stops after each step, and ends with its result."""
Result = TypeVar("Result")

IDENTITY = frozenset({"task", "size", "variant", "seed"})
"""Names of what every row has."""

WARMUP_STEPS = 3
"""Steps after which all memory is allocated and the optimizer has its state."""


@dataclass
class Data:
    """All training batches of a run, `[steps, B, ...]` per field, and its validation batches."""

    train: Batch
    val: list[Batch]

    def to(self, device: str) -> "Data":
        train = {name: value.to(device) for name, value in self.train.items()}
        return Data(train, [{n: v.to(device) for n, v in batch.items()} for batch in self.val])


@dataclass(frozen=True)
class Curve:
    """The result of training.

    Attributes:
        losses: Training loss of every step.
        points: Validation metrics, each with its `step`.
        seconds_per_step: Mean time of a step after the first few, so that it contains neither
            evaluation nor compilation; 0 if there were only a few steps.
    """

    losses: list[float]
    points: list[dict[str, float]]
    seconds_per_step: float


class Run:
    """The untrained model and the data of a recipe with overrides.

    Args:
        recipe: Name or file of the recipe.
        overrides: Settings of the recipe, as on the command line.
        steps: Number of steps, if not the recipe's.
        compile: Whether to compile the model.
    """

    def __init__(
        self,
        recipe: str,
        overrides: Iterable[str],
        steps: int | None = None,
        *,
        compile: bool = False,
    ) -> None:
        given = [
            *overrides,
            "--trainer.logger=false",
            f"--trainer.accelerator={'gpu' if torch.cuda.is_available() else 'cpu'}",
            "--trainer.callbacks=null",
            "--trainer.enable_checkpointing=false",
        ]
        with tempfile.TemporaryDirectory() as run_dir:
            values = {**load([find_recipe(recipe)], given), "run_dir": run_dir}
            cli: Any = RecipeCLI(values)
        self.task, self.data, self.trainer = cli.model, cli.datamodule, cli.trainer
        self.task.trainer = self.trainer
        if isinstance(self.task, Writing):
            self.task.job = self.task.make_job(self.data)  # names the tokenizer
        self.num_steps: int = steps or self.trainer.max_steps
        if compile:
            self.compile()

    def compile(self) -> None:
        """Compile the model."""
        torch._dynamo.reset()  # the models of earlier runs count against its limit
        self.task.model.compile()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.task.model.parameters())

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
        """The recipe's AdamW, with rates in tensors that a CUDA graph reads in every step."""
        config = self.task.optimizer_config
        groups = parameter_groups(self.task.model, config)
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
        cuda = device == "cuda"
        return torch.optim.AdamW(
            groups, betas=config.betas, eps=config.eps, fused=cuda or None, capturable=cuda
        )

    def train(
        self,
        data: Data,
        device: str,
        *,
        watch: Watch | None = None,
        evaluate_at: Sequence[int] = (),
    ) -> Curve:
        """Train with the recipe's gradient clipping and schedule.

        Args:
            data: Batches on `device`, at least `num_steps` for training.
            device: `"cpu"` or `"cuda"`.
            watch: Called before each step; the steps are then not a CUDA graph.
            evaluate_at: Numbers of steps after which the validation metrics are measured.
        """
        return finish(self.training(data, device, watch=watch, evaluate_at=evaluate_at))

    def training(
        self,
        data: Data,
        device: str,
        *,
        watch: Watch | None = None,
        evaluate_at: Sequence[int] = (),
        captured: bool = True,
    ) -> Training:
        """`train` as a generator that stops after each step, so that several runs can take turns.
        Each has a CUDA stream of its own, where its kernels run beside those of the others. Only if
        `captured` is the step a CUDA graph; otherwise the model is one, and the loss is not."""
        model = self.task.model.to(device).train()
        optimizer = self.optimizer(device)
        peaks = [float(group["lr"]) for group in optimizer.param_groups]
        batch = {name: value[0].clone() for name, value in data.train.items()}
        losses = torch.zeros(self.num_steps, device=device)
        graph, loss = None, torch.zeros((), device=device)
        points: list[dict[str, float]] = []
        # Graph capture requires warmup steps on another stream than the default one.
        stream = torch.cuda.Stream() if device == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        in_graphs = stream is not None and watch is None
        if in_graphs and not captured:
            with torch.cuda.stream(stream):
                inputs = inputs_of(model, batch)
                torch.cuda.make_graphed_callables(model, inputs, allow_unused_input=True)
        clock = _Clock(stream)

        def step() -> Tensor:
            with self.trainer.precision_plugin.forward_context():
                loss = self.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), self.trainer.gradient_clip_val)
            optimizer.step()
            self.task.after_step()
            return loss.detach()

        for number in range(self.num_steps):
            with torch.cuda.stream(stream):  # does nothing for `None`
                if number == WARMUP_STEPS + 1:
                    clock.start()
                for name, value in data.train.items():
                    batch[name].copy_(value[number])
                factor = self.task.schedule_config.factor(number)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"].fill_(peak * factor)
                if watch is not None:
                    watch(self, number, batch)
                if graph is not None:
                    graph.replay()
                elif in_graphs and captured and number == WARMUP_STEPS:
                    optimizer.zero_grad(set_to_none=True)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=stream):
                        loss = step()
                    graph.replay()
                else:
                    optimizer.zero_grad(set_to_none=True)
                    loss = step()
                losses[number] = loss
                if number + 1 in evaluate_at:
                    clock.stop()
                    points.append({"step": number + 1, **self.evaluate(data)})
                    model.train()
                    if number >= WARMUP_STEPS:
                        clock.start()
            yield
        clock.stop()
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        rate = clock.seconds / max(1, self.num_steps - WARMUP_STEPS - 1)
        return Curve(losses.tolist(), points, rate)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def evaluate(self, data: Data) -> dict[str, float]:
        """Return the task's validation metrics, computed without compilation."""
        self.task.model.eval()
        self.task.on_validation_epoch_start()
        metrics: dict[str, Any] = self.task.make_metrics()
        for metric in metrics.values():
            metric.to(next(self.task.model.parameters()).device)
        for batch in data.val:
            with self.trainer.precision_plugin.forward_context():
                self.task.update_metrics(batch, metrics)
        found: dict[str, float] = {}
        for name, metric in metrics.items():
            if name not in self.task.unmeasured:
                value = metric.compute()
                values = value if isinstance(value, dict) else {name: value}
                found |= {each: float(number) for each, number in values.items()}
        return found


def finish(training: Generator[None, None, Result]) -> Result:
    """The result of a training, after all of its steps."""
    while True:
        try:
            next(training)
        except StopIteration as end:
            result: Result = end.value
            return result


class _Clock:
    """Adds up the time between `start` and `stop`, each after all work on a CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.seconds = 0.0
        self._began: float | None = None

    def _now(self) -> float:
        if self.stream is not None:
            self.stream.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        if self._began is not None:
            self.seconds += self._now() - self._began
        self._began = None


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack batches; waveforms are padded with zeros to the longest clip."""
    if tensors[0].ndim != 2 or not tensors[0].is_floating_point():
        return torch.stack(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.stack([pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors])


def cached_batches(path: Path, make: Callable[[], Run]) -> Data:
    """The batches of a run, read from `path` or collected and written to it."""
    if not path.exists():
        data = make().collect()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # other processes may read `path`
        torch.save(asdict(data), unfinished)
        unfinished.replace(path)
    return Data(**torch.load(path))


def tail_mean(losses: Sequence[float]) -> float:
    """The mean of the last twentieth of the losses."""
    tail = losses[-max(1, len(losses) // 20) :]
    return sum(tail) / len(tail)


def rounded(value: Any) -> Any:
    """A value of JSON, with nine significant digits of numbers that are no integers: all that
    float32 has."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return value


def append(path: Path, row: Row) -> None:
    """Append a row to a file of JSON lines, in one write, so that processes can share it."""
    line = json.dumps(rounded(row), separators=(",", ":")) + "\n"
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        line = f"\n{line}"  # after a line that was cut off
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def read(path: Path, names: Set[str] = IDENTITY) -> list[Row]:
    """The rows of a file of JSON lines. Lines without the `names`, such as one that was cut off,
    are left out with a warning."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else [], 1):
        row = None
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
        if isinstance(row, dict) and row.keys() >= names:
            rows.append(row)
        elif line:
            print(f"{path}, line {number} is not a complete run: left out", file=sys.stderr)
    return rows
