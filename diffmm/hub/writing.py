"""Texts that trained models write: continuations, answers, and descriptions of media."""

import numbers
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffmm.checks import DataError, article
from diffmm.hub.texts import described
from diffmm.models.captioning import CaptioningModel
from diffmm.models.generation import stream
from diffmm.models.text import TextModel
from diffmm.tokenizers import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from diffmm.hub.trained import TrainedModel

MAX_NEW_TOKENS = 200
"""Default maximum of generated tokens of a text model."""


def written(
    trained: "TrainedModel",
    prompt: Any,
    text: str,
    *,
    chat: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    prompt_lookup_num_tokens: int | None,
) -> Iterator[str]:
    """See `TrainedModel.write`."""
    model, tokenizer = trained.model, trained.tokenizer
    if not isinstance(seed, numbers.Integral) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be a 64-bit integer, got {seed!r}")
    device = next(model.parameters()).device
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "top_k": top_k,
        "top_p": top_p,
        "generator": torch.Generator(device).manual_seed(int(seed)),
        "prompt_lookup_num_tokens": prompt_lookup_num_tokens,
    }
    if isinstance(model, CaptioningModel):
        if chat:
            raise ValueError(f"{trained.origin} describes images or sounds: chat does not apply")
        sampling["temperature"] = 0.0 if temperature is None else temperature
        items = prompt if isinstance(prompt, list) else [prompt]
        steps = described(model, trained.reader, items, text, **sampling)
    else:
        assert isinstance(model, TextModel)
        if text:
            raise ValueError(
                "text is the beginning of a caption: a text model continues its prompt"
            )
        sampling["temperature"] = 0.8 if temperature is None else temperature
        is_chat = chat or isinstance(prompt, list | tuple)
        if isinstance(prompt, list | tuple) and any(isinstance(each, str) for each in prompt):
            raise ValueError(
                "the prompt is a list with texts: give one text per call, or the messages of a "
                'conversation, such as [{"role": "user", "content": "..."}]'
            )
        steps = _continued(model, trained.reader, prompt, is_chat=is_chat, **sampling)
    decoder = StreamDecoder(tokenizer)
    for new in steps:
        yield decoder.feed(new.tolist())
    yield decoder.flush()


def tokenizer_of(trained: "TrainedModel") -> Tokenizer:
    """See `TrainedModel.tokenizer`."""
    model, origin = trained.model, trained.origin
    decoder = model.decoder if isinstance(model, CaptioningModel) else model
    if not isinstance(decoder, TextModel):
        raise ValueError(
            f"{origin} contains {article(type(model).__name__)}: only text models generate text"
        )
    if trained.job.reader is None:
        raise ValueError(f"{origin} names no tokenizer: give one (--tokenizer bytes)")
    if not hasattr(trained.reader, "encoder"):
        raise ValueError(f"the reader of {origin} has no tokenizer: give another reader")
    tokenizer: Tokenizer = trained.reader.encoder
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, but the model of "
            f"{origin} has {decoder.config.vocab_size}: give the one it was trained with "
            f"(--tokenizer)"
        )
    return tokenizer


def _continued(
    model: TextModel,
    reader: Any,
    prompt: Any,
    *,
    is_chat: bool,
    max_new_tokens: int | None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Generate the tokens after a prompt, or the answer to messages, one by one. Arguments as in
    `diffmm.models.generation.stream`."""
    if is_chat:
        ids = _question(reader, prompt)
        stop_ids: Sequence[int] = [*reader.chat.stop_ids, *reader.stop_ids]
    else:
        ids = reader.read(prompt)["tokens"]
        stop_ids = reader.end_ids
    if max_new_tokens is None:
        max_new_tokens = max(1, min(MAX_NEW_TOKENS, model.config.max_length - len(ids)))
    device = next(model.parameters()).device
    tokens = torch.as_tensor(ids, device=device)[None]
    return stream(model, tokens, max_new_tokens=max_new_tokens, stop_ids=stop_ids, **sampling)


def _question(reader: Any, messages: Any) -> Sequence[int]:
    """The tokens of messages that an answer follows."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    try:
        return reader.chat.prompt(messages)
    except DataError as error:
        raise DataError(f"the conversation {error}") from error
