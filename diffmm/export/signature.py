"""Inputs and outputs of a model as an exported program, by name, with their dynamic axes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from diffmm.checks import article
from diffmm.export.decoder import CachedDecoder, PaddedText
from diffmm.models import AudioModel, TextModel, TextTower
from diffmm.models.captioning import CaptioningModel
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.ctc import CTCModel
from diffmm.models.encoder import Encoder
from diffmm.models.text import TextConfig

MOST_AXIS = 2**31 - 1
"""Largest size of an axis without a limit of its own."""


class Port(NamedTuple):
    """An input or output of a program."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    """Sizes; an axis of any size has a name."""
    least: int = 0
    """Of an input of integers: the smallest value."""
    most: int | str = 0
    """Of an input of integers: the largest value, or the axis whose size is; an example of it if
    there is none."""


class Range(NamedTuple):
    """The sizes of a dynamic axis, both ends included; one to trace the program with (at least 2,
    because axes of size 1 are broadcast), and another one to check it with."""

    least: int
    most: int
    example: int
    other: int


@dataclass(frozen=True)
class Signature:
    """A model as a program.

    Attributes:
        module: Takes the inputs in order and returns the outputs, as a tuple if there are several.
        inputs: The inputs.
        outputs: The outputs.
        axes: The dynamic axes, by name; an axis of an output alone may be a sum, such as
            `past + tokens`.
        facts: What a user of the program needs to know, in plain values, for its metadata.
    """

    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: Mapping[str, Range]
    facts: Mapping[str, Any]

    def example(self, **sizes: int) -> tuple[Tensor, ...]:
        """Random inputs of the given sizes of axes, on the module's device; the other axes have
        their example size."""
        axes = {name: axis.example for name, axis in self.axes.items()} | sizes
        random = torch.Generator().manual_seed(0)
        device = next(self.module.parameters()).device
        return tuple(_random(port, axes, random).to(device) for port in self.inputs)

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The dynamic axes of all inputs, as `torch.export.export` takes them."""
        names = {axis for port in self.inputs for axis in port.shape if isinstance(axis, str)}
        dims = {
            name: Dim(name, min=axis.least, max=axis.most)
            for name, axis in self.axes.items()
            if name in names
        }
        shapes = [
            {place: dims[axis] for place, axis in enumerate(port.shape) if isinstance(axis, str)}
            for port in self.inputs
        ]
        if isinstance(self.module, CachedDecoder):  # `*past` is one argument
            return (*shapes[:2], tuple(shapes[2:]))
        return tuple(shapes)

    def other_sizes(self) -> dict[str, int]:
        """Sizes of all axes that the program was not traced with, where their ranges allow it."""
        return {name: axis.other for name, axis in self.axes.items()}


def signature_of(model: nn.Module, *, cache: bool = True) -> Signature:
    """The inputs and outputs of a model of `diffmm.models`.

    | model | inputs | outputs |
    |---|---|---|
    | an image model | `images` `[B, C, H, W]` | `logits` `[B, num_classes]` |
    | `AudioModel` | `waveforms` `[B, S]`, `num_samples` `[B]` | `logits` `[B, num_classes]` |
    | `CTCModel` | `waveforms`, `num_samples` | `logits` `[B, T, vocab_size]`, `lengths` `[B]` |
    | `TextTower` | `tokens` `[B, N]` | `features` `[B, num_outputs]` |
    | `TextModel` | `tokens`, `key_padding` `[B, N]` | `logits` `[B, N, vocab_size]` |
    | a decoder with cache | `tokens`, `num_padding` `[B]`, `past_*` | `logits`, `present_*` |

    `past_*` are `past_key_0`, `past_value_0`, `past_key_1`, ..., each `[B, P, ...]`, and
    `present_*` likewise `[B, P + N, ...]` (see `diffmm.export.decoder.CachedDecoder`). Any other
    encoder has the inputs of its config, for samples of the size in it.

    A model without classes has the output `features` `[B, dim]` instead of `logits`.

    Args:
        model: The model, in evaluation mode.
        cache: Whether a decoder takes and returns its keys and values; false for decoders only.

    Raises:
        ValueError: If there is no program of models of this class, `cache` is false for a model
            that has none, or the model's texts are too short for a program.
    """
    if not cache and not is_decoder(model):
        raise ValueError("cache=False is for text decoders, and the model is another: leave it out")
    match model:
        case AudioModel():
            return _audio(model)
        case CTCModel():
            return _spoken(model)
        case Encoder():
            return _encoder(model)
        case TextTower():
            return _tower(model)
        case TextModel():
            return _decoder(model) if cache and is_decoder(model) else _text(model)
    name = type(model).__name__
    advice = f"of {name}, train a classifier (diffmm finetune) and export that"
    if isinstance(model, CaptioningModel | ContrastiveModel):
        advice = "it is several programs (diffmm.export.parts.signatures_of)"
    raise ValueError(f"{article(name)} cannot be exported as a program: {advice}")


