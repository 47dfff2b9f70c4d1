"""Attention maps for each word of a caption or a transcript, over the patches of its image or
sound."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmm.analysis.exhibits import Array, Exhibit, ImageExhibit, SoundExhibit, View, sound_grid
from diffmm.analysis.map_blocks import LayerInputs, visit_layers
from diffmm.analysis.text_spans import words_of
from diffmm.models import AudioModel, CaptioningModel, CTCModel, ImageModel, TextModel
from diffmm.models.cross_attention import cross_attentions
from diffmm.models.generation import generate
from diffmm.models.modes import evaluating
from diffmm.tokenizers import Tokenizer

MAX_WORDS = 6
"""Default maximum number of words."""

MAX_NEW_TOKENS = 64
"""Default maximum number of tokens of a generated caption."""

NAMES = {"A": "A", "A1": "A₁", "A2": "A₂", "A1 - lam A2": "A₁ − λA₂"}
"""Names of maps in a `View` by those in a `MapBlock`."""


@dataclass(frozen=True)
class WordMaps:
    """The attention with which a model writes one word.

    Attributes:
        word: The word.
        tokens: Indices of its tokens in the text.
        layers: Maps by the index of the layer, in order: the mean over heads and over the tokens
            of the word, laid out as the patches are. Those of sounds are `[bands, times]`, lowest
            band first.
    """

    word: str
    tokens: Sequence[int]
    layers: Mapping[int, View]


@dataclass(frozen=True)
class Written:
    """A text and the maps of its words.

    Attributes:
        text: The text.
        words: Maps of some of its words, in order.
    """

    text: str
    words: Sequence[WordMaps]


@dataclass(frozen=True)
class WordsExhibit(Exhibit):
    """A sample with the words that models write about it.

    Attributes:
        whole: The sample and the maps of a whole text, whose `truth` and `views` are also those of
            this exhibit.
        written: The texts and the maps of their words, by attention.
    """

    whole: ImageExhibit | SoundExhibit
    written: Mapping[str, Written]


class MediaRows(NamedTuple):
    """The attention of some queries of one layer to the patches of an image or sound, averaged over
    heads."""

    maps: dict[str, Array]
    """`A`, or `A₁`, `A₂` and `A₁ − λA₂`: `[R, *grid]` each."""
    lam: Array | None
    """`[R]`; None for softmax attention."""

    def mean(self, own: slice = slice(None)) -> View:
        """The mean over some of the queries, by default all."""
        return View(
            {name: each[own].mean(axis=0) for name, each in self.maps.items()},
            None if self.lam is None else float(self.lam[own].mean()),
        )


def word_maps(
    model: CaptioningModel | CTCModel,
    sample: Tensor,
    tokenizer: Tokenizer,
    tokens: Sequence[int] | None = None,
    *,
    words: Collection[str] | None = None,
    max_words: int = MAX_WORDS,
    layers: Collection[int] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Written:
    """Compute the attention maps of the words of a text over one image or sound.

    Of a captioning model, these are the maps of the decoder from the tokens that predict those of
    the word, which are one place before them: they show what the model looks at when it chooses
    the word. Their weights sum to less than 1, because the decoder attends to the text, too; with
    cross-attention, the maps are those of its layers, which attend to nothing else. Of a CTC model,
    they are the maps of the encoder from the times at which it says the word.

    Only the rows of these queries are computed, so that memory is proportional to `H M` per token
    of a word (see `diffmm.analysis.map_blocks`).

    Args:
        model: The model.
        sample: An image, `[C, H, W]`, or a waveform, `[S]`, without padding.
        tokenizer: The tokenizer of the texts.
        tokens: Ids of a caption; by default the most likely caption is generated. CTC models only
            have maps for what they hear, without this argument.
        words: Words of the text to show, each where it is first; by default the first ones.
        max_words: Maximum number of words if they are not given.
        layers: Indices of the layers in `reading_layers`, counted from the end if negative; all by
            default.
        max_new_tokens: Maximum number of tokens of a generated caption.

    Raises:
        ValueError: If the sample has the wrong number of axes, a word is not in the text, a layer
            does not exist, or tokens are given for a CTC model.
    """
    chosen = _indices(layers, len(reading_layers(model)), type(writer_of(model)).__name__)
    _check_sample(model, sample)
    sample = sample.to(next(model.parameters()).device)
    if isinstance(model, CTCModel):
        if tokens is not None:
            raise ValueError("a CTC model has maps for what it hears: leave out the text")
        with torch.no_grad(), evaluating(model):
            (spoken,) = model.aligned(model(sample[None]))
        ids = [id for id, _ in spoken]
        places = [list(times) for _, times in spoken]
    else:
        ids = _caption(model, sample, tokenizer, max_new_tokens) if tokens is None else [*tokens]
        places = [[i] for i in range(len(ids))]
    shown = words_of(tokenizer, ids)
    shown = shown[:max_words] if words is None else _named(shown, words, tokenizer.decode(ids))
    rows = [[place for i in members for place in places[i]] for _, members in shown]
    flat = [place for each in rows for place in each]
    found = media_rows(model, sample, ids, flat, chosen) if flat else {}
    ends = np.cumsum([0, *map(len, rows)])
    words_found = [
        WordMaps(
            word,
            members,
            {layer: each.mean(slice(ends[i], ends[i + 1])) for layer, each in found.items()},
        )
        for i, (word, members) in enumerate(shown)
    ]
    return Written(tokenizer.decode(ids), words_found)


def writer_of(model: CaptioningModel | CTCModel) -> TextModel | AudioModel:
    """The part of a model whose maps are those of its words: the decoder, or CTC's encoder."""
    return model.decoder if isinstance(model, CaptioningModel) else model.encoder


