"""The reader of text for evaluation and generation."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.files import read_text
from datamodules.shared.reader import Reader
from datamodules.text.chat import ChatTemplate
from diffmm.checks import DataError
from diffmm.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class TextReader(Reader):
    """Encodes text as the ids of a tokenizer.

    Attributes:
        tokenizer: Name of the tokenizer, as in `diffmm.tokenizers.load_tokenizer`.
        definition: The text of the `tokenizer.json`, if the tokenizer has one. It is stored with
            the weights, because the file or the hub may not be available when they are used.
        start_ids: Ids placed before every text, such as the beginning-of-text token that many
            models of other implementations were trained with.
        chat_template: The template of conversations that the model was trained with, if it was (see
            `datamodules.text.chat`).
        stop_ids: Ids that end a generated text or an answer, if it is not the tokenizer's
            end-of-text token alone. `describe` adds those that the template ends an answer with.

    Raises:
        ValueError, FileNotFoundError: On first use, as `load_tokenizer`.
    """

    class_path: ClassVar[str] = "datamodules.text.TextReader"
    extensions: ClassVar[tuple[str, ...]] = (".txt",)
    kind: ClassVar[str] = "text"

    tokenizer: str
    definition: str | None = None
    start_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tokenizer", "definition", "chat_template"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "tokenizer" or value is not None):
                raise ValueError(f"{name} must be a string, got {value!r:.100}")
        for name in ("start_ids", "stop_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, list | tuple) or not all(type(id) is int for id in ids):
                raise ValueError(f"{name} must be a list of integers, got {ids!r:.100}")

    @cached_property
    def encoder(self) -> Tokenizer:
        """The tokenizer."""
        return load_tokenizer(self.tokenizer, self.definition)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a generated text."""
        return tuple(self.stop_ids) or (self.encoder.eos_id,)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The template of conversations.

        Raises:
            ValueError: If there is none, or it is not valid.
        """
        if self.chat_template is None:
            raise ValueError(
                "the model was not trained on conversations: continue a prompt instead, or "
                "instruction-tune it (recipe text/instruct)"
            )
        return ChatTemplate(self.chat_template, self.encoder)

    def read(self, item: Any) -> dict[str, Any]:
        """Encode a text as `{"tokens": [N]}`.

        Args:
            item: The text, or the `pathlib.Path` of a UTF-8 file.

        Raises:
            BadSampleError: If the file cannot be read; the message names it.
            ValueError: If `item` has another type, or the text is empty or not UTF-8.
        """
        if isinstance(item, Path):
            try:
                item = read_text(item, "text")
            except (DataError, FileNotFoundError) as error:
                raise BadSampleError(str(error), item) from error
        if not isinstance(item, str):
            raise ValueError(f"a prompt must be a string or a Path, got {type(item).__name__}")
        try:
            ids = self.encoder.encode(item)
        except UnicodeEncodeError as error:  # as Python reads bytes from stdin that are no text
            raise ValueError(
                f"the prompt is not UTF-8 text, from character {error.start} on: convert it first "
                f"(iconv -t UTF-8)"
            ) from error
        if not ids:
            raise ValueError("the prompt is empty: it needs at least one character")
        return {"tokens": np.array([*self.start_ids, *ids])}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate prompts, padded on the left as generation requires, with `key_padding`."""
        longest = max(len(sample["tokens"]) for sample in samples)
        tokens = np.full((len(samples), longest), self.encoder.eos_id)
        for row, sample in zip(tokens, samples, strict=True):
            row[longest - len(sample["tokens"]) :] = sample["tokens"]
        lengths = torch.tensor([len(sample["tokens"]) for sample in samples])
        is_real = torch.arange(longest) >= longest - lengths[:, None]
        return {"tokens": torch.from_numpy(tokens), "key_padding": is_real}

    def describe(self) -> dict[str, Any]:
        """As `Reader.describe`, with the tokenizer's definition and `stop_ids`.

        Raises:
            ValueError: If the template is not valid, or does not accept a question and its answer.
        """
        stop_ids = tuple(self.stop_ids)
        if self.chat_template is not None:
            try:
                stop_ids = tuple(dict.fromkeys([*stop_ids, *self.chat.stop_ids]))
            except DataError as error:
                raise ValueError(
                    f"it is unknown what ends an answer: a question with its answer {error}"
                ) from error
        definition = self.encoder.definition
        return Reader.describe(replace(self, definition=definition, stop_ids=stop_ids))


def within(tokenizer: Tokenizer, vocab_size: int | None) -> Tokenizer:
    """The tokenizer, if a model with this vocabulary can represent its tokens.

    Raises:
        ValueError: If the tokenizer exceeds `vocab_size`.
    """
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, which exceeds the "
            f"model's vocab_size of {vocab_size}"
        )
    return tokenizer
