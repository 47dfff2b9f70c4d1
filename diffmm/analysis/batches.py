"""What the measurements need of a batch: inputs, mask, loss and accuracy of a model on it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from diffmm.batch import IGNORE_INDEX, inputs_of
from diffmm.models.captioning import CaptioningModel
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.ctc import CTCModel
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
    """The loss of a model on a batch, as its task computes it.

    Returns:
        The sum of the losses in nats (of a masked autoencoder: its mean squared error), a scalar
        with gradients; the number of targets in it: tokens or ids of texts, labels, or pairs; and
        for one label per sample the number of correct predictions. A pair of a contrastive model
        has the other pairs of the batch as its negatives.

    Raises:
        ValueError: If the batch has no targets for the model.
    """
    if isinstance(model, TextModel):
        if "targets" not in batch:
            raise ValueError("the loss of a text model needs a batch with targets")
        losses = model(batch["tokens"], mask=mask_of(model, batch), targets=batch["targets"])
        return losses.total, int((batch["targets"] != IGNORE_INDEX).sum()), None
    if isinstance(model, ContrastiveModel | CaptioningModel | CTCModel):
        if not {"tokens", "num_tokens"} <= batch.keys():
            raise ValueError(f"the loss of {type(model).__name__} needs a batch of pairs")
        return (*_loss_of_pairs(model, batch), None)
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


def _loss_of_pairs(
    model: ContrastiveModel | CaptioningModel | CTCModel, batch: Batch
) -> tuple[Tensor, int]:
    """The summed loss of images or sounds with texts, and the number of its targets."""
    from diffmm.training.captioning import caption_losses  # these import Lightning
    from diffmm.training.contrastive_losses import LOSSES, Pairs, text_ids
    from diffmm.training.ctc import ctc_losses

    if isinstance(model, CaptioningModel):
        return caption_losses(model, batch).total, int(batch["num_tokens"].sum())
    found = model(*inputs_of(model, batch))
    if isinstance(model, CTCModel):
        each, count = ctc_losses(batch, found, model.config.blank_id)
        return each.sum(), int(count)
    ids = text_ids(batch["tokens"], batch["num_tokens"])
    pairs = Pairs(found.media, found.texts, batch.get("media_index"), ids)
    # The loss of SigLIP alone has a bias.
    loss = LOSSES["clip" if found.bias is None else "siglip"]
    return loss(pairs, pairs, 0, found.scale, found.bias), len(ids)


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
