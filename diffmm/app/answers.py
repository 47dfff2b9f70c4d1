"""Answers of a trained model and their attention maps as HTML, without Gradio."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from diffmm.analysis.exhibits import (
    Exhibit,
    ImageExhibit,
    Pieces,
    SoundExhibit,
    View,
    image_view,
    pixels_of,
    sound_view,
    spectrogram_of,
    text_exhibit,
    text_tower_exhibit,
)
from diffmm.analysis.report import draw_exhibit
from diffmm.analysis.word_maps import WordsExhibit, writer_of
from diffmm.hub.trained import TrainedModel
from diffmm.models import AudioModel, ImageModel
from diffmm.models.text import TextModel
from diffmm.models.text_tower import TextTower
from diffmm.recipes.errors import message_of

NUM_MAP_TOKENS = 128
"""Number of last tokens of a text whose maps are drawn."""

NUM_MAP_WORDS = 24
"""Number of first words of a caption whose maps are drawn."""

SCALE = '<span class="scale-line">negative<span class="scale"></span>positive</span>.'


def page(*parts: str) -> str:
    """An answer: parts one below the other."""
    return f'<div class="answer">{"".join(parts)}</div>'


def ranking(names: Sequence[str], shares: Sequence[float], values: Sequence[str]) -> str:
    """A table with a bar per row.

    Args:
        names: What the rows are about.
        shares: Lengths of the bars, in [0, 1].
        values: Texts after the bars.
    """
    rows = "".join(
        f'<tr><td class="what">{escape(name)}</td>'
        f'<td class="bar"><i style="width:{100.0 * share:.1f}%"></i></td>'
        f'<td class="value">{escape(value)}</td></tr>'
        for name, share, value in zip(names, shares, values, strict=True)
    )
    return f'<table class="ranking">{rows}</table>'


def player(reader: Any, file: str) -> str:
    """A player of an uploaded sound; empty for other files."""
    # A reader of images and sounds says which one a file is.
    is_sound = hasattr(reader, "sample_rate_hz") and getattr(reader, "is_sound", bool)(file)
    return f'<audio controls src="/gradio_api/file={quote(file)}"></audio>' * is_sound


def problem(error: Exception, file: str | None = None) -> str:
    """An error as one line; the path of an uploaded file is shortened to its name."""
    line = " ".join(message_of(error).split())
    if file is not None:
        line = line.replace(file, Path(file).name)
    return f'<div class="note problem" role="alert"><p>{escape(line)}</p></div>'


def section(title: str, *parts: str) -> str:
    """Parts under a heading."""
    return f"<h3>{escape(title)}</h3>{''.join(parts)}"


def refused(function: Callable[..., str]) -> Callable[..., str]:
    """Show the errors of bad input (`ValueError`, `OSError`) and of too little memory as one line
    in place of the answer. The function's first argument is an uploaded file or a text."""

    @wraps(function)
    def wrapped(first: str | None, *others: Any) -> str:
        try:
            return function(first, *others)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            return page(problem(error, first))

    return wrapped


def maps_section(
    title: str, caption: str, draw: Callable[[], Exhibit], *, of: str = "sample"
) -> str:
    """The attention maps of an exhibit, or the reason why there are none; those of each `of` have
    one scale."""
    try:
        drawn = draw_exhibit(draw())
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        return section(title, problem(error))
    return section(
        title,
        f'<p class="quiet">{caption} {SCALE} All maps of a {of} have the same scale.</p>',
        drawn,
    )


def medium_maps(tower: ImageModel | AudioModel, reader: Any, file: str, layer: int) -> Exhibit:
    """The attention maps of an image or audio encoder over a file.

    Args:
        tower: The encoder.
        reader: Reader of its inputs.
        file: Path of the file.
        layer: Index of the attention layer.
    """
    sample, attention = sample_of(reader, file), tower.config.backbone.attention
    view = (
        image_view(tower, sample, layer=layer)
        if isinstance(tower, ImageModel)
        else sound_view(tower, sample, layer=layer)
    )
    return medium_exhibit(tower, sample, file, {attention: view})


def word_maps(trained: TrainedModel, file: str, text: str | None, layer: int) -> Exhibit:
    """The attention maps of the words of a text about a file.

    Args:
        trained: A captioning or CTC model.
        file: Path of the file.
        text: As in `TrainedModel.word_maps`.
        layer: Index of the layer.
    """
    model: Any = trained.model
    written = trained.word_maps(file, text, max_words=NUM_MAP_WORDS, layers=[layer])
    whole = medium_exhibit(model.encoder, sample_of(trained.reader, file), file, {})
    attention = writer_of(model).config.backbone.attention
    return WordsExhibit(whole.truth, {}, whole, {attention: written})


def sample_of(reader: Any, file: str) -> Tensor:
    """The image, `[C, H, W]`, or the waveform, `[S]`, in a file."""
    batch = reader.collate([reader.read(file)])
    if "images" in batch:
        image: Tensor = batch["images"][0]
        return image
    waveform: Tensor = batch["waveforms"][0, : int(batch["num_samples"][0])]
    return waveform


def medium_exhibit(
    tower: ImageModel | AudioModel, sample: Tensor, file: str, views: Mapping[str, View]
) -> ImageExhibit | SoundExhibit:
    """The sample of a file with maps over it."""
    name = Path(file).name
    if isinstance(tower, ImageModel):
        return ImageExhibit(name, views, pixels_of(sample))
    return SoundExhibit(name, views, *spectrogram_of(tower, sample))


def prompt_maps(trained: TrainedModel, ids: Sequence[int], layer: int) -> Exhibit:
    """The attention maps of a decoder over the last tokens of a prompt."""
    model = trained.model
    assert isinstance(model, TextModel)
    tokens = torch.as_tensor(ids)[-NUM_MAP_TOKENS:]
    attention = model.config.backbone.attention
    return text_exhibit({attention: model}, tokens, None, Pieces(trained.tokenizer), layer=layer)


def text_maps(tower: TextTower, reader: Any, text: str, layer: int) -> Exhibit:
    """The attention maps of a contrastive model's text tower over a text."""
    tokens = torch.as_tensor(reader.read_text(text)["tokens"])
    attention = tower.config.backbone.attention
    return text_tower_exhibit({attention: tower}, tokens, Pieces(reader.encoder), layer=layer)


def growing(prompt: str, pieces: Iterator[str]) -> Iterator[str]:
    """A text that grows by pieces, each time as HTML.

    Args:
        prompt: The text before the first piece; empty for an answer.
        pieces: The pieces.
    """
    text = ""
    yield _written(prompt, text)
    for piece in pieces:
        text += piece
        if piece:
            yield _written(prompt, text)


def _written(prompt: str, text: str) -> str:
    words = f'<span class="prompt">{escape(prompt)}</span><span class="new">{escape(text)}</span>'
    return page(f'<div class="written">{words}</div>')
