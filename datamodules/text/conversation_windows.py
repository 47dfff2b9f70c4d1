"""Conversations as tokens, and samples of several whole ones."""

import json
import logging
from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.shared.bad_samples import BadSampleError, Triage
from datamodules.shared.sampling import SeededDataset
from datamodules.text.chat import ChatTemplate
from datamodules.text.token_documents import key_number
from diffmm.batch import IGNORE_INDEX
from diffmm.checks import DataError
from diffmm.tokenizers import Tokenizer

_logger = logging.getLogger(__name__)


class TokenizedConversation(NamedTuple):
    """A conversation as tokens.

    Attributes:
        ids: Token ids, `[N]`.
        is_answer: Whether each of them belongs to an answer, and is to be learned, `[N]`.
        key: The `key_number` of its messages.
    """

    ids: NDArray[np.int64]
    is_answer: NDArray[np.bool_]
    key: int


def tokenize(
    conversations: Sequence[tuple[str, Any]],
    template: ChatTemplate,
    sequence_length: int,
    triage: Triage,
) -> list[TokenizedConversation]:
    """Tokenize conversations. Those that are longer than a sample are cut, and those that have no
    answer in the rest are left out; a warning gives the number of both.

    Args:
        conversations: The place of each and its messages, as `Conversations.load` returns them.
        template: Template of the messages.
        sequence_length: Number of tokens per sample.
        triage: How to handle conversations that do not fit the template.

    Raises:
        BadSampleError: If a conversation does not fit the template, and this is to be an error.
    """
    found = []
    num_cut = num_empty = 0
    longest = sequence_length + 1  # the last token is only a target
    for where, messages in conversations:
        triage.num_read += 1
        try:
            ids, is_answer = template.encode(messages)
        except DataError as error:
            bad = BadSampleError(f"the conversation in {where} {error}")
            triage.note(bad, instead="skipping it")
            continue
        num_cut += len(ids) > longest
        if not any(is_answer[1:longest]):
            num_empty += 1
            continue
        found.append(
            TokenizedConversation(
                np.array(ids[:longest], np.int64),
                np.array(is_answer[:longest]),
                key_number(json.dumps(messages, sort_keys=True)),
            )
        )
    if num_cut or num_empty:
        _report(len(conversations), num_cut, num_empty, sequence_length)
    return found


@lru_cache
def _report(num_all: int, num_cut: int, num_empty: int, sequence_length: int) -> None:
    """Log, once per process, how many conversations are cut and left out."""
    _logger.warning(
        "of %d conversations, %d are longer than sequence_length=%d and are cut, and %d "
        "are left out, because they have no answer in the rest",
        num_all,
        num_cut,
        sequence_length,
        num_empty,
    )


class ConversationWindows(SeededDataset[dict[str, Tensor]]):
    """Whole conversations, several per sample.

    Args:
        conversations: The conversations, each with at least two tokens.
        sequence_length: Number of tokens per sample; longer conversations are cut at the end.
        tokenizer: Tokenizer of the tokens.
    """

    def __init__(
        self,
        conversations: Sequence[TokenizedConversation],
        *,
        sequence_length: int,
        tokenizer: Tokenizer,
    ) -> None:
        self.conversations = conversations
        self.sequence_length = sequence_length
        self.tokenizer = tokenizer
        lengths = [min(len(each.ids) - 1, sequence_length) for each in conversations]
        self.groups = packed(lengths, sequence_length)

    def __len__(self) -> int:
        return len(self.groups)

    def sample(self, epoch: int, index: int) -> dict[str, Tensor]:
        length, eos = self.sequence_length, self.tokenizer.eos_id
        tokens = np.full(length, eos, np.int64)
        targets = np.full(length, IGNORE_INDEX, np.int64)
        # The rest of a sample is a document of its own.
        documents = np.full(length, len(self.groups[index]), np.int64)
        start = 0
        for number, place in enumerate(self.groups[index]):
            ids, is_answer, _ = self.conversations[place]
            count = min(len(ids) - 1, length)
            span = slice(start, start + count)
            tokens[span] = ids[:count]
            targets[span] = np.where(is_answer[1 : count + 1], ids[1 : count + 1], IGNORE_INDEX)
            documents[span] = number
            start += count
        num_bytes = self.tokenizer.byte_lengths[targets[targets != IGNORE_INDEX]].sum()
        return {
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "num_bytes": torch.tensor(num_bytes),
            "document_ids": torch.from_numpy(documents),
            "index": torch.tensor(index),
        }


def packed(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over groups of a capacity by best-fit decreasing: the longest item first,
    each into the fullest group that it fits into.

    Returns:
        The items of each group in ascending order; the groups in the order of their first items.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of every group: how much fits, and its number
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        place = bisect_left(room, (lengths[item], -1))
        if place == len(room):
            groups.append([])
            left, number = capacity, len(groups) - 1
        else:
            left, number = room.pop(place)
        groups[number].append(item)
        insort(room, (left - lengths[item], number))
    return sorted(map(sorted, groups))
