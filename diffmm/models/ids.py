"""Checks of token ids."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor


def check_ids(tokens: Tensor, vocab_size: int) -> None:
    """Check that tokens are ids of a vocabulary, before an embedding looks them up: after
    another id, a process can no longer use its GPU.

    Raises:
        ValueError: If they are not int64 or int32, or one is out of range; the message names it.
    """
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens must be int64 or int32, got {tokens.dtype}: use tokens.long()")
    if not tokens.numel():
        return
    least, most = torch.stack(tokens.aminmax()).tolist()
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"tokens must be ids from 0 to {vocab_size - 1} (the model's vocab_size is "
            f"{vocab_size}), got {least if least < 0 else most}: use the model's own tokenizer"
        )


def as_ids(name: str, ids: Iterable[int]) -> tuple[int, ...]:
    """Ids of an argument, from any iterable of integers, such as a list or a tensor.

    Raises:
        ValueError: If they are something else; the message names the argument and the value.
    """
    try:
        return tuple(operator.index(id) for id in ids)
    except TypeError as error:
        raise ValueError(f"{name} must be integers, such as [0, 5], got {ids!r}") from error
