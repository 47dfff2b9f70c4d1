"""Results of a run: the numbers of a table and the curves of a chart."""

from collections.abc import Sequence
from dataclasses import dataclass

Curve = list[tuple[float, float]]
"""Points `(step, value)` in ascending order of steps."""


@dataclass(frozen=True)
class RunResult:
    """The result of training one model.

    Attributes:
        modality: Modality of the data, such as `text`.
        attention: A name in `diffmm.layers.ATTENTIONS`.
        recipe: Name of the recipe.
        num_parameters: Number of parameters of the model.
        learning_rate: Peak learning rate.
        num_steps: Number of optimizer steps.
        loss: Validation loss after the last step, in nats.
        metric_name: Name of the main metric: `accuracy` or `bits per byte`.
        metric: Validation metric after the last step; accuracy is in [0, 1].
        seconds: Time from building the model to the last validation, in seconds.
        train_curve: Curve of the training loss.
        val_curve: Curve of the validation loss.
    """

    modality: str
    attention: str
    recipe: str
    num_parameters: int
    learning_rate: float
    num_steps: int
    loss: float
    metric_name: str
    metric: float
    seconds: float
    train_curve: Curve
    val_curve: Curve

    @property
    def metric_text(self) -> str:
        """The formatted metric, with accuracy in percent."""
        if self.metric_name == "accuracy":
            return f"{100.0 * self.metric:.1f}%"
        return f"{self.metric:.3f}"

    def row(self) -> dict[str, str | int | float]:
        """The numbers of the run, without the curves."""
        return {
            "modality": self.modality,
            "attention": self.attention,
            "recipe": self.recipe,
            "parameters": self.num_parameters,
            "learning_rate": self.learning_rate,
            "steps": self.num_steps,
            "loss": round(self.loss, 4),
            "metric": self.metric_name,
            "value": round(self.metric, 4),
            "seconds": round(self.seconds, 1),
        }


COLUMNS = (
    "modality",
    "attention",
    "parameters",
    "learning rate",
    "loss",
    "accuracy or bits per byte",
    "seconds",
)


def table(results: Sequence[RunResult]) -> str:
    """Format all results as a plain-text table."""
    rows = [COLUMNS] + [
        (
            run.modality,
            run.attention,
            f"{run.num_parameters:,}",
            f"{run.learning_rate:g}",
            f"{run.loss:.4f}",
            run.metric_text if run.metric_name == "accuracy" else f"{run.metric_text} bits",
            f"{run.seconds:.1f}",
        )
        for run in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])
