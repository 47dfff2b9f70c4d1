"""Evaluation mode: required, or for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def check_evaluation(model: nn.Module, action: str) -> None:
    """Check that a model is in evaluation mode: dropout would make its results random.

    Args:
        model: The model.
        action: What is to be done with the model, for the message, such as `"predicting"`.

    Raises:
        ValueError: If the model is in training mode.
    """
    if model.training:
        raise ValueError(f"the model is in training mode: call model.eval() before {action}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for the body, then restore the mode of every submodule."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
