"""Weights of the table's best twins, with model cards that carry their numbers."""

from pathlib import Path

from benchmarks.quality.engine import Row
from benchmarks.quality.table import Line
from benchmarks.quality.tasks import TASKS
from diffmm.models.weights import save_model

SAME = 1e-3
"""Largest relative difference of a metric to that of the cell, which other kernels may cause."""


def best_seed(line: Line) -> int:
    """The seed with the best metric."""
    sign = TASKS[line.task].sign
    return max(line.values, key=lambda seed: sign * line.values[seed])


def save(folder: Path, task: object, line: Line, row: Row, again: dict[str, float]) -> Path:
    """Save a trained task's model and its card.

    Args:
        folder: Folder to create, with `model.safetensors` and `README.md`.
        task: The trained task.
        line: Line of the table.
        row: Cell of the weights.
        again: Metrics of the weights, measured now.
    """
    path = save_model(task.model, folder)  # type: ignore[attr-defined]
    (folder / "README.md").write_text(card(line, row, again), encoding="utf-8")
    return path


def card(line: Line, row: Row, again: dict[str, float]) -> str:
    """The model card: what was trained, its numbers and how to load it."""
    spec = TASKS[line.task]
    digits = spec.num_shown
    unit = "nats per token" if spec.metric == "loss" else "percent"
    scale = spec.unit
    what = f"{spec.title}, " if spec.over_training else ""
    seeds = ", ".join(f"{value:.{digits}f} (seed {seed})" for seed, value in line.values.items())
    text = [
        "---",
        "library_name: diffmm",
        "license: apache-2.0",
        f"tags: [differential-attention, {row['variant']}]",
        "---",
        "",
        f"# {row['variant']} on {row['task']}",
        "",
        f"Trained from scratch by `python -m benchmarks.quality` for a comparison of attention "
        f"variants: recipe `{spec.recipe}`, {row['steps']:,} steps, learning rate {row['rate']:g}, "
        f"seed {row['seed']}, {row['parameters']:,} parameters. It is the best of "
        f"{len(line.values)} seeds, chosen by the metric below, and made for measurements, not for "
        f"use.",
        "",
        f"| validation {spec.metric} ({unit}) | |",
        "|---|---|",
        f"| these weights | {scale * again[spec.metric]:.{digits}f} |",
        f"| their cell of the table | {scale * row[spec.metric]:.{digits}f} |",
        f"| {what}mean over seeds | {line.mean:.{digits}f} |",
        f"| {what}every seed | {seeds} |",
    ]
    if line.mean_difference is not None and line.half_width is not None:
        text.append(
            f"| paired difference to softmax, 95 % interval | {line.mean_difference:+.{digits}f} ± "
            f"{line.half_width:.{digits}f} ({line.verdict}) |"
        )
    text += [
        "",
        f"Trained on {row['device']} with torch {row['torch']}.",
        "",
        "```python",
        "import diffmm",
        "",
        'trained = diffmm.load("model.safetensors")',
        "```",
        "",
    ]
    return "\n".join(text)
