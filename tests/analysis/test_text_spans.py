"""Spans of characters become tokens."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

from diffmm.analysis.text_spans import tokens_of_span
from diffmm.tokenizers import ByteTokenizer, HuggingFaceTokenizer


def marked(text, start, end):
    tokenizer = ByteTokenizer()
    found = tokens_of_span(tokenizer, text, tokenizer.encode(text), start, end)
    return found.nonzero().squeeze(1).tolist()


def test_bytes_of_characters():
    assert marked("abcdef", 2, 4) == [2, 3]
    assert marked("aéü", 1, 2) == [1, 2]
    assert marked("aéü", 2, 3) == [3, 4]
    assert marked("ab", 0, 2) == [0, 1]


def test_a_token_of_several_bytes_counts_if_a_part_of_it_does():
    tokenizer = SimpleNamespace(byte_lengths=[3, 2, 4], num_bytes=lambda ids: 9)
    found = [tokens_of_span(tokenizer, "x" * 9, [0, 1, 2], *span) for span in ((2, 4), (3, 6))]
    assert [each.tolist() for each in found] == [[True, True, False], [False, True, True]]
    assert tokens_of_span(tokenizer, "x" * 9, [0, 1, 2], 3, 5).tolist() == [False, True, False]


@pytest.mark.parametrize(("start", "end"), [(1, 1), (2, 1), (0, 4), (-1, 2)])
def test_spans_outside_the_text_are_refused(start, end):
    message = f"the span {start}:{end} is not inside the text, whose characters are 0:3"
    with pytest.raises(ValueError, match=message):
        marked("abc", start, end)


def test_a_tokenizer_that_changes_the_text_has_no_places():
    inner = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer = HuggingFaceTokenizer("words", inner)
    text = "a    b"
    with pytest.raises(ValueError, match="tokenizer 'words' changes the text"):
        tokens_of_span(tokenizer, text, tokenizer.encode(text), 0, 1)
