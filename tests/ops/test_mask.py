"""The mask type, compared with plain loops."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree

from diffmm.ops import AttentionMask
from diffmm.ops.mask import TENSORS


def sees(mask: AttentionMask, batch: int, query: int, key: int, num_queries: int, num_keys: int):
    """Whether a query sees a key, according to the docstring."""
    position = query + num_keys - num_queries
    in_prefix = mask.prefix_lengths is not None and key < int(mask.prefix_lengths[batch])
    if mask.causal and key > position and not in_prefix:
        return False
    if mask.window is not None and abs(position - key) >= mask.window:
        return False
    if mask.document_ids is not None:
        documents = mask.document_ids[batch].tolist()
        if documents[position] != documents[key]:
            return False
    return mask.key_padding is None or bool(mask.key_padding[batch, key])


@st.composite
def masks(draw):
    batch, num_keys = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    num_queries = draw(st.integers(1, num_keys))
    causal = draw(st.booleans())

    def rows(element):
        row = st.lists(element, min_size=num_keys, max_size=num_keys)
        return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))

    prefix = st.lists(st.integers(0, num_keys), min_size=batch, max_size=batch)
    return (
        AttentionMask(
            causal=causal,
            window=draw(st.none() | st.integers(1, num_keys)),
            prefix_lengths=torch.tensor(draw(prefix)) if causal and draw(st.booleans()) else None,
            document_ids=rows(st.integers(0, 2)) if draw(st.booleans()) else None,
            key_padding=rows(st.booleans()) if draw(st.booleans()) else None,
        ),
        batch,
        num_queries,
        num_keys,
    )


@given(masks())
@settings(deadline=None, max_examples=150)
def test_to_bool_is_what_the_words_say(case):
    mask, batch, num_queries, num_keys = case
    visible = mask.to_bool(num_queries, num_keys).expand(batch, 1, num_queries, num_keys)
    for b, n, m in itertools.product(range(batch), range(num_queries), range(num_keys)):
        assert visible[b, 0, n, m].item() == sees(mask, b, n, m, num_queries, num_keys), (b, n, m)


@given(masks(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_rows_are_those_of_the_mask(case, random):
    mask, _, num_queries, num_keys = case
    rows = torch.tensor([random.randrange(num_queries) for _ in range(3)])
    whole = mask.to_bool(num_queries, num_keys)
    assert torch.equal(mask.to_bool(num_queries, num_keys, rows=rows), whole[:, :, rows])


@given(masks(), st.integers(0, 4))
@settings(deadline=None, max_examples=60)
def test_num_keys_is_the_number_of_keys_in_a_buffer(case, surplus):
    mask, batch, num_queries, num_keys = case
    longer = {
        name: tensor if tensor is None else torch.nn.functional.pad(tensor, (0, surplus), value=1)
        for name, tensor in (("document_ids", mask.document_ids), ("key_padding", mask.key_padding))
    }
    of_buffer = replace(mask, **longer, num_keys=torch.tensor(num_keys))
    found = of_buffer.to_bool(num_queries, num_keys + surplus)
    assert torch.equal(found[..., :num_keys], mask.to_bool(num_queries, num_keys))
    assert not found[..., num_keys:].any()
    of_buffer.check(batch, num_keys + surplus)
    assert not of_buffer.is_full
    assert not of_buffer.is_causal
    assert of_buffer.per_sample == mask.per_sample


def test_num_keys_is_a_leaf_of_the_pytree_if_it_is_given():
    """A program that was exported with a mask without it still takes one."""
    padding = torch.ones(1, 4, dtype=torch.bool)
    for mask, count in (
        (AttentionMask(window=2, key_padding=padding), 3),
        (AttentionMask(causal=True, num_keys=torch.tensor(3)), 4),
    ):
        leaves, spec = _pytree.tree_flatten(mask)
        assert len(leaves) == count
        assert _pytree.tree_unflatten(leaves, spec) == mask
        named = _pytree.tree_flatten_with_path(mask)[0]
        assert [path[0].name for path, _ in named] == list(TENSORS[:count])


def test_more_queries_than_keys_leaves_the_first_without_any():
    assert AttentionMask(causal=True).to_bool(3, 2)[0, 0].tolist() == [
        [False, False],
        [True, False],
        [True, True],
    ]


def test_properties():
    assert AttentionMask().is_full
    assert not AttentionMask(window=3).is_full
    assert not AttentionMask(causal=True).is_full
    assert AttentionMask(causal=True).is_causal
    assert not AttentionMask().is_causal
    assert not AttentionMask(causal=True, window=3).is_causal
    assert not AttentionMask(causal=True, key_padding=torch.ones(1, 4, dtype=torch.bool)).is_causal
    assert not AttentionMask(causal=True).per_sample
    assert AttentionMask(key_padding=torch.ones(1, 2, dtype=torch.bool)).per_sample


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be at least 1 .* got 0"),
        ({"window": 2.5}, "window must be an integer, the number of keys, got 2.5"),
        ({"prefix_lengths": torch.tensor([1])}, "prefix_lengths needs causal=True"),
        (
            {"causal": True, "prefix_lengths": torch.zeros(1, 2, dtype=torch.int64)},
            r"prefix_lengths must be \[B\], got shape \(1, 2\)",
        ),
        (
            {"document_ids": torch.zeros(2, 2)},
            "document_ids must hold integers, got torch.float32",
        ),
        (
            {"key_padding": torch.zeros(2, 2, dtype=torch.int64)},
            "key_padding must hold booleans, got torch.int64",
        ),
        ({"num_keys": torch.ones(1)}, r"num_keys must be a tensor without axes, got shape \(1,\)"),
        ({"num_keys": torch.tensor(1.0)}, "num_keys must hold integers, got torch.float32"),
    ],
)
def test_bad_masks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionMask(**arguments)


def test_documents_with_more_queries_than_keys_are_refused():
    mask = AttentionMask(document_ids=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 queries and 2 keys"):
        mask.to_bool(3, 2)