def is_decoder(model: nn.Module) -> bool:
    """Whether the program of a model can have a cache."""
    return isinstance(model, TextModel) and model.config.causal


BATCH = {"batch": Range(1, MOST_AXIS, 2, 3)}


def _encoder(model: Encoder) -> Signature:
    """A model whose samples have one size."""
    shapes = model.config.input_shapes(1).items()
    inputs = tuple(Port(name, dtype, ("batch", *shape[1:])) for name, (shape, dtype) in shapes)
    return Signature(model, inputs, (_result(model),), BATCH, {})


def _audio(model: AudioModel) -> Signature:
    config = model.config
    most = MOST_AXIS if config.clip_seconds is None else config.samples_in(config.clip_seconds)
    least = min(most, least_samples(model))
    samples = Range(1, most, min(most, 2 * least), max(1, least - 1))
    inputs = (
        Port("waveforms", torch.float32, ("batch", "samples")),
        Port("num_samples", torch.int64, ("batch",), least=1, most="samples"),
    )
    facts = {"sample_rate_hz": config.sample_rate_hz}
    module = FilledClips(model, least).eval()
    return Signature(module, inputs, (_result(model),), {**BATCH, "samples": samples}, facts)


def least_samples(model: AudioModel) -> int:
    """The smallest number of samples with two frames and two tokens in time. Fewer would be another
    program, because axes of size 1 are broadcast."""
    stem, spectrogram = model.stem, model.spectrogram
    return next(
        samples
        for samples in count(spectrogram.hop_samples + 1, spectrogram.hop_samples)
        if stem.num_steps(spectrogram.num_frames(samples)) >= 2
    )


class FilledClips(nn.Module):
    """An audio model that appends silence to batches of fewer than `least` samples. The silence is
    not part of the clips, so that the results are those of `model`."""

    def __init__(self, model: AudioModel | CTCModel, least: int) -> None:
        super().__init__()
        self.model = model
        self.least = least

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        """Compute the results of `waveforms`, `[B, S]`, with `num_samples` `[B]` real samples."""
        return self.model(with_silence(waveforms, self.least), num_samples)


class SpokenClips(FilledClips):
    """A CTC model, likewise, whose outputs are a tuple: logits `[B, T, vocab_size]`, and the number
    of times within each clip, `[B]`."""

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Compute the results as `FilledClips`."""
        found = self.model(with_silence(waveforms, self.least), num_samples)
        return found.logits, found.lengths


def with_silence(waveforms: Tensor, least: int) -> Tensor:
    """Waveforms `[B, S]` with zeros up to `least` samples."""
    missing = torch.sym_max(least - waveforms.shape[1], 0)
    return torch.nn.functional.pad(waveforms, (0, missing))


def _spoken(model: CTCModel) -> Signature:
    found, config = _audio(model.encoder), model.config
    logits = Port("logits", torch.float32, ("batch", "times", config.vocab_size))
    lengths = Port("lengths", torch.int64, ("batch",))
    axes = {**found.axes, "times": tokens_of(found, model.encoder)}
    facts = {**found.facts, "blank_id": config.blank_id}
    module = SpokenClips(model, least_samples(model.encoder)).eval()
    return Signature(module, found.inputs, (logits, lengths), axes, facts)


def tokens_of(signature: Signature, model: AudioModel) -> Range:
    """The numbers of tokens of clips whose numbers of samples are those of a signature's axis."""
    axis = signature.axes["samples"]
    least = least_samples(model)
    counts = (
        math.prod(model.stem.grid(model.spectrogram.num_frames(max(size, least)))) for size in axis
    )
    return Range(*counts)


