"""Windows: no token is lost or duplicated, and targets are correct."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.text.packing import PackedCut, PaddedCut
from datamodules.text.token_documents import Document, TokenDocuments, tokenize
from datamodules.text.windows import TextWindows, WindowTask
from diffmm.batch import IGNORE_INDEX
from diffmm.tokenizers import load_tokenizer

BYTES = load_tokenizer("bytes")
EOS = BYTES.eos_id

texts = st.lists(st.text("abcé", min_size=1, max_size=12), min_size=1, max_size=8)
lengths = st.integers(1, 9)


def documents_of(texts: list[str]) -> TokenDocuments:
    named = (Document(str(number), text) for number, text in enumerate(texts))
    return TokenDocuments.in_memory(tokenize(named, BYTES))


def task(sequence_length: int, **changes: Any) -> WindowTask:
    arguments = {
        "objective": "causal",
        "packing": "packed",
        "document_mask": True,
        "mask_probability": 0.15,
        "seed": 0,
    }
    return WindowTask(BYTES, sequence_length=sequence_length, **{**arguments, **changes})


def whole_stream(texts: list[str]) -> list[int]:
    return [id for text in texts for id in [*text.encode(), EOS]]


@given(texts, lengths)
def test_packed_windows_hold_every_token_once(texts: list[str], length: int) -> None:
    stream = whole_stream(texts)
    dataset = TextWindows(documents_of(texts), task(length, document_mask=False))
    samples = [dataset[index] for index in range(len(dataset))]
    tokens = [id for sample in samples for id in sample["tokens"].tolist()]
    targets = [id for sample in samples for id in sample["targets"].tolist()]
    filling = len(tokens) - (len(stream) - 1)
    assert 0 <= filling < length
    assert tokens == stream[:-1] + [EOS] * filling
    assert targets == stream[1:] + [IGNORE_INDEX] * filling
    num_bytes = sum(int(sample["num_bytes"]) for sample in samples)
    assert num_bytes == len("".join(texts).encode()) - 1  # the first byte is not predicted
    assert "document_ids" not in samples[0]


@given(texts, lengths)
def test_document_ids_tell_documents_apart(texts: list[str], length: int) -> None:
    dataset = TextWindows(documents_of(texts), task(length))
    owners = [number for number, text in enumerate(texts) for _ in range(len(text.encode()) + 1)]
    predicted = []
    for index in range(len(dataset)):
        sample = dataset[index]
        ids = sample["document_ids"].tolist()
        mine = owners[index * length : (index + 1) * length]
        assert ids[0] == 0
        for place, (a, b) in enumerate(pairwise(ids)):
            real = place + 1 < min(length, len(owners) - 1 - index * length)
            assert (a != b) == (real and mine[place] != mine[place + 1]) or not real
        # Each target belongs to the document of its token.
        for place, target in enumerate(sample["targets"].tolist()):
            if target != IGNORE_INDEX:
                assert owners[index * length + place] == owners[index * length + place + 1]
                predicted.append(target)
    # All tokens (and bytes) except the first of each document are predicted.
    assert predicted == [id for text in texts for id in [*text.encode()[1:], EOS]]


def test_the_filling_is_a_document_of_its_own() -> None:
    dataset = TextWindows(documents_of(["ab", "c"]), task(8))
    (sample,) = (dataset[index] for index in range(len(dataset)))
    assert sample["tokens"].tolist() == [97, 98, EOS, 99, EOS, EOS, EOS, EOS]
    assert sample["document_ids"].tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert sample["targets"].tolist() == [98, EOS, IGNORE_INDEX, EOS] + 4 * [IGNORE_INDEX]
    assert sample["num_bytes"] == 1


@given(texts, lengths)
def test_padded_windows_keep_documents_apart(texts: list[str], length: int) -> None:
    padded = task(length, packing="padded")
    dataset = TextWindows(documents_of(texts), padded)
    batch = padded.collate([dataset[index] for index in range(len(dataset))])
    real = batch["key_padding"]
    assert batch["tokens"][real].tolist() == [id for text in texts for id in text.encode()]
    expected = [id for text in texts for id in [*text.encode()[1:], EOS]]
    assert batch["targets"][real].tolist() == expected
    assert (batch["targets"][~real] == IGNORE_INDEX).all()
    assert (real.int().diff(dim=1) <= 0).all()  # padding on the right
    assert real.any(dim=0).all()  # no longer than the longest document
    assert "document_ids" not in batch
    assert batch["num_bytes"].sum() == sum(len(text.encode()) - 1 for text in texts)
    assert batch["index"].tolist() == list(range(len(dataset)))


@given(texts, lengths, st.sampled_from(["packed", "padded"]))
def test_streamed_windows_equal_indexed_ones(texts: list[str], length: int, packing: str) -> None:
    documents = documents_of(texts)
    cutter = task(length, packing=packing)
    indexed = TextWindows(documents, cutter)
    parts = [documents.read(number, 0, 10**6) for number in range(len(documents))]
    parts = [part[: documents.lengths[number]] for number, part in enumerate(parts)]
    streamed = list(cutter.windows(parts))
    assert len(streamed) == len(indexed)
    for index, window in enumerate(streamed):
        for name, value in cutter.sample(window, 0, index).items():
            assert torch.equal(value, indexed[index][name])  # type: ignore[literal-required, arg-type]


def test_packed_windows_of_large_documents_are_found_without_reading_them() -> None:
    cut = PackedCut(np.array([10**12, 10**12]), 1000)
    assert len(cut) == 2 * 10**9
    middle = cut[10**9 - 1]
    assert [(span.document, span.stop - span.start) for span in middle] == [(0, 1000), (1, 1)]
    assert PaddedCut(np.array([10**12]), 1000)[5] == [(0, 5000, 6001)]


@given(texts, st.integers(0, 3))
def test_masking_hides_what_is_to_be_predicted(texts: list[str], epoch: int) -> None:
    dataset = TextWindows(documents_of(texts), task(8, objective="masked"))
    plain = TextWindows(documents_of(texts), task(8))
    for index in range(len(dataset)):
        sample, original = dataset[epoch, index], plain[index]["tokens"]
        chosen = sample["targets"] != IGNORE_INDEX
        assert torch.equal(sample["targets"][chosen], original[chosen])
        assert torch.equal(sample["tokens"][~chosen], original[~chosen])
        assert not (original[chosen] == EOS).any()
        num_text = int((original != EOS).sum())
        assert chosen.sum() == (max(1, round(0.15 * num_text)) if num_text else 0)
        assert sample["num_bytes"] == chosen.sum()


def test_masking_is_80_10_10() -> None:
    dataset = TextWindows(documents_of(["abcd" * 25_000]), task(10_000, objective="masked"))
    samples = [dataset[epoch, index] for epoch in range(3) for index in range(len(dataset))]
    tokens = torch.cat([sample["tokens"] for sample in samples])
    targets = torch.cat([sample["targets"] for sample in samples])
    chosen = targets != IGNORE_INDEX
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.001)
    seen, hidden = tokens[chosen], targets[chosen]
    assert (seen == BYTES.mask_id).float().mean() == pytest.approx(0.8, abs=0.01)
    assert (seen == hidden).float().mean() == pytest.approx(0.1, abs=0.01)
    others = seen[(seen != BYTES.mask_id) & (seen != hidden)]
    assert others.max() < 256
    assert len(others.unique()) > 200


def test_masks_follow_seed_epoch_and_index() -> None:
    documents = documents_of(["abcdefgh" * 20])

    def masks(seed: int, epoch: int) -> list[list[int]]:
        dataset = TextWindows(documents, task(16, objective="masked", seed=seed))
        return [dataset[epoch, index]["targets"].tolist() for index in range(len(dataset))]

    assert masks(0, 0) == masks(0, 0)
    assert masks(0, 0) != masks(0, 1)
    assert masks(0, 0) != masks(1, 0)
    places = [[target == IGNORE_INDEX for target in row] for row in masks(0, 0)]
    assert len(set(map(tuple, places))) > 1
