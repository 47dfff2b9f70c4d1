"""The format of batches, shared by datamodules and models.

Batches are plain dictionaries of tensors, so that they work with any collate function, pinned
memory and any strategy. `B` is the number of samples, `N` the number of tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, final

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Targets with this value are excluded from the loss."""

REPEATED = "repeated"
"""Key of `[B]` booleans, all true, that marks a repeated evaluation batch. It does not count in any
metric: this process has run out of samples before the others."""


InputShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each field of a batch."""


class TextBatch(TypedDict):
    """Token sequences and their targets."""

    tokens: Tensor
    """`[B, N]` int64, the model's input (already masked for masked training)."""
    targets: Tensor
    """`[B, N]` int64, the token to predict at each position, or `IGNORE_INDEX`. For causal training
    targets are already shifted to the next token."""
    num_bytes: Tensor
    """`[B]` int64, the number of UTF-8 bytes of the targets, for bits per byte."""
    document_ids: NotRequired[Tensor]
    """`[B, N]` int64, the document of each token, in packed batches."""
    key_padding: NotRequired[Tensor]
    """`[B, N]` bool, true where a token is real, in padded batches."""
    index: Tensor
    """`[B]` int64, the index of each sample in its dataset."""


@final
class ImageBatch(TypedDict):
    """Images and their classes."""

    images: Tensor
    """`[B, C, H, W]` float32, normalized by the dataset's mean and standard deviation."""
    labels: Tensor
    """`[B]` int64, or for multi-label data `[B, num_classes]` float32 of zeros and ones."""
    index: Tensor
    """`[B]` int64, the index of each sample in its dataset."""


@final
class AudioBatch(TypedDict):
    """Sounds and their classes."""

    waveforms: Tensor
    """`[B, S]` float32 in [-1, 1], mono, at the model's sample rate, padded with zeros."""
    num_samples: Tensor
    """`[B]` int64, the number of real samples of each clip."""
    labels: Tensor
    """`[B]` int64, or for multi-label data `[B, num_classes]` float32 of zeros and ones."""
    index: Tensor
    """`[B]` int64, the index of each sample in its dataset."""


def inputs_of(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The positional arguments of a model's `forward` for a batch: the fields in the model's
    `input_fields`, or the first field of the batch if the model has no such attribute (as timm's
    models)."""
    return tuple(batch[field] for field in input_fields(model, batch))


def input_fields(model: Any, batch: Mapping[str, Any]) -> Sequence[str]:
    """The names of the batch fields that a model takes, starting with the samples."""
    declared: Sequence[str] | None = getattr(model, "input_fields", None)
    return declared or (next(iter(batch)),)
