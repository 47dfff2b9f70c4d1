"""Texts that models give to images and sounds: captions and transcripts."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffmm.batch import inputs_of, to_device
from diffmm.checks import DataError
from diffmm.hub.predictions import Caption, Reading
from diffmm.models.captioning import CaptioningModel
from diffmm.models.ctc import CTCModel
from diffmm.models.generation import generate, stream
from diffmm.tokenizers import Tokenizer, until


class Writer(Reading[str]):
    """Gives each input a text."""

    def prediction(self, result: str, file: str | None) -> Caption:
        return Caption(result, file)


class Captioner(Writer):
    """Describes images, or transcribes sounds, batch by batch.

    Args:
        model: A captioning model, in evaluation mode.
        reader: Reader of the model's inputs, with its tokenizer (see `diffmm.hub.readers`).
    """

    def __init__(self, model: CaptioningModel, reader: Any) -> None:
        super().__init__(model, reader)
        self.captioning = model

    @torch.inference_mode()
    def results(self, samples: list[dict[str, Any]]) -> list[str]:
        media = media_of(self.captioning, self.reader, samples)
        eos_id = self.reader.encoder.eos_id
        found = generate(
            self.captioning,
            **media,
            max_new_tokens=room(self.captioning, self.reader, media["media"], 0),
            temperature=0.0,
            stop_ids=(eos_id,),
        )
        return texts_of(found, self.reader.encoder, eos_id)


class Transcriber(Writer):
    """Transcribes sounds by greedy decoding of a CTC model, batch by batch.

    Args:
        model: The model, in evaluation mode.
        reader: Reader of the model's inputs, with its tokenizer (see `diffmm.hub.readers`).
    """

    def __init__(self, model: CTCModel, reader: Any) -> None:
        super().__init__(model, reader)
        self.ctc = model

    @torch.inference_mode()
    def results(self, samples: list[dict[str, Any]]) -> list[str]:
        device = self.ctc.head.weight.device
        batch = to_device(self.reader.collate(samples), device)
        rows = self.ctc.greedy(self.ctc(*inputs_of(self.ctc, batch)))
        return [self.reader.encoder.decode(row) for row in rows]


def texts_of(rows: Tensor, tokenizer: Tokenizer, eos_id: int) -> list[str]:
    """Decode each row of ids, `[B, T]`, up to its first end of text."""
    return [tokenizer.decode(row) for row in until(rows.tolist(), eos_id)]


def media_of(
    model: CaptioningModel | CTCModel, reader: Any, samples: list[dict[str, Any]]
) -> dict[str, Any]:
    """The media of read samples, one per row, as arguments of `generate`."""
    device = next(model.parameters()).device
    batch = to_device(reader.collate(samples), device)
    media, *others = inputs_of(model.encoder, batch)
    return {"media": media, "num_samples": others[0] if others else None}


def room(model: CaptioningModel, reader: Any, media: Tensor, num_tokens: int) -> int:
    """The number of tokens to generate at most: that of the training texts, or what media and a
    prompt of `num_tokens` leave of `max_length`.

    Raises:
        ValueError: If they leave nothing.
    """
    longest = model.config.decoder.max_length
    num_prefix = model.num_prefix_tokens(media)
    used = num_prefix + num_tokens
    if used >= longest:
        before = model.prefix_name(num_prefix)
        raise ValueError(
            f"{before} and {num_tokens} of the prompt leave nothing of the decoder's max_length="
            f"{longest}: give fewer or shorter ones"
        )
    return min(reader.max_tokens, longest - used)


def described(
    model: CaptioningModel,
    reader: Any,
    items: Sequence[Any],
    text: str,
    *,
    max_new_tokens: int | None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Generate the text of images or sounds that are in one prompt, token by token.

    Args:
        model: The captioning model.
        reader: Reader of the model's inputs, with its tokenizer.
        items: The images or sounds, in order.
        text: The beginning of the text, which may be empty.
        max_new_tokens: Maximum number of tokens; by default as `room`.
        sampling: As in `diffmm.models.generation.stream`.

    Raises:
        ValueError: If an item cannot be read, there is none, or all are too long.
    """
    if not items:
        raise DataError("there is no image or sound to describe: give at least one")
    media = media_of(model, reader, [reader.read(item) for item in items])
    # All of them in one row.
    media = {name: None if value is None else value[None] for name, value in media.items()}
    prompt = torch.tensor(
        [[*reader.start_ids, *reader.encoder.encode(text)] if text else []],
        dtype=torch.int64,
        device=media["media"].device,
    )
    if max_new_tokens is None:
        max_new_tokens = room(model, reader, media["media"], prompt.shape[1])
    eos_id = reader.encoder.eos_id
    return stream(
        model, prompt, **media, max_new_tokens=max_new_tokens, stop_ids=(eos_id,), **sampling
    )
