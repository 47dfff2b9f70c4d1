"""The context of a retrieval batch is what precedes its first question."""

import pytest
import torch

from datamodules.text import Needles
from datamodules.text.retrieval.data import RetrievalSamples
from diffmm.analysis.contexts import ContextBatch
from diffmm.batch import IGNORE_INDEX

_ = IGNORE_INDEX


def batch_of(**changes):
    tokens = torch.arange(12).reshape(2, 6)
    targets = torch.tensor([[_, _, _, 4, _, 5], [_, _, _, _, 4, 5]])
    return {"tokens": tokens, "targets": targets, **changes}


def test_the_context_ends_before_the_first_question():
    batch = ContextBatch.of(batch_of(), question_length=2)
    assert batch.context.int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert batch.is_target.int().tolist() == [[0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 1, 1]]


def test_needles_have_their_needles_in_the_context_and_questions_after_it():
    source = Needles(num_needles=3, num_queries=2)
    samples = RetrievalSamples(source, length=40, num_samples=4, split=1, seed=0)
    for index in range(4):
        sample = {
            name: value[None] for name, value in samples.sample(0, index).items() if name != "index"
        }
        batch = ContextBatch.of(sample, question_length=2)
        assert not (sample["evidence"] & ~batch.context).any()
        number = source.words.index("number")
        rest = batch.tokens[0, ~batch.context[0]]
        assert rest[0] == number
        assert (rest == number).sum() == 2
        assert batch.context.sum() == 41 - 2 * 4


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({"key_padding": torch.ones(2, 6, dtype=torch.bool)}, 2, "key_padding has no single"),
        ({"document_ids": torch.zeros(2, 6)}, 2, "document_ids has no single context"),
        ({}, 0, "question_length must be at least 1, got 0"),
        ({}, 4, "context marks no token of sample 0"),
        ({"targets": torch.full((2, 6), _)}, 1, "targets marks no token of sample 0"),
        ({"targets": torch.zeros(2, 6)}, 1, r"targets must be \[B, N\] int64 .*float32"),
        ({"targets": torch.zeros(2, 5).long()}, 1, r"targets must be .*\(2, 6\), got \(2, 5\)"),
    ],
)
def test_what_has_no_context_is_refused(changes, length, message):
    with pytest.raises(ValueError, match=message):
        ContextBatch.of(batch_of(**changes), question_length=length)


def test_answers_within_the_context_are_refused():
    batch = batch_of()
    context = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    with pytest.raises(ValueError, match="context of sample 1 does not end before token 4"):
        ContextBatch(batch["tokens"], batch["targets"], context)
