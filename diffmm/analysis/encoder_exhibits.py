"""Attention maps of encoders without classes, and of decoders over what an encoder has seen."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from diffmm.analysis.attention_maps import attention_maps
from diffmm.analysis.exhibits import (
    ImageExhibit,
    SoundExhibit,
    View,
    image_view,
    pixels_of,
    sound_grid,
    sound_view,
    spectrogram_of,
    view_of,
)
from diffmm.models import AudioModel, CaptioningModel, ImageModel


def encoder_exhibit(
    encoders: Mapping[str, ImageModel | AudioModel], sample: Tensor, name: str
) -> ImageExhibit | SoundExhibit:
    """The attention maps of encoders of one kind over one sample, without answers.

    Args:
        encoders: The encoders, by attention.
        sample: An image, `[C, H, W]`, or a waveform, `[S]`, a whole clip.
        name: Text above the sample.
    """
    views = {
        attention: image_view(encoder, sample)
        if isinstance(encoder, ImageModel)
        else sound_view(encoder, sample)
        for attention, encoder in encoders.items()
    }
    *_, last = encoders.values()
    return _exhibit(views, last, sample, name)


def caption_exhibit(
    models: Mapping[str, CaptioningModel], sample: Tensor, tokens: Tensor, text: str
) -> ImageExhibit | SoundExhibit:
    """The attention of the decoders' last layers to the patches of one sample: the mean over the
    tokens that predict those of a text.

    Args:
        models: The captioning models, by attention.
        sample: As in `encoder_exhibit`.
        tokens: Ids of the text, `[N]`, without padding.
        text: The text itself.
    """
    views = {name: _caption_view(model, sample, tokens) for name, model in models.items()}
    *_, last = models.values()
    return _exhibit(views, last.encoder, sample, text)


def _exhibit(
    views: Mapping[str, View], encoder: ImageModel | AudioModel, sample: Tensor, name: str
) -> ImageExhibit | SoundExhibit:
    if isinstance(encoder, ImageModel):
        return ImageExhibit(name, views, pixels_of(sample))
    return SoundExhibit(name, views, *spectrogram_of(encoder, sample))


def _caption_view(model: CaptioningModel, sample: Tensor, tokens: Tensor) -> View:
    device = model.decoder.embedding.weight.device
    inputs = tokens[None].to(device), sample[None].to(device)
    found = view_of(attention_maps(model, *inputs, layers=[-1])[0])
    num_media = model.num_media_tokens(inputs[1])
    rows = slice(num_media - 1, num_media - 1 + len(tokens))  # each predicts the token after it
    means = {name: weights[rows, :num_media].mean(axis=0) for name, weights in found.maps.items()}
    encoder = model.encoder
    if isinstance(encoder, ImageModel):
        maps = {name: mean.reshape(encoder.config.grid) for name, mean in means.items()}
    else:
        grid = sound_grid(encoder, sample)
        maps = {name: np.atleast_2d(mean.reshape(grid).T) for name, mean in means.items()}
    return replace(found, maps=maps)
