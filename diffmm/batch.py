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
    num_bytes: NotRequired[Tensor]
    """`[B]` int64, how many UTF-8 bytes the predicted targets stand for (for bits per byte, which
    is measured only where they are known)."""
    document_ids: NotRequired[Tensor]
    """`[B, N]` int64, in packed batches, which document each token belongs to."""
    key_padding: NotRequired[Tensor]
    """`[B, N]` bool, true where a token is real, in padded batches."""
    index: NotRequired[Tensor]
    """`[B]` int64, the sample's number in its dataset, for messages and the order of predictions.
    The datamodules of this library always give it."""


@final
class ImageBatch(TypedDict):
    """Images and their classes."""

    images: Tensor
    """`[B, C, H, W]` float32, normalized by the dataset's mean and standard deviation."""
    labels: Tensor
    """`[B]` int64, or `[B, num_classes]` float32 of zeros and ones where a sample has several."""
    index: NotRequired[Tensor]
    """`[B]` int64, the sample's number in its dataset, for messages and the order of predictions.
    The datamodules of this library always give it."""


@final
class AudioBatch(TypedDict):
    """Sounds and their classes."""

    waveforms: Tensor
    """`[B, S]` float32 in [-1, 1], mono, at the model's sample rate, zeros after a clip's end."""
    num_samples: NotRequired[Tensor]
    """`[B]` int64, how many of the `S` samples are real; all of them without it."""
    labels: Tensor
    """`[B]` int64, or `[B, num_classes]` float32 of zeros and ones where a sample has several."""
    index: NotRequired[Tensor]
    """`[B]` int64, the sample's number in its dataset, for messages and the order of predictions.
    The datamodules of this library always give it."""


def inputs_of(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The positional arguments of a model's `forward` for this batch: the fields that the model
    declares as its `input_fields`, or the first field of the batch where it declares none (a model
    of timm). Fields after the first may be missing: the model then has its default for them."""
    first, *others = input_fields(model, batch)
    return (batch[first], *(batch[field] for field in others if field in batch))


def input_fields(model: Any, batch: Mapping[str, Any]) -> Sequence[str]:
    """The fields of the batch that a model takes, the samples themselves first."""
    declared: Sequence[str] | None = getattr(model, "input_fields", None)
    return declared or (next(iter(batch)),)


def named_fields(
    batch: Any, layouts: Sequence[Sequence[str]], needed: Sequence[str], *, owner: str
) -> dict[str, Any]:
    """A batch as a dict of its fields, whatever a loader gives.

    Args:
        batch: A dict, a tuple or list of tensors, or a tensor.
        layouts: The names of a tuple's tensors. The first layout of its length counts; one name is
            that of a tensor alone.
        needed: The fields that a dict must have.
        owner: Who needs them, for the message.

    Raises:
        ValueError: If the batch is none of these.
    """
    if isinstance(batch, Mapping):
        missing = [name for name in needed if name not in batch]
        if not missing:
            return batch if isinstance(batch, dict) else dict(batch)
        found = f"a dict of {', '.join(map(str, batch))} without {' and '.join(missing)}"
    else:
        tensors = (batch,) if isinstance(batch, Tensor) else batch
        if not isinstance(tensors, tuple | list):
            found = f"a {type(batch).__name__}"
        elif others := [type(each).__name__ for each in tensors if not isinstance(each, Tensor)]:
            found = f"a {type(batch).__name__} with a {others[0]} in it"
        else:
            for layout in layouts:
                if len(layout) == len(tensors):
                    return dict(zip(layout, tensors, strict=True))
            found = "a tensor alone" if batch is not tensors else f"{len(tensors)} tensors"
    choices = [f"({', '.join(layout)})" if len(layout) > 1 else layout[0] for layout in layouts]
    raise ValueError(
        f"{owner} takes batches that are {' or '.join(dict.fromkeys(choices))}, or a dict with "
        f"{' and '.join(needed)}: got {found}"
    )


def size_of(batch: Any) -> int:
    """How many samples a batch has: the length of the first tensor in it that has an axis, and 0
    if there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    values = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, Mapping | tuple | list):
        return 0
    return next((size for size in map(size_of, values) if size), 0)


def samples_of(batch: Mapping[str, Any], samples: slice) -> dict[str, Any]:
    """Some of a batch's samples; what has no value for each of them stays as it is."""
    size = size_of(batch)

    def has_all(value: Any) -> bool:
        is_tensor = isinstance(value, Tensor) and value.ndim > 0
        return (is_tensor or isinstance(value, list | tuple)) and len(value) == size

    return {name: value[samples] if has_all(value) else value for name, value in batch.items()}