def _result(model: Encoder) -> Port:
    name, width = ("logits", model.num_classes) if model.num_classes else ("features", None)
    return Port(name, torch.float32, ("batch", width or model.num_features))


def _tower(model: TextTower) -> Signature:
    config = model.config
    tokens = _tokens(config.vocab_size)
    features = Port("features", torch.float32, ("batch", config.num_outputs))
    inputs: tuple[Port, ...] = (tokens,)
    if config.pool == "mean":
        # The pooled token of other towers says where the text ends.
        inputs += (Port("num_tokens", torch.int64, ("batch",), least=1, most="tokens"),)
    axes = {**BATCH, "tokens": _length(config.max_length)}
    return Signature(model, inputs, (features,), axes, {"max_length": config.max_length})


def _text(model: TextModel) -> Signature:
    config = model.config
    inputs = (
        _tokens(config.vocab_size),
        Port("key_padding", torch.bool, ("batch", "tokens")),
    )
    axes = {**BATCH, "tokens": _length(config.max_length)}
    return Signature(PaddedText(model).eval(), inputs, (_logits(config),), axes, _facts(config))


def _decoder(model: TextModel) -> Signature:
    config = model.config
    together = "past + tokens"
    inputs = [
        _tokens(config.vocab_size),
        Port("num_padding", torch.int64, ("batch",), most=1),
    ]
    outputs = [_logits(config)]
    for index, layer in enumerate(model.backbone.attentions):
        for part, shape in (("key", layer.k_shape), ("value", layer.v_shape)):
            inputs.append(Port(f"past_{part}_{index}", torch.float32, ("batch", "past", *shape)))
            outputs.append(
                Port(f"present_{part}_{index}", torch.float32, ("batch", together, *shape))
            )
    most = config.max_length
    if most < 4:
        raise ValueError(
            f"a program with a cache needs a max_length of at least 4, and the model's is {most}: "
            f"export it without the cache"
        )
    tokens = Range(1, most, min(7, most - 2), 1)
    past = Range(0, most - 1, min(5, most - tokens.example), min(8, most - 1))
    both = Range(1, most, past.example + tokens.example, past.other + tokens.other)
    axes = {**BATCH, "tokens": tokens, "past": past, together: both}
    module = CachedDecoder(model).eval()
    return Signature(module, tuple(inputs), tuple(outputs), axes, _facts(config))


def _tokens(vocab_size: int) -> Port:
    return Port("tokens", torch.int64, ("batch", "tokens"), most=vocab_size - 1)


def _logits(config: TextConfig) -> Port:
    return Port("logits", torch.float32, ("batch", "tokens", config.vocab_size))


def _length(max_length: int) -> Range:
    if max_length < 2:
        raise ValueError(f"a program needs a max_length of at least 2, got {max_length}")
    return Range(1, max_length, max(2, min(7, max_length - 1)), min(10, max_length))


def _facts(config: TextConfig) -> dict[str, Any]:
    return {"max_length": config.max_length, "causal": config.causal}


def _random(port: Port, axes: Mapping[str, int], random: torch.Generator) -> Tensor:
    shape = [axes[size] if isinstance(size, str) else size for size in port.shape]
    if port.dtype == torch.bool:  # texts of several lengths, padded on the left
        starts = torch.arange(shape[0])[:, None] % 2
        return torch.arange(shape[1]) >= starts
    if not port.dtype.is_floating_point:
        most = axes[port.most] if isinstance(port.most, str) else port.most
        return torch.randint(port.least, most + 1, shape, generator=random, dtype=port.dtype)
    return torch.randn(shape, generator=random, dtype=port.dtype)
