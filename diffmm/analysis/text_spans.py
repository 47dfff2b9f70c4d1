"""From characters of a text to its tokens."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from diffmm.tokenizers import Tokenizer


def tokens_of_span(
    tokenizer: Tokenizer, text: str, ids: Sequence[int], start: int, end: int
) -> Tensor:
    """The tokens that hold at least a part of the characters `start` to `end` of a text.

    Args:
        tokenizer: The tokenizer of `ids`.
        text: The text.
        ids: Its tokens, `N` of them.
        start: First character, from 0.
        end: Character after the last one.

    Returns:
        `[N]` booleans.

    Raises:
        ValueError: If the span is empty or not inside the text, or the tokenizer does not keep
            every byte of the text, so that its tokens have no places in it.
    """
    if not 0 <= start < end <= len(text):
        raise ValueError(
            f"the span {start}:{end} is not inside the text, whose characters are 0:{len(text)}"
        )
    lengths = [int(tokenizer.byte_lengths[id]) for id in ids]
    if tokenizer.num_bytes(ids) != len(text.encode()):
        raise ValueError(
            f"tokenizer {tokenizer.name!r} changes the text, so that a span of its characters has "
            f"no tokens"
        )
    first, last = (len(text[:place].encode()) for place in (start, end))
    ends = list(accumulate(lengths))
    return torch.tensor(
        [stop > first and stop - length < last for stop, length in zip(ends, lengths, strict=True)]
    )
