"""One run of the demo, trained as by `diffmm fit`, with a line of progress."""

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from diffmm.analysis.results import Curve, RunResult
from diffmm.cli.demo import Modality
from diffmm.recipes.trainer import RecipeCLI
from diffmm.runs.saving import ConfigSaver

POINTS = 40
"""Number of points of a training curve."""


class Run(NamedTuple):
    """A trained model with its datamodule and the result of its run."""

    model: Any
    data: Any
    result: RunResult


def train(modality: Modality, values: dict[str, Any], run_dir: Path, progress: str) -> Run:
    """Fit a recipe.

    Args:
        modality: Modality of the recipe.
        values: Values of the recipe, from `diffmm.recipes.settings.load`.
        run_dir: Directory of the run.
        progress: Start of the progress line.
    """
    attention = values["vars"]["attention"]
    start = time.monotonic()
    recorder = RunRecorder(f"{progress} {modality.name:<5}  {attention:<7}")
    with quiet():
        cli: Any = RecipeCLI({**_without_progress_bar(values), "run_dir": str(run_dir)})
        cli.trainer.callbacks[:0] = [ConfigSaver(run_dir, "", values), recorder]
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        if recorder.validated_at != cli.trainer.global_step:
            cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    result = RunResult(
        modality=modality.name,
        attention=attention,
        recipe=modality.recipe,
        num_parameters=sum(p.numel() for p in cli.model.model.parameters()),
        learning_rate=cli.model.optimizer_config.learning_rate,
        num_steps=cli.trainer.global_step,
        loss=metrics["val/loss"],
        metric_name=modality.metric_name,
        metric=metrics[modality.metric],
        seconds=time.monotonic() - start,
        train_curve=means(recorder.losses, POINTS),
        val_curve=recorder.val_curve,
    )
    metric = f"{result.metric_text} {result.metric_name}"
    recorder.show(f"loss {result.loss:.4f}  {metric:<18}  {result.seconds:5.1f} s", last=True)
    return Run(cli.model.model, cli.datamodule, result)


class RunRecorder(Callback):
    """Records the losses of a run, and shows its progress on one line that a terminal updates.

    Args:
        label: Start of the progress line.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.losses: list[float] = []
        self.val_curve: Curve = []
        self.shown_at = 0.0

    @property
    def validated_at(self) -> float | None:
        """Step of the last validation."""
        return self.val_curve[-1][0] if self.val_curve else None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        if time.monotonic() - self.shown_at > 0.5:
            step = f"{trainer.global_step}/{trainer.max_steps}"
            self.show(f"step {step:>9}  training loss {self.losses[-1]:.3f}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.val_curve.append(
                (trainer.global_step, float(trainer.callback_metrics["val/loss"]))
            )

    def show(self, text: str, *, last: bool = False) -> None:
        """Show `text` after the label. If the output is not a terminal, show only the last one."""
        self.shown_at = time.monotonic()
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{self.label}  {text}", end="\n" if last else "", flush=True)
        elif last:
            print(f"{self.label}  {text}", flush=True)


def means(losses: list[float], num_points: int) -> Curve:
    """Average the losses of steps 1, 2, ... over about `num_points` spans, each at its last
    step."""
    span = max(1, len(losses) // num_points)
    return [
        (float(end), sum(losses[end - span : end]) / span)
        for end in range(span, len(losses) + 1, span)
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Lightning's notes and hints on devices, workers and similar."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _without_progress_bar(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the progress bar from a recipe, because the demo shows its own progress line."""
    trainer = values["trainer"]
    callbacks = [c for c in trainer["callbacks"] if "ProgressBar" not in c["class_path"]]
    own = {"enable_progress_bar": False, "enable_model_summary": False, "callbacks": callbacks}
    return {**values, "trainer": {**trainer, **own}}
