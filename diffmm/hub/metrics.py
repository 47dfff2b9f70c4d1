"""The metrics of a trained model, from the logs of its run."""

import re
from pathlib import Path

from diffmm.recipes.errors import InputError
from diffmm.runs.directories import config_around
from diffmm.runs.metrics import read_curves

EVALUATIONS = ("val/", "test/")
"""Prefixes of the metrics of evaluations."""

STEP = re.compile(r"step_(\d+)")


def metrics_at(origin: str) -> dict[str, float]:
    """The last values of all evaluation metrics that a run had logged when it wrote a checkpoint,
    by name; empty for a file that is not a checkpoint of a run.

    Args:
        origin: The path of the checkpoint's state.

    Raises:
        ValueError: If a file of metrics cannot be read; the message names it.
    """
    file = Path(origin)
    config = config_around(file)
    step = STEP.fullmatch(file.parent.name)
    if config is None or step is None:
        return {}
    try:
        curves = read_curves(config.parent)
    except InputError as error:
        raise ValueError(f"{error}; repair or remove it, or give the metrics yourself") from error
    found: dict[str, float] = {}
    for name, curve in sorted(curves.items()):
        values = [value for at, value in curve if at <= int(step[1])]
        if name.startswith(EVALUATIONS) and values:
            found[name] = values[-1]
    return found
