"""Attention maps of a trained model for one input, and for the words that it writes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffmm.analysis.attention_maps import LayerMaps, attention_maps
from diffmm.analysis.word_maps import MAX_WORDS, Written, word_maps
from diffmm.batch import inputs_of, to_device
from diffmm.checks import article
from diffmm.hub.texts import media_of, room
from diffmm.hub.trained import TrainedModel
from diffmm.hub.zero_shot import by_tower
from diffmm.models.captioning import CaptioningModel
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.ctc import CTCModel
from diffmm.models.generation import generate


def input_maps(
    trained: TrainedModel, item: Any, layers: Sequence[int] | None, text: str | None
) -> list[LayerMaps]:
    """See `TrainedModel.attention_maps`."""
    model, samples = trained.model, [trained.reader.read(item)]
    if isinstance(model, CaptioningModel):
        media = media_of(model, trained.reader, samples)
        tokens = _ids_of(trained, text, media)[None]
        return attention_maps(model, tokens, *media.values(), layers=layers)
    if text is not None:
        raise ValueError("text is what a captioning model writes about the input: leave it out")
    if isinstance(model, ContrastiveModel):
        ((tower, _, inputs),) = by_tower(model, trained.reader, samples)
        return attention_maps(model.towers[tower], *inputs, layers=layers)
    device = next(model.parameters()).device
    batch = to_device(trained.reader.collate(samples), device)
    return attention_maps(model, *inputs_of(model, batch), layers=layers)


def maps_of_words(
    trained: TrainedModel,
    item: Any,
    text: str | None,
    *,
    words: Sequence[str] | None,
    max_words: int | None,
    layers: Sequence[int] | None,
) -> Written:
    """See `TrainedModel.word_maps`."""
    model = trained.model
    if not isinstance(model, CaptioningModel | CTCModel):
        raise ValueError(
            f"{trained.origin} contains {article(type(model).__name__)}: only captioning and CTC "
            f"models have maps of words (attention_maps has those of the input)"
        )
    media = media_of(model, trained.reader, [trained.reader.read(item)])
    tokens: list[int] | None = None
    if isinstance(model, CaptioningModel):
        tokens = _ids_of(trained, text, media).tolist()
    elif text is not None:
        raise ValueError("a CTC model has maps for what it hears: leave out the text")
    (sample,), num_samples = media["media"], media["num_samples"]
    if num_samples is not None:
        sample = sample[: int(num_samples[0])]
    return word_maps(
        model,
        sample,
        trained.reader.encoder,
        tokens,
        words=words,
        max_words=MAX_WORDS if max_words is None else max_words,
        layers=layers,
    )


def _ids_of(trained: TrainedModel, text: str | None, media: Mapping[str, Any]) -> Tensor:
    """The tokens of a text about media, or of the one that is generated, with its end."""
    model, tokenizer = trained.model, trained.tokenizer
    assert isinstance(model, CaptioningModel)
    most = room(model, trained.reader, media["media"], 0)
    device = media["media"].device
    if text is not None:
        return torch.as_tensor(trained.reader.read_text(text)["tokens"][:most], device=device)
    stop_ids = (tokenizer.eos_id,)
    return generate(model, **media, max_new_tokens=most, temperature=0.0, stop_ids=stop_ids)[0]
