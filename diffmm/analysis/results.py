"""What a run came to: the numbers of a table and the curves of a chart."""

from collections.abc import Sequence
from dataclasses import dataclass

Curve = list[tuple[float, float]]
"""`(step, value)`, in ascending order of steps."""


@dataclass(frozen=True)
class RunResult:
    """One trained model.

    Attributes:
        modality: what it was trained on, such as `text`.
        attention: a name in `diffmm.layers.ATTENTIONS`.
        recipe: that trained it.
        num_parameters: of the model.
        learning_rate: the peak.
        num_steps: optimizer steps.
        loss: on the validation data after the last step, in nats.
        metric_name: of the number that a reader would ask for: `accuracy` or `bits per byte`.
        metric: its value on the validation data after the last step, accuracy in [0, 1].
        seconds: from building the model to the last validation.
        train_curve: of the training loss.
        val_curve: of the validation loss.
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
        """The metric as it is written everywhere, accuracy in percent."""
        if self.metric_name == "accuracy":
            return f"{100.0 * self.metric:.1f}%"
        return f"{self.metric:.3f}"

    def row(self) -> dict[str, str | int | float]:
        """The numbers of the table, without the curves."""
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
    """All results as a table in plain text, words to the left and numbers to the right."""
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
