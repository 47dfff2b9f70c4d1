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
    num_bytes: NotRequired[Tensor]
    """`[B]` int64, the number of UTF-8 bytes of the targets. Without it, bits per byte are not
    measured."""
    document_ids: NotRequired[Tensor]
    """`[B, N]` int64, the document of each token, in packed batches."""
    key_padding: NotRequired[Tensor]
    """`[B, N]` bool, true where a token is real, in padded batches."""
    evidence: NotRequired[Tensor]
    """`[B, N]` bool, true at the tokens that hold the answers of the sample, which are its targets.
    Models and losses do not use it; the analysis of attention and retrieval does."""
    index: NotRequired[Tensor]
    """`[B]` int64, the index of each sample in its dataset, for messages and the order of
    predictions. The datamodules of this library always give it."""


@final
class ImageBatch(TypedDict):
    """Images and their classes."""

    images: Tensor
    """`[B, C, H, W]` float32, normalized by the dataset's mean and standard deviation."""
    labels: Tensor
    """`[B]` int64, or for multi-label data `[B, num_classes]` float32 of zeros and ones."""
    index: NotRequired[Tensor]
    """`[B]` int64, the index of each sample in its dataset, for messages and the order of
    predictions. The datamodules of this library always give it."""


@final
class AudioBatch(TypedDict):
    """Sounds and their classes."""

    waveforms: Tensor
    """`[B, S]` float32 in [-1, 1], mono, at the model's sample rate, padded with zeros."""
    num_samples: NotRequired[Tensor]
    """`[B]` int64, the number of real samples of each clip; without it, all are real."""
    labels: Tensor
    """`[B]` int64, or for multi-label data `[B, num_classes]` float32 of zeros and ones."""
    index: NotRequired[Tensor]
    """`[B]` int64, the index of each sample in its dataset, for messages and the order of
    predictions. The datamodules of this library always give it."""


@final
class PairBatch(TypedDict):
    """Images or sounds, each with a text that describes it.

    Training samples are images or sounds, each with one of its texts. Evaluation samples are pairs:
    an image with five texts is in five samples with the same `media_index`.

    A batch may have both, images and waveforms: its first samples are then the images, and the
    others the waveforms, in the order of the texts. `media_index` counts them separately.

    In packed batches, each row has `K` pairs: `images`, `waveforms`, `num_samples` and
    `media_index` have a second axis of this size, and `tokens` the texts one after the other.
    """

    images: NotRequired[Tensor]
    """`[B, C, H, W]` float32, as in `ImageBatch`; as many as there are in a batch with waveforms,
    too."""
    waveforms: NotRequired[Tensor]
    """`[B, S]` float32, as in `AudioBatch`; likewise."""
    num_samples: NotRequired[Tensor]
    """`[B]` int64, the number of real samples of each waveform."""
    tokens: Tensor
    """`[B, N]` int64, the ids of each text, followed by the tokenizer's `eos_id` and padded with
    it at the end."""
    num_tokens: Tensor
    """`[B]` int64, the number of real tokens of each text, including its `eos_id`."""
    media_index: Tensor
    """`[B]` int64, the index of the image or sound in its split."""
    document_ids: NotRequired[Tensor]
    """`[B, N]` int64 in packed batches, the pair in the row of each token."""
    media_documents: NotRequired[Tensor]
    """`[B, K]` int64 in packed batches, the pair in the row of each image or sound."""
    index: Tensor
    """`[B]` int64, the index of each sample in its dataset, for messages and the order of
    predictions."""


