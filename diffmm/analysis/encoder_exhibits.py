"""Attention maps of encoders without classes, and of decoders over what an encoder has seen."""

from collections.abc import Mapping

from torch import Tensor

from diffmm.analysis.exhibits import (
    ImageExhibit,
    SoundExhibit,
    View,
    image_view,
    pixels_of,
    sound_view,
    spectrogram_of,
)
from diffmm.analysis.word_maps import WordsExhibit, media_rows, reading_layers, word_maps
from diffmm.models import AudioModel, CaptioningModel, CTCModel, ImageModel
from diffmm.tokenizers import Tokenizer

NUM_LAYERS = 4
"""Maximum number of layers whose maps of words are shown, at equal distances up to the last."""


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


def words_exhibit(
    models: Mapping[str, CaptioningModel] | Mapping[str, CTCModel],
    sample: Tensor,
    tokenizer: Tokenizer,
    whole: ImageExhibit | SoundExhibit,
) -> WordsExhibit:
    """The maps of the first words that each model writes about one sample, in up to `NUM_LAYERS`
    layers at equal distances.

    Args:
        models: The models, by attention.
        sample: As in `encoder_exhibit`.
        tokenizer: The tokenizer of the texts.
        whole: The exhibit of the sample without words.
    """
    written = {}
    for name, model in models.items():
        depth = len(reading_layers(model))
        last = {-(-depth * number // NUM_LAYERS) - 1 for number in range(1, NUM_LAYERS + 1)}
        written[name] = word_maps(model, sample, tokenizer, layers=last)
    return WordsExhibit(whole.truth, whole.views, whole, written)


def _exhibit(
    views: Mapping[str, View], encoder: ImageModel | AudioModel, sample: Tensor, name: str
) -> ImageExhibit | SoundExhibit:
    if isinstance(encoder, ImageModel):
        return ImageExhibit(name, views, pixels_of(sample))
    return SoundExhibit(name, views, *spectrogram_of(encoder, sample))


def _caption_view(model: CaptioningModel, sample: Tensor, tokens: Tensor) -> View:
    sample, ids = sample.to(model.decoder.embedding.weight.device), tokens.tolist()
    last = len(reading_layers(model)) - 1
    return media_rows(model, sample, ids, range(len(ids)), [last])[last].mean()