def reading_layers(model: CaptioningModel | CTCModel) -> list[str]:
    """Names of the attention layers whose maps are those of words, in order: the decoder's
    cross-attention if it has one, and otherwise the attention of the decoder or CTC's encoder."""
    name = "decoder" if isinstance(model, CaptioningModel) else "encoder"
    backbone = writer_of(model).backbone
    blocks: dict[int, str] = dict.fromkeys(cross_attentions(backbone), "cross_attention.attention")
    blocks = blocks or dict.fromkeys(range(len(backbone.blocks)), "attention")
    return [f"{name}.backbone.blocks.{index}.{layer}" for index, layer in blocks.items()]


def media_rows(
    model: CaptioningModel | CTCModel,
    sample: Tensor,
    tokens: Sequence[int],
    places: Sequence[int],
    layers: Collection[int],
) -> dict[int, MediaRows]:
    """Compute the attention to the patches of one image or sound, by the index of the layer.

    Args:
        model: The model.
        sample: As in `word_maps`, on the model's device.
        tokens: Ids of a caption; ignored by a CTC model.
        places: The queries: of a captioning model the indices of the predicted tokens, of a CTC
            model times.
        layers: Indices of the layers in `reading_layers`, from 0.
    """
    encoder = model.encoder
    inputs: tuple[Tensor, ...]
    if isinstance(model, CaptioningModel):
        inputs = torch.tensor([[*tokens]], device=sample.device), sample[None]
        num_media = model.num_media_tokens(sample[None])
        first, keys = model.num_prefix_tokens(sample[None]) - 1, slice(0, num_media)
    else:
        inputs = (sample[None],)
        first = encoder.num_prefix_tokens
        keys = slice(first, None)
    grid = _grid(encoder, sample)
    rows = torch.tensor(places, device=sample.device) + first
    found: dict[int, MediaRows] = {}
    names = reading_layers(model)

    def visit(layer: LayerInputs) -> None:
        if layer.name not in names or (index := names.index(layer.name)) not in layers:
            return
        parts: dict[str, list[Tensor]] = {}
        for block in layer.blocks(rows=rows):
            for name, weights in block.maps():
                parts.setdefault(NAMES[name], []).append(weights[0, :, :, keys].mean(dim=0).cpu())
        maps = {name: _laid_out(torch.cat(each).numpy(), grid) for name, each in parts.items()}
        lam = None if layer.lam is None else layer.lam[0][:, rows].mean(dim=0).cpu().numpy()
        found[index] = MediaRows(maps, lam)

    visit_layers(model, *inputs, visit=visit)
    return found


def _caption(
    model: CaptioningModel, sample: Tensor, tokenizer: Tokenizer, max_new_tokens: int
) -> list[int]:
    """The most likely caption, without its end of text."""
    room = model.config.decoder.max_length - model.num_prefix_tokens(sample[None])
    found = generate(
        model,
        media=sample[None],
        max_new_tokens=min(max_new_tokens, room),
        temperature=0.0,
        stop_ids=(tokenizer.eos_id,),
    )[0].tolist()
    return [id for id in found if id != tokenizer.eos_id]


def _named(
    found: list[tuple[str, list[int]]], words: Collection[str], text: str
) -> list[tuple[str, list[int]]]:
    """The given words, each where it is first."""
    places = dict(reversed(found))
    for word in words:
        if word not in places:
            raise ValueError(f"the word {word!r} is not in the text {text!r:.200}")
    return [(word, places[word]) for word in words]


def _indices(layers: Collection[int] | None, depth: int, name: str) -> list[int]:
    if layers is None:
        return list(range(depth))
    for index in layers:
        if not -depth <= index < depth:
            raise ValueError(
                f"layers contains {index}, but the {name} has {depth} attention layers, 0 to "
                f"{depth - 1}"
            )
    return sorted({index % depth for index in layers})


def _check_sample(model: CaptioningModel | CTCModel, sample: Tensor) -> None:
    axes = "[C, H, W]" if isinstance(model.encoder, ImageModel) else "[S]"
    if sample.ndim != axes.count(",") + 1:
        raise ValueError(
            f"maps of words are over one sample, {axes}, got shape {tuple(sample.shape)}"
        )


def _grid(encoder: ImageModel | AudioModel, sample: Tensor) -> tuple[tuple[int, ...], bool]:
    """The grid of patches, and whether its first axis is time."""
    if isinstance(encoder, ImageModel):
        return encoder.config.grid, False
    return sound_grid(encoder, sample), True


def _laid_out(weights: Array, grid: tuple[tuple[int, ...], bool]) -> Array:
    """Weights of all patches, `[R, M]`, as pictures, `[R, rows, columns]`."""
    (first, *others), is_sound = grid
    pictures = weights.reshape(len(weights), first, others[0] if others else 1)
    return pictures.transpose(0, 2, 1) if is_sound else pictures
