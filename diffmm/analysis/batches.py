"""What the measurements need of a batch: inputs, mask, loss and accuracy of a model on it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from diffmm.batch import IGNORE_INDEX, inputs_of
from diffmm.models.masked_autoencoder import MaskedAutoencoder
from diffmm.models.modes import evaluating
from diffmm.models.text import TextModel
from diffmm.ops import AttentionMask

Batch = Mapping[str, Any]


def mask_of(model: nn.Module, batch: Batch) -> AttentionMask | None:
    """The mask of a text model for a batch, with its documents and padding; None for other models,
    which make their own."""
    if not isinstance(model, TextModel):
        return None
    return AttentionMask(
        causal=model.config.causal,
        document_ids=batch.get("document_ids"),
        key_padding=batch.get("key_padding"),
    )


def loss_of(model: nn.Module, batch: Batch) -> tuple[Tensor, int, Tensor | None]:
    """The loss of a model on a batch.

    Returns:
        The sum of the losses in nats (of a masked autoencoder: its mean squared error), a scalar
        with gradients; the number of targets in it; and for one label per sample the number of
        correct predictions.

    Raises:
        ValueError: If the batch has no targets for the model.
    """
    if isinstance(model, TextModel):
        if "targets" not in batch:
            raise ValueError("the loss of a text model needs a batch with targets")
        losses = model(batch["tokens"], mask=mask_of(model, batch), targets=batch["targets"])
        return losses.total, int((batch["targets"] != IGNORE_INDEX).sum()), None
    if isinstance(model, MaskedAutoencoder):
        return model(*inputs_of(model, batch)).loss, 1, None
    if "labels" not in batch or getattr(model, "num_classes", 1) < 1:
        raise ValueError(f"the loss of {type(model).__name__} needs classes and a batch of labels")
    logits, labels = model(*inputs_of(model, batch)).float(), batch["labels"]
    if labels.ndim > 1:
        losses = binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return losses.mean(dim=1).sum(), len(labels), None
    correct = (logits.argmax(dim=1) == labels).sum()
    return cross_entropy(logits, labels, reduction="sum"), len(labels), correct


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers in the body of the `with` statement; afterwards those of the CPU
    and of `device` continue as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], *, seed: int = 0) -> dict[str, float]:
    """The mean `loss` per target of a model on some batches, and its `accuracy` in [0, 1] where
    there is one label per sample.

    Args:
        model: The model, which is evaluated uncompiled and in evaluation mode.
        batches: At least one batch, on the model's device.
        seed: Seed of the patches that a masked autoencoder hides; the random numbers of the caller
            are left as they are.

    Raises:
        ValueError: If a batch has no targets for the model, or there are none.
    """
    total, count, correct, has_labels = 0.0, 0, 0.0, False
    with (
        seeded(seed, next(model.parameters()).device),
        evaluating(model),
        torch.compiler.set_stance("force_eager"),
    ):
        for batch in batches:
            loss, number, right = loss_of(model, batch)
            total, count = total + float(loss), count + number
            if right is not None:
                correct, has_labels = correct + float(right), True
    if not count:
        raise ValueError("there are no targets to evaluate the model on")
    found = {"loss": total / count}
    return {**found, "accuracy": correct / count} if has_labels else found