def inputs_of(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The positional arguments of a model's `forward` for a batch: the fields in the model's
    `input_fields`, or the first field of the batch if the model has no such attribute (as timm's
    models). Fields after the first may be missing: the model then uses its default."""
    first, *others = input_fields(model, batch)
    return (batch[first], *(batch[field] for field in others if field in batch))


def to_device(batch: Mapping[str, Any], device: Any) -> Any:
    """The tensors of a batch on another device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def input_fields(model: Any, batch: Mapping[str, Any]) -> Sequence[str]:
    """The names of the batch fields that a model takes, starting with the samples."""
    declared: Sequence[str] | None = getattr(model, "input_fields", None)
    return declared or (next(iter(batch)),)


def named_fields(
    batch: Any, layouts: Sequence[Sequence[str]], needed: Sequence[str], *, owner: str
) -> dict[str, Any]:
    """Convert a batch of any data loader to a dict of fields.

    Args:
        batch: A dict, a tuple or list of tensors, or a tensor.
        layouts: Accepted names of a tuple's tensors. The first layout of the same length is used; a
            layout of one name also accepts a single tensor.
        needed: Fields that a dict must contain.
        owner: Name of the class that needs the fields, for the message.

    Raises:
        ValueError: If the batch has another format; the message names the accepted ones.
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


def answer_counts(predicted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Count the answers of each sample, and those of them that are predicted exactly.

    An answer is a run of successive targets between positions without a target. It is exact if
    every token of it is.

    Args:
        predicted: Predicted token ids, `[B, N]`.
        targets: Token ids, `[B, N]`; `IGNORE_INDEX` where there is no target.

    Returns:
        The numbers of exact answers and of all answers, both `[B]` int64.

    >>> answer_counts(torch.tensor([[5, 1, 2, 4]]), torch.tensor([[-100, 1, -100, 3]]))
    (tensor([1]), tensor([2]))
    """
    is_target = targets != IGNORE_INDEX
    begins = is_target.clone()
    begins[:, 1:] &= ~is_target[:, :-1]
    num_wrong = torch.zeros_like(targets).scatter_add(
        1, (begins.cumsum(1) - 1).clamp(min=0), (is_target & (predicted != targets)).long()
    )
    num_answers = begins.sum(1)
    return num_answers - (num_wrong > 0).sum(1), num_answers


MEDIA = {"images": "image", "waveforms": "audio"}
"""Batch fields of the media that texts describe, in their order in a batch with both, and the names
of the modalities."""


def media_of(batch: Mapping[str, Any]) -> dict[str, slice]:
    """The places of the samples of each modality (`"image"`, `"audio"`) in a `PairBatch`."""
    places, first = {}, 0
    for field, name in MEDIA.items():
        if field in batch:
            places[name] = slice(first, first + len(batch[field]))
            first = places[name].stop
    return places


def size_of(batch: Any) -> int:
    """The number of samples of a batch: the length of its first tensor with a dimension; 0 if it
    has none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    if _has_all_media(batch):
        return sum(len(batch[field]) for field in MEDIA)
    values = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, Mapping | tuple | list):
        return 0
    return next((size for size in map(size_of, values) if size), 0)


def samples_of(batch: Mapping[str, Any], samples: slice) -> dict[str, Any]:
    """Select samples of a batch; fields without one value per sample are kept unchanged. `samples`
    has no step."""
    size = size_of(batch)
    if _has_all_media(batch):
        first, stop, _ = samples.indices(size)
        rest = {k: v for k, v in batch.items() if k not in (*MEDIA, "num_samples")}
        found = {"tokens": rest.pop("tokens"), **rest}
        found = {name: value[first:stop] for name, value in found.items()}
        num_images = len(batch["images"])
        if first < num_images:
            found["images"] = batch["images"][first:stop]
        if stop > num_images:
            own = slice(max(0, first - num_images), stop - num_images)
            names = [name for name in ("waveforms", "num_samples") if name in batch]
            found |= {name: batch[name][own] for name in names}
        return found

    def has_all(value: Any) -> bool:
        is_tensor = isinstance(value, Tensor) and value.ndim > 0
        return (is_tensor or isinstance(value, list | tuple)) and len(value) == size

    return {name: value[samples] if has_all(value) else value for name, value in batch.items()}


def _has_all_media(batch: Any) -> bool:
    return isinstance(batch, Mapping) and all(field in batch for field in MEDIA)
