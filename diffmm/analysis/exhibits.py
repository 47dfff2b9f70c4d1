"""Attention maps of trained models for a sample, as arrays for a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffmm.analysis.attention_maps import LayerMaps, attention_maps
from diffmm.layers.stem import PatchStem
from diffmm.models import AudioModel, ImageModel, TextModel
from diffmm.models.encoder import Encoder
from diffmm.models.modes import evaluating

Array = np.ndarray


@dataclass(frozen=True)
class View:
    """The attention maps of one model, averaged over the heads of its last layer.

    Attributes:
        maps: `A`, or `A1`, `A2` and `A1 − λA2`, by name. For text `[N, M]`, from each token to each
            token; for images and sounds, from the class token, or the mean over all patches, to
            each patch of the grid.
        lam: Lambda, averaged over heads and queries; None for softmax attention.
        answer: Text of the model's prediction.
        probability: Probability of the prediction.
    """

    maps: Mapping[str, Array]
    lam: float | None
    answer: str
    probability: float


@dataclass(frozen=True)
class Exhibit:
    """A sample and the attention maps of several models.

    Attributes:
        truth: Text of the target.
        views: Views of the models, by attention.
    """

    truth: str
    views: Mapping[str, View]


@dataclass(frozen=True)
class TextExhibit(Exhibit):
    """A text; `pieces` are the texts of its tokens."""

    pieces: Sequence[str]


@dataclass(frozen=True)
class ImageExhibit(Exhibit):
    """An image; `pixels` are `[H, W]` or `[H, W, 3]` in [0, 1]."""

    pixels: Array


@dataclass(frozen=True)
class SoundExhibit(Exhibit):
    """A sound; `spectrogram` is `[bands, frames]` in [0, 1], lowest band first, cropped to the part
    that patches cover; the maps are `[rows, columns]` over it, lowest row first."""

    spectrogram: Array
    clip_seconds: float


def text_exhibit(
    models: Mapping[str, TextModel], tokens: Tensor, target: int, pieces: Sequence[str]
) -> TextExhibit:
    """Compute the attention maps of causal text models.

    Args:
        models: The models, by attention.
        tokens: Token ids, `[N]`.
        target: The next id.
        pieces: The text of every id of the vocabulary.
    """
    views = {}
    for attention, model in models.items():
        with evaluating(model), torch.no_grad():
            probabilities = model(tokens[None])[0, -1].float().softmax(-1)
        layer = attention_maps(model, tokens[None], layers=[-1])[0]
        best = int(probabilities.argmax())
        views[attention] = View(
            maps=_over_heads(layer),
            lam=_mean_lambda(layer),
            answer=pieces[best],
            probability=float(probabilities[best]),
        )
    return TextExhibit(pieces[target], views, [pieces[token] for token in tokens])


def image_exhibit(
    models: Mapping[str, ImageModel], image: Tensor, label: int, class_names: Sequence[str]
) -> ImageExhibit:
    """Compute the attention maps of image models for `image`, `[C, H, W]`, which is displayed with
    its values scaled to [0, 1]."""
    views = {
        attention: _encoder_view(model, (image[None],), model.config.grid, class_names)
        for attention, model in models.items()
    }
    pixels = unit_range(image.permute(1, 2, 0).numpy())
    return ImageExhibit(class_names[label], views, pixels[:, :, 0] if len(image) == 1 else pixels)


def sound_exhibit(
    models: Mapping[str, AudioModel], waveform: Tensor, label: int, class_names: Sequence[str]
) -> SoundExhibit:
    """Compute the attention maps of audio models for `waveform`, `[S]`, a whole clip."""
    views = {}
    for attention, model in models.items():
        spectrogram = model.spectrogram(waveform[None])[0]
        grid = model.stem.grid(spectrogram.shape[2])
        # Tokens are ordered by time first, but a picture has frequency in its rows.
        view = _encoder_view(model, (waveform[None],), grid, class_names)
        maps = {name: np.atleast_2d(weights.T) for name, weights in view.maps.items()}
        views[attention] = View(maps, view.lam, view.answer, view.probability)
        seconds = waveform.shape[0] / model.config.sample_rate_hz
    seen = unit_range(_seen(model.stem, spectrogram[0]).numpy())
    return SoundExhibit(class_names[label], views, seen, seconds)


def unit_range(values: Array) -> Array:
    """Scale `values` linearly to [0, 1]."""
    low, high = values.min(), values.max()
    return (values - low) / max(high - low, 1e-12)


def _seen(stem: nn.Module, spectrogram: Tensor) -> Tensor:
    """The part of a spectrogram `[bands, frames]` that the stem's patches cover."""
    if not isinstance(stem, PatchStem):
        return spectrogram
    top = (stem.num_bands - 1) * stem.stride[1] + stem.patch_size[1]
    return stem.fill(spectrogram[None])[0, 0].T[:top]


def _encoder_view(
    model: Encoder, inputs: tuple[Tensor, ...], grid: tuple[int, ...], class_names: Sequence[str]
) -> View:
    """The attention of the head's input to the patches of one sample, on the grid of patches."""
    with evaluating(model), torch.no_grad():
        probabilities = model(*inputs)[0].float().softmax(-1)
    layer = attention_maps(model, *inputs, layers=[-1])[0]
    num_prefix = model.num_prefix_tokens
    rows = slice(0, 1) if model.config.pool == "cls" else slice(num_prefix, None)
    best = int(probabilities.argmax())
    return View(
        maps={
            name: weights[rows, num_prefix:].mean(axis=0).reshape(grid)
            for name, weights in _over_heads(layer).items()
        },
        lam=_mean_lambda(layer),
        answer=class_names[best],
        probability=float(probabilities[best]),
    )


def _over_heads(layer: LayerMaps) -> dict[str, Array]:
    """The maps of the first sample, averaged over heads, by name."""
    maps = {"A": layer.combined}
    if layer.lam is not None:
        first, second = layer.components
        maps = {"A₁": first, "A₂": second, "A₁ − λA₂": layer.combined}
    return {name: weights[0].mean(dim=0).numpy() for name, weights in maps.items()}


def _mean_lambda(layer: LayerMaps) -> float | None:
    return None if layer.lam is None else float(layer.lam.mean())
