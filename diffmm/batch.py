"""What a batch is: the contract between the datamodules that make it and the models that eat it.

Batches are plain dictionaries of tensors, so that any collate function, pinned memory and any
strategy can carry them. `B` is the number of samples, `N` the number of tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, final

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""A target with this value takes no part in the loss."""

REPEATED = "repeated"
"""In a batch of any kind that has this key, `[B]` booleans and all true, nothing counts: other
processes have samples left to evaluate where this one has none."""


InputShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Fields of a batch, each with its shape and dtype."""


class TextBatch(TypedDict):
    """Token sequences and what is to be predicted at each position."""

    tokens: Tensor
    """`[B, N]` int64, what the model reads (for masked training, with the mask already in it)."""
    targets: Tensor
    """`[B, N]` int64, the token to predict at each position, `IGNORE_INDEX` where there is none.
    For causal training this is already the next token: nobody shifts again."""
    num_bytes: Tensor
    """`[B]` int64, how many UTF-8 bytes the predicted targets stand for (for bits a byte)."""
    document_ids: NotRequired[Tensor]
    """`[B, N]` int64, in packed batches, which document each token belongs to."""
    key_padding: NotRequired[Tensor]
    """`[B, N]` bool, true where a token is real, in padded batches."""
    index: Tensor
    """`[B]` int64, the sample's number in its dataset."""


@final
class ImageBatch(TypedDict):
    """Images and their classes."""

    images: Tensor
    """`[B, C, H, W]` float32, normalized by the dataset's mean and standard deviation."""
    labels: Tensor
    """`[B]` int64, or `[B, num_classes]` float32 of zeros and ones where a sample has several."""
    index: Tensor
    """`[B]` int64, the sample's number in its dataset."""


@final
class AudioBatch(TypedDict):
    """Sounds and their classes."""

    waveforms: Tensor
    """`[B, S]` float32 in [-1, 1], mono, at the model's sample rate, zeros after a clip's end."""
    num_samples: Tensor
    """`[B]` int64, how many of the `S` samples are real."""
    labels: Tensor
    """`[B]` int64, or `[B, num_classes]` float32 of zeros and ones where a sample has several."""
    index: Tensor
    """`[B]` int64, the sample's number in its dataset."""


def inputs_of(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The positional arguments of a model's `forward` for this batch: the fields that the model
    declares as its `input_fields`, or the first field of the batch where it declares none (a model
    of timm)."""
    return tuple(batch[field] for field in input_fields(model, batch))


def input_fields(model: Any, batch: Mapping[str, Any]) -> Sequence[str]:
    """The fields of the batch that a model takes, the samples themselves first."""
    declared: Sequence[str] | None = getattr(model, "input_fields", None)
    return declared or (next(iter(batch)),)
