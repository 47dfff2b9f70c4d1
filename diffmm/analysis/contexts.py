"""Sequences whose answers are in their context."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmm.batch import IGNORE_INDEX, TextBatch
from diffmm.models.modes import evaluating
from diffmm.models.text import TextModel


@dataclass(frozen=True)
class ContextBatch:
    """Sequences with a context, questions about it and their answers.

    Attributes:
        tokens: Token ids, `[B, N]` int64.
        targets: Answers, shifted to the token that predicts each, `[B, N]` int64; `IGNORE_INDEX`
            elsewhere.
        context: `[B, N]` booleans, true at the tokens of the context.

    Raises:
        ValueError: If shapes or dtypes differ from these, or a sample has no answer, no context, or
            an answer before the end of its context.
    """

    tokens: Tensor
    targets: Tensor
    context: Tensor

    def __post_init__(self) -> None:
        for name, dtype in (
            ("tokens", torch.int64),
            ("targets", torch.int64),
            ("context", torch.bool),
        ):
            tensor = getattr(self, name)
            if tensor.ndim != 2 or tensor.dtype != dtype or tensor.shape != self.tokens.shape:
                wanted = f"[B, N] {str(dtype).removeprefix('torch.')}"
                raise ValueError(
                    f"{name} must be {wanted} of the shape of tokens, {tuple(self.tokens.shape)}, "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )
        for name, marked in (("targets", self.is_target), ("context", self.context)):
            without = (~marked.any(dim=1)).nonzero()
            if len(without):
                raise ValueError(f"{name} marks no token of sample {int(without[0])}")
        first = self.is_target.int().argmax(dim=1, keepdim=True)
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        inside = (self.context & (place >= first)).any(dim=1).nonzero()
        if len(inside):
            sample = int(inside[0])
            raise ValueError(
                f"the context of sample {sample} does not end before token {int(first[sample])}, "
                f"which predicts an answer"
            )

    @classmethod
    def of(cls, batch: TextBatch, *, question_length: int) -> "ContextBatch":
        """The sequences of a retrieval batch, such as those of `datamodules.RetrievalData`. The
        context is all that precedes the first question.

        Args:
            batch: A batch whose targets are answers alone.
            question_length: Number of tokens from the beginning of the first question to the token
                that predicts its answer: 2 for the needles' "number CITY", 1 for associative
                recall.

        Raises:
            ValueError: If the batch is padded or packed, `question_length` is below 1, or a sample
                has no answer or no context.
        """
        for name in ("document_ids", "key_padding"):
            if name in batch:
                raise ValueError(f"a batch with {name} has no single context: give it without")
        if question_length < 1:
            raise ValueError(f"question_length must be at least 1, got {question_length}")
        is_target = batch["targets"] != IGNORE_INDEX
        first = is_target.int().argmax(dim=1, keepdim=True)
        place = torch.arange(is_target.shape[1], device=is_target.device)
        return cls(batch["tokens"], batch["targets"], place <= first - question_length)

    @property
    def is_target(self) -> Tensor:
        """`[B, N]` booleans, true at the tokens that predict an answer."""
        return self.targets != IGNORE_INDEX

    def to(self, device: torch.device | str) -> "ContextBatch":
        """The batch on another device."""
        return ContextBatch(*(tensor.to(device) for tensor in vars(self).values()))


@torch.no_grad()
def wrong_samples(model: TextModel, batch: ContextBatch) -> Tensor:
    """`[B]` booleans, true where a token of an answer does not have the highest logit, given the
    answer's previous tokens."""
    with evaluating(model):
        predicted = model(batch.tokens).argmax(dim=-1)
    return (batch.is_target & (predicted != batch.targets)).any(dim=1)
