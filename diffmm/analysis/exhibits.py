"""Attention maps of trained models for a sample, as arrays for a report or a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffmm.analysis.attention_maps import LayerMaps, attention_maps
from diffmm.layers.stem import PatchStem
from diffmm.models import AudioModel, ImageModel, TextModel
from diffmm.models.encoder import Encoder
from diffmm.models.modes import evaluating
from diffmm.models.text_tower import TextTower

Array = np.ndarray


@dataclass(frozen=True)
class View:
    """The attention maps of one model, averaged over the heads of one layer, usually the last.

    Attributes:
        maps: `A`, or `A1`, `A2` and `A1 − λA2`, by name. For text `[N, M]`, from each token to each
            token; for images and sounds, from the class token, or the mean over all patches, to
            each patch of the grid.
        lam: Lambda, averaged over heads and queries; None for softmax attention.
        answer: Text of the model's prediction; None if it is shown elsewhere.
        probability: Probability of the prediction.
    """

    maps: Mapping[str, Array]
    lam: float | None
    answer: str | None = None
    probability: float = 1.0


@dataclass(frozen=True)
class Exhibit:
    """A sample and the attention maps of several models.

    Attributes:
        truth: Text of the target, or the name of a sample without one; None for a text that is
            not continued.
        views: Views of the models, by attention.
    """

    truth: str | None
    views: Mapping[str, View]


@dataclass(frozen=True)
class TextExhibit(Exhibit):
    """A text.

    Attributes:
        pieces: The texts of its tokens.
        query: Index of the token whose weights are drawn over the text; None for the mean over all
            tokens.
    """

    pieces: Sequence[str]
    query: int | None = -1


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


class Pieces:
    """Maps the ids of a tokenizer to the printable text that each adds to a text: of a word, with
    the space before it.

    Args:
        tokenizer: A tokenizer (`diffmm.tokenizers.Tokenizer`).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getitem__(self, token: Any) -> str:
        alone, twice = (self.tokenizer.decode([int(token)] * count) for count in (1, 2))
        text: str = twice[len(alone) :]
        # Special tokens have no text.
        return text if (text and text.isprintable()) or text in ("\n", "\t") else "·"


def text_exhibit(
    models: Mapping[str, TextModel],
    tokens: Tensor,
    target: int | None,
    pieces: Sequence[str] | Pieces,
    *,
    layer: int = -1,
    query: int = -1,
) -> TextExhibit:
    """Compute the attention maps of text models.

    Args:
        models: The models, by attention.
        tokens: Token ids, `[N]`.
        target: The id that is to be predicted; None if it is unknown.
        pieces: The text of every id of the vocabulary.
        layer: Index of the attention layer.
        query: Index of the token whose prediction and weights are shown: of a causal model the
            last one, of an encoder one that is masked.
    """
    views = {}
    for attention, model in models.items():
        inputs = tokens[None].to(model.embedding.weight.device)
        with evaluating(model), torch.no_grad():
            probabilities = model(inputs)[0, query].float().softmax(-1)
        best = int(probabilities.argmax())
        views[attention] = replace(
            view_of(attention_maps(model, inputs, layers=[layer])[0]),
            answer=pieces[best],
            probability=float(probabilities[best]),
        )
    truth = None if target is None else pieces[target]
    return TextExhibit(truth, views, [pieces[token] for token in tokens], query)


def text_tower_exhibit(
    towers: Mapping[str, TextTower],
    tokens: Tensor,
    pieces: Sequence[str] | Pieces,
    *,
    layer: int = -1,
) -> TextExhibit:
    """Compute the attention maps of text towers for one text, with the pooled token as the query.

    Args:
        towers: The towers, of one kind of pooling, by attention.
        tokens: Token ids without padding, `[N]`.
        pieces: The text of every id of the vocabulary.
        layer: Index of the attention layer.
    """
    views: dict[str, View] = {}
    query: int | None = None
    for attention, tower in towers.items():
        inputs = tokens[None].to(tower.embedding.weight.device)
        views[attention] = view_of(attention_maps(tower, inputs, layers=[layer])[0])
        query = None if tower.config.pool == "mean" else int(tower.at(inputs))
    return TextExhibit(None, views, [pieces[token] for token in tokens], query)


def image_exhibit(
    models: Mapping[str, ImageModel], image: Tensor, label: int, class_names: Sequence[str]
) -> ImageExhibit:
    """Compute the attention maps of image classifiers for `image`, `[C, H, W]`, which is displayed
    with its values scaled to [0, 1]."""
    views = {
        attention: _with_answer(image_view(model, image), model, image, class_names)
        for attention, model in models.items()
    }
    return ImageExhibit(class_names[label], views, pixels_of(image))


