"""Samples made from windows of tokens: the model's inputs and targets."""

from collections.abc import Iterable, Iterator
from typing import Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from datamodules.shared.sampling import SeededDataset, sample_rng
from datamodules.text.packing import (
    Cut,
    Ids,
    PackedCut,
    PaddedCut,
    Window,
    packed_windows,
    padded_windows,
)
from datamodules.text.token_documents import TokenDocuments
from diffmm.batch import IGNORE_INDEX, TextBatch
from diffmm.tokenizers import Tokenizer

Objective = Literal["causal", "masked"]
Packing = Literal["packed", "padded"]


class TextSample(TypedDict):
    """One row of a `TextBatch`."""

    tokens: Tensor
    targets: Tensor
    num_bytes: Tensor
    document_ids: NotRequired[Tensor]
    index: Tensor


class WindowTask:
    """Turns windows into samples.

    Args:
        tokenizer: Tokenizer of the tokens.
        sequence_length: Number of tokens per window, at least 1.
        objective: `causal` predicts the next token at each position. `masked` predicts the token
            itself at a fraction `mask_probability` of the positions (at least one); the input there
            is the mask token in 80% of the cases, another token in 10% and the token itself in 10%
            (BERT, section 3.1). Special tokens are never masked.
        packing: `packed` fills windows with one document after another; `padded` gives each
            document its own windows.
        document_mask: Whether packed windows have document ids, so that no token is predicted from
            another document.
        mask_probability: Fraction of tokens to predict with the masked objective, in (0, 1).
        seed: Seed of the masks.

    Raises:
        ValueError: If the tokenizer lacks a required special token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        objective: Objective,
        packing: Packing,
        document_mask: bool,
        mask_probability: float,
        seed: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.packing = packing
        self.eos_id = tokenizer.eos_id
        self._sequence_length = sequence_length
        self._document_mask = document_mask and packing == "packed"
        self._mask_probability = mask_probability
        self._mask_id = tokenizer.mask_id if objective == "masked" else None
        self._byte_lengths = tokenizer.byte_lengths
        self._special = np.zeros(tokenizer.vocab_size, bool)
        self._special[[*tokenizer.special_ids, self.eos_id]] = True
        self._ordinary_ids = np.flatnonzero(~self._special)

    def cut(self, lengths: Ids) -> Cut:
        """The division of documents of these lengths into windows."""
        cut = PackedCut if self.packing == "packed" else PaddedCut
        return cut(lengths, self._sequence_length)

    def windows(self, documents: Iterable[Ids]) -> Iterator[Window]:
        """The windows of an iterable of documents."""
        cut = packed_windows if self.packing == "packed" else padded_windows
        return cut(documents, self._sequence_length)

    def sample(self, window: Window, epoch: int, index: int) -> TextSample:
        """Turn a window into sample `index` of `epoch`."""
        document_ids = window.document_ids[:-1] - window.document_ids[0]
        if self._mask_id is None:
            tokens, targets = window.ids[:-1], window.ids[1:].copy()
            if self._document_mask:
                targets[np.diff(window.document_ids) != 0] = IGNORE_INDEX
        else:
            rng = sample_rng(self.seed, epoch, index)
            tokens, targets = self._masked(window.ids[:-1], self._mask_id, rng)
        num_bytes = self._byte_lengths[targets[targets != IGNORE_INDEX]].sum()
        if self.packing == "packed":
            # Only the very last window is shorter; its padding is a separate document.
            missing = (0, self._sequence_length - len(tokens))
            tokens = np.pad(tokens, missing, constant_values=self.eos_id)
            targets = np.pad(targets, missing, constant_values=IGNORE_INDEX)
            document_ids = np.pad(document_ids, missing, constant_values=document_ids[-1] + 1)
        sample = TextSample(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            num_bytes=torch.tensor(num_bytes),
            index=torch.tensor(index),
        )
        if self._document_mask:
            sample["document_ids"] = torch.from_numpy(document_ids)
        return sample

    def collate(self, samples: list[TextSample]) -> TextBatch:
        """Collate samples into a batch; unpacked ones are padded on the right to the longest."""
        if self.packing == "packed":
            return default_collate(samples)
        tokens = [sample["tokens"] for sample in samples]
        targets = [sample["targets"] for sample in samples]
        lengths = torch.tensor([len(ids) for ids in tokens])
        return TextBatch(
            tokens=pad_sequence(tokens, batch_first=True, padding_value=self.eos_id),
            targets=pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
            num_bytes=torch.stack([sample["num_bytes"] for sample in samples]),
            key_padding=torch.arange(int(lengths.max())) < lengths[:, None],
            index=torch.stack([sample["index"] for sample in samples]),
        )

    def _masked(self, ids: Ids, mask_id: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
        tokens, targets = ids.copy(), np.full_like(ids, IGNORE_INDEX)
        candidates = np.flatnonzero(~self._special[ids])
        if len(candidates):
            num_chosen = max(1, round(self._mask_probability * len(candidates)))
            chosen = rng.choice(candidates, num_chosen, replace=False)
            targets[chosen] = ids[chosen]
            fate = rng.random(num_chosen)
            others = rng.choice(self._ordinary_ids, num_chosen)
            tokens[chosen[fate < 0.8]] = mask_id
            replaced = (fate >= 0.8) & (fate < 0.9)
            tokens[chosen[replaced]] = others[replaced]
        return tokens, targets


class TextWindows(SeededDataset[TextSample]):
    """All windows of tokenized documents.

    Args:
        documents: The documents.
        task: How to cut them into windows, and what to predict.
    """

    def __init__(self, documents: TokenDocuments, task: WindowTask) -> None:
        self._documents = documents
        self._task = task
        self._cut = task.cut(documents.lengths)

    def __len__(self) -> int:
        return len(self._cut)

    def sample(self, epoch: int, index: int) -> TextSample:
        spans = self._cut[index]
        ids = np.concatenate([self._documents.read(*span) for span in spans])
        numbers = [span.document for span in spans]
        document_ids = np.repeat(numbers, [span.stop - span.start for span in spans])
        return self._task.sample(Window(ids, document_ids), epoch, index)
