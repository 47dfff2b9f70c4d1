"""From characters of a text to its tokens, and from tokens to words."""

import re
from collections.abc import Sequence
from itertools import accumulate, takewhile

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


def words_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of a text, which are separated by white space, each with the indices of its tokens.

    Special tokens belong to no word, and a token with parts of two words to both. The tokens of a
    character in several parts, such as its bytes, belong to the word of the character.

    Args:
        tokenizer: The tokenizer of `ids`.
        ids: The tokens of the text.
    """
    text = tokenizer.decode(ids)
    # How much of the text is certain after each token: the rest may still change, as the character
    # that stands for a byte does when the next byte comes.
    ends = [_num_equal(text, tokenizer.decode(ids[:i])) for i in range(len(ids) + 1)]
    return [
        (
            match.group(),
            [
                i
                for i, id in enumerate(ids)
                if id not in tokenizer.special_ids
                and ends[i] < match.end()
                and max(ends[i + 1], ends[i] + 1) > match.start()
            ],
        )
        for match in re.finditer(r"\S+", text)
    ]


def _num_equal(one: str, other: str) -> int:
    """Number of characters at the start of two texts that are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