def image_view(model: ImageModel, image: Tensor, *, layer: int = -1) -> View:
    """The attention of the head's input, or of the projection's, to the patches of `image`,
    `[C, H, W]`, in one layer; without an answer."""
    return _encoder_view(model, image, model.config.grid, layer)


def pixels_of(image: Tensor) -> Array:
    """The pixels of `image`, `[C, H, W]`, scaled to [0, 1], as in `ImageExhibit`."""
    pixels = unit_range(image.permute(1, 2, 0).cpu().numpy())
    return pixels[:, :, 0] if len(image) == 1 else pixels


def sound_exhibit(
    models: Mapping[str, AudioModel], waveform: Tensor, label: int, class_names: Sequence[str]
) -> SoundExhibit:
    """Compute the attention maps of audio classifiers for `waveform`, `[S]`, a whole clip."""
    views = {
        attention: _with_answer(sound_view(model, waveform), model, waveform, class_names)
        for attention, model in models.items()
    }
    *_, last = models.values()
    return SoundExhibit(class_names[label], views, *spectrogram_of(last, waveform))


def sound_view(model: AudioModel, waveform: Tensor, *, layer: int = -1) -> View:
    """As `image_view`, for `waveform`, `[S]`."""
    view = _encoder_view(model, waveform, sound_grid(model, waveform), layer)
    # Tokens are ordered by time first, but a picture has frequency in its rows.
    maps = {name: np.atleast_2d(weights.T) for name, weights in view.maps.items()}
    return replace(view, maps=maps)


def sound_grid(model: AudioModel, waveform: Tensor) -> tuple[int, ...]:
    """The grid of the patches of `waveform`, `[S]`: patches or frames in time, and in frequency."""
    grid: tuple[int, ...] = model.stem.grid(_spectrogram(model, waveform).shape[2])
    return grid


def spectrogram_of(model: AudioModel, waveform: Tensor) -> tuple[Array, float]:
    """The spectrogram of `waveform`, `[S]`, as in `SoundExhibit`, and its length in seconds."""
    seen = unit_range(_seen(model.stem, _spectrogram(model, waveform)[0]).cpu().numpy())
    return seen, waveform.shape[0] / model.config.sample_rate_hz


def unit_range(values: Array) -> Array:
    """Scale `values` linearly to [0, 1]."""
    low, high = values.min(), values.max()
    return (values - low) / max(high - low, 1e-12)


def _spectrogram(model: AudioModel, waveform: Tensor) -> Tensor:
    """The log-mel spectrogram of a waveform, `[1, bands, frames]`."""
    with torch.no_grad():
        return model.spectrogram(waveform[None].to(_device(model)))[0]


def _seen(stem: nn.Module, spectrogram: Tensor) -> Tensor:
    """The part of a spectrogram `[bands, frames]` that the stem's patches cover."""
    if not isinstance(stem, PatchStem):
        return spectrogram
    top = (stem.num_bands - 1) * stem.stride[1] + stem.patch_size[1]
    return stem.fill(spectrogram[None])[0, 0].T[:top]


def _encoder_view(model: Encoder, sample: Tensor, grid: tuple[int, ...], layer: int) -> View:
    """The attention of the head's input to the patches of one sample, on the grid of patches."""
    found = view_of(attention_maps(model, sample[None].to(_device(model)), layers=[layer])[0])
    num_prefix = model.num_prefix_tokens
    rows = slice(0, 1) if model.config.pool == "cls" else slice(num_prefix, None)
    maps = {
        name: weights[rows, num_prefix:].mean(axis=0).reshape(grid)
        for name, weights in found.maps.items()
    }
    return replace(found, maps=maps)


def _with_answer(view: View, model: Encoder, sample: Tensor, class_names: Sequence[str]) -> View:
    """A view with the most likely class of a sample."""
    with evaluating(model), torch.no_grad():
        probabilities = model(sample[None].to(_device(model)))[0].float().softmax(-1)
    best = int(probabilities.argmax())
    return replace(view, answer=class_names[best], probability=float(probabilities[best]))


def view_of(layer: LayerMaps) -> View:
    """The maps of the first sample, averaged over heads, without an answer."""
    maps, lam = {"A": layer.combined}, layer.lam
    if lam is not None:
        first, second = layer.components
        maps = {"A₁": first, "A₂": second, "A₁ − λA₂": layer.combined}
    return View(
        {name: weights[0].mean(dim=0).cpu().numpy() for name, weights in maps.items()},
        None if lam is None else float(lam.mean()),
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
