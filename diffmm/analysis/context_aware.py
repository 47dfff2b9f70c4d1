"""Context-aware decoding: logits with the context against those without it."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from diffmm.analysis.contexts import ContextBatch
from diffmm.batch import answer_counts
from diffmm.models.modes import evaluating
from diffmm.models.text import TextModel
from diffmm.ops import AttentionMask


@torch.no_grad()
def context_aware_logits(model: TextModel, batch: ContextBatch, *, strength: float) -> Tensor:
    """Compute logits that stress the context (Shi et al. 2023, "Trusting Your Evidence").

        (1 + a) logits(x, context) - a logits(x)

    with a second forward pass, in which the tokens of the context are hidden and the positions of
    the others are those of the sequence without it.

    Args:
        model: Causal text model; it runs in evaluation mode.
        batch: Sequences and their contexts, on the model's device.
        strength: `a`, at least 0; 0 leaves the logits as they are. The paper uses 0.5 for
            summaries, and 1 where the context contradicts what the model has learned.

    Returns:
        Logits `[B, N, vocab_size]`; at the tokens of the context they have no meaning.

    Raises:
        ValueError: If the model is not causal, or `strength` is negative or not finite.
    """
    if not model.config.causal:
        raise ValueError("context-aware decoding needs a causal text model, got causal=False")
    if not 0.0 <= strength < math.inf:
        raise ValueError(f"strength must be at least 0 and finite, got {strength}")
    with evaluating(model):
        logits = model(batch.tokens)
        if strength == 0.0:
            return logits
        rest = ~batch.context
        mask = AttentionMask(causal=True, key_padding=rest)
        positions = (rest.cumsum(dim=1) - 1).clamp(min=0)
        without = model(batch.tokens, mask=mask, positions=positions)
    return (1.0 + strength) * logits - strength * without


def context_aware_accuracy(
    model: TextModel, batches: Iterable[ContextBatch], *, strength: float
) -> float:
    """The fraction of answers that greedy context-aware decoding gives exactly, in [0, 1].

    An answer is exact if all of its tokens have the highest logits, given its previous tokens (see
    `diffmm.batch.answer_counts`), which is the case if and only if decoding gives it.

    Args:
        model: See `context_aware_logits`; batches are moved to its device.
        batches: Sequences with answers in their context.
        strength: See `context_aware_logits`; 0 gives the accuracy of plain decoding.

    Raises:
        ValueError: See `context_aware_logits`, or if there are no batches.
    """
    device = next(model.parameters()).device
    num_exact, num_answers = 0, 0
    for batch in batches:
        batch = batch.to(device)
        logits = context_aware_logits(model, batch, strength=strength)
        exact, answers = answer_counts(logits.argmax(dim=-1), batch.targets)
        num_exact, num_answers = num_exact + int(exact.sum()), num_answers + int(answers.sum())
    if not num_answers:
        raise ValueError("batches is empty, so that there are no answers")
    return num_exact / num_answers
