"""The preprocessing of texts that describe images or sounds."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.shared.reader import Reader
from diffmm.checks import Settings
from diffmm.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ReadsTexts(Settings, Reader):
    """The part of a reader of pairs that encodes texts.

    Attributes:
        tokenizer: Name of the tokenizer, as in `diffmm.tokenizers.load_tokenizer`. It must have an
            end-of-text token.
        definition: The text of the `tokenizer.json`, if the tokenizer has one; see `TextReader`.
        start_ids: Ids placed before every text, such as the beginning-of-text token of CLIP.
        max_tokens: Maximum number of tokens of a text, including the end of text and `start_ids`.
            Longer texts are cut.
        pad_texts: Whether texts are padded to `max_tokens` instead of the longest of the batch, so
            that shapes are static for compiled models.

    Raises:
        ValueError: If a field is invalid; the message names the field and the value. On first use,
            as `load_tokenizer`.
    """

    tokenizer: str
    definition: str | None = None
    start_ids: tuple[int, ...] = ()
    max_tokens: int = 128
    pad_texts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokenizer", "definition"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "tokenizer" or value is not None):
                raise ValueError(f"{name} must be a string, got {value!r:.100}")
        if not all(type(id) is int for id in self.start_ids):
            raise ValueError(f"start_ids must be a list of integers, got {self.start_ids!r:.100}")
        object.__setattr__(self, "start_ids", tuple(self.start_ids))
        least = 2 + len(self.start_ids)
        if type(self.max_tokens) is not int or self.max_tokens < least:
            raise ValueError(
                f"max_tokens must be an integer of at least {least}, got {self.max_tokens}"
            )

    @cached_property
    def encoder(self) -> Tokenizer:
        """The tokenizer."""
        return load_tokenizer(self.tokenizer, self.definition)

    def read_text(self, text: Any) -> dict[str, Any]:
        """Encode a text as `{"tokens": [N], "num_tokens": N}`: `start_ids`, the ids of the text,
        and the end of text.

        Raises:
            ValueError: If `text` is not a string, or is empty.
        """
        if not isinstance(text, str):
            raise ValueError(f"a text must be a string, got {type(text).__name__}")
        ids = self.encoder.encode(text)[: self._most_ids]
        if not ids:
            raise ValueError(f"a text must have at least one token, got {text!r}")
        tokens = np.array([*self.start_ids, *ids, self.encoder.eos_id])
        return {"tokens": tokens, "num_tokens": len(tokens)}

    def is_cut(self, text: str) -> bool:
        """Whether a text has more tokens than `max_tokens`."""
        return len(self.encoder.encode(text)) > self._most_ids

    @property
    def _most_ids(self) -> int:
        return self.max_tokens - len(self.start_ids) - 1

    def collate_texts(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate results of `read_text`, padded with the end of text; without any, no field."""
        if "tokens" not in samples[0]:
            return {}
        lengths = [sample["num_tokens"] for sample in samples]
        longest = self.max_tokens if self.pad_texts else max(lengths)
        tokens = np.full((len(samples), longest), self.encoder.eos_id)
        for row, sample in zip(tokens, samples, strict=True):
            row[: sample["num_tokens"]] = sample["tokens"]
        return {"tokens": torch.from_numpy(tokens), "num_tokens": torch.tensor(lengths)}

    def describe(self) -> dict[str, Any]:
        """As `Reader.describe`, with the tokenizer's definition."""
        return Reader.describe(replace(self, definition=self.encoder.definition))
