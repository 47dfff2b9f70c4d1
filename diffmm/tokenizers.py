"""Tokenizers: a built-in byte tokenizer, and all tokenizers of Hugging Face `tokenizers`."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffmm.checks import did_you_mean

if TYPE_CHECKING:
    import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

EOS_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)
MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")


class Tokenizer(ABC):
    """Base class of tokenizers.

    Special tokens (end of text, mask, padding) never represent text: `encode` produces none, even
    if a text contains the name of one, and `decode` skips them.
    """

    name: str
    """The name passed to `load_tokenizer`."""
    vocab_size: int
    """The largest id plus one."""
    special_ids: frozenset[int]
    """The ids of special tokens."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The end-of-text id. Raises `ValueError` if the tokenizer has none."""

    @property
    @abstractmethod
    def mask_id(self) -> int:
        """The mask id for masked training. Raises `ValueError` if the tokenizer has none."""

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """The padding id, or the end-of-text id if the tokenizer has none."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that is equal for tokenizers that produce the same tokens."""

    @property
    def definition(self) -> str | None:
        """A text that recreates this tokenizer without its file (see `load_tokenizer`); `None` for
        a built-in tokenizer."""
        return None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Encode several texts, in parallel if the tokenizer supports it."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`, with U+FFFD for invalid UTF-8. Ids beyond the vocabulary, which a model may
        generate if its vocabulary is larger, are skipped."""

    @cached_property
    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """Number of UTF-8 bytes of text per id, `[vocab_size]`; 0 for special ids.

        If the tokenizer is lossless, their sum over the ids of a text is the length of the text.
        Otherwise (WordPiece, lowercasing) each id counts as the bytes that it adds to the decoded
        text.
        """

    @property
    @abstractmethod
    def eos_name(self) -> str:
        """The text that stands for the end-of-text token in `encode_marked`."""

    @property
    def bos_name(self) -> str:
        """The text that stands for the beginning-of-text token; empty if there is none."""
        return ""

    @abstractmethod
    def encode_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text in which the names of special tokens stand for these, as in the templates
        of conversations.

        Returns:
            The ids, and the first character of each in `text` and the one after its last.
        """

    def encode(self, text: str) -> list[int]:
        """Encode `text` as ids."""
        return self.encode_batch([text])[0].tolist()

    def num_bytes(self, ids: Iterable[int]) -> int:
        """Number of UTF-8 bytes of text that `ids` represent; see `byte_lengths`."""
        return int(self.byte_lengths[np.fromiter(ids, np.int64)].sum())


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, followed by end of text, mask and padding."""

    name = "bytes"
    vocab_size = 259
    eos_id, mask_id, pad_id = 256, 257, 258
    special_ids = frozenset((256, 257, 258))
    fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    eos_name = "<|endoftext|>"

    def encode_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        start = 0
        for number, part in enumerate(text.split(self.eos_name)):
            if number:
                ids.append(self.eos_id)
                places.append((start, start + len(self.eos_name)))
                start += len(self.eos_name)
            for place, character in enumerate(part, start):
                coded = character.encode()
                ids += coded
                places += [(place, place + 1)] * len(coded)
            start += len(part)
        return ids, places

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(id for id in ids if id < 256).decode(errors="replace")

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        return (np.arange(self.vocab_size) < 256).astype(np.int64)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        name: Name of the tokenizer, as in `load_tokenizer`.
        inner: The library's tokenizer. Special tokens are recognized by their usual names.
    """

    def __init__(self, name: str, inner: "tokenizers.Tokenizer") -> None:
        # A tokenizer file may enable these, but datamodules cut and pad sequences.
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True
        self.name = name
        self._inner = inner
        self._ids: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        self.special_ids = frozenset(
            id for id, token in inner.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def of_definition(cls, name: str, definition: str) -> "HuggingFaceTokenizer":
        """Create a tokenizer from the text of its `tokenizer.json`.

        Raises:
            ValueError: If it is not the text of a tokenizer.
        """
        from tokenizers import Tokenizer as Inner

        try:
            return cls(name, Inner.from_str(definition))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"the definition of tokenizer {name!r} is invalid: {error}") from error

    @property
    def eos_id(self) -> int:
        return self._special("end-of-text", EOS_NAMES)

    def find_eos(self) -> int | None:
        """`eos_id`, or None if no token has a usual name of it."""
        return next((self._ids[name] for name in EOS_NAMES if name in self._ids), None)

    @property
    def special_names(self) -> dict[str, str]:
        """The names of the tokens that end, mask, pad and start a text, as far as there are such,
        by the keys of Hugging Face's `tokenizer_config.json`."""
        kinds = {"eos_token": EOS_NAMES, "mask_token": MASK_NAMES, "pad_token": PAD_NAMES}
        known = {kind: [n for n in names if n in self._ids] for kind, names in kinds.items()}
        known["bos_token"] = [n for n, id in self._ids.items() if id in self.start_ids[:1]]
        return {kind: names[0] for kind, names in known.items() if names}

    @property
    def mask_id(self) -> int:
        return self._special("mask", MASK_NAMES)

    @property
    def pad_id(self) -> int:
        known = [self._ids[name] for name in PAD_NAMES if name in self._ids]
        return known[0] if known else self.eos_id

    @cached_property
    def definition(self) -> str:
        return self._inner.to_str()

    @property
    def start_ids(self) -> tuple[int, ...]:
        """The ids that the tokenizer's own post-processor places before a text, such as a
        beginning-of-text token; `encode` leaves them out."""
        return self.added_ids[0]

    @cached_property
    def added_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the tokenizer's own post-processor places before and after a text."""
        plain = self._inner.encode("a", add_special_tokens=False).ids
        whole = self._inner.encode("a").ids
        length = len(plain)
        starts = [n for n in range(len(whole)) if whole[n : n + length] == plain]
        if not starts:
            return (), ()
        return tuple(whole[: starts[0]]), tuple(whole[starts[0] + length :])

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.definition.encode()).hexdigest()[:16]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    @property
    def eos_name(self) -> str:
        return next(name for name in EOS_NAMES if self._ids.get(name) == self.eos_id)

    @property
    def bos_name(self) -> str:
        return self.special_names.get("bos_token", "")

    @cached_property
    def _marking(self) -> "tokenizers.Tokenizer":
        """The same tokenizer, which recognizes special tokens."""
        from tokenizers import Tokenizer as Inner

        return Inner.from_str(self.definition)

    def encode_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._marking.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int]) -> str:
        return self._inner.decode([id for id in ids if id < self.vocab_size])

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        from tokenizers.pre_tokenizers import ByteLevel

        lengths = np.zeros(self.vocab_size, np.int64)
        steps = _decoder_steps(self._inner)
        alphabet = frozenset(ByteLevel.alphabet()) if "ByteLevel" in steps else frozenset()
        in_context = []
        for token, id in self._ids.items():
            if id in self.special_ids:
                continue
            if alphabet.issuperset(token):  # each character of this alphabet represents a byte
                lengths[id] = len(token)
            elif "ByteFallback" in steps and len(token) == 6 and token.startswith("<0x"):
                lengths[id] = 1
            else:
                in_context.append(id)
        if in_context:
            # The first token may lose its leading space: measure what a second token adds.
            first = in_context[0]
            texts = self._inner.decode_batch([[first], *([first, id] for id in in_context)])
            alone, *pairs = (len(text.encode()) for text in texts)
            lengths[in_context] = np.array(pairs) - alone
        return lengths

    def _special(self, what: str, names: tuple[str, ...]) -> int:
        for name in names:
            if name in self._ids:
                return self._ids[name]
        raise ValueError(f"tokenizer {self.name!r} has no {what} token: none of {', '.join(names)}")


def load_tokenizer(name: str, definition: str | None = None) -> Tokenizer:
    """Load a tokenizer by name.

    Args:
        name: `bytes`, the path of a `tokenizer.json` (or of a folder that contains one), or the
            name of a repository on the Hugging Face hub that contains one, such as `gpt2`.
        definition: The text of the `tokenizer.json`, if available; then nothing else is read.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If the file is not a tokenizer, or the hub does not have the name.
    """
    if name == "bytes":
        return ByteTokenizer()
    from tokenizers import Tokenizer as Inner

    if definition is not None:
        return HuggingFaceTokenizer.of_definition(name, definition)
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if path.suffix == ".json" or path.exists():
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {name!r}: file {path} does not exist")
        try:
            return HuggingFaceTokenizer(name, Inner.from_file(str(path)))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f"{path} is not a tokenizer file of the tokenizers library: {error}"
            ) from error
    try:
        return HuggingFaceTokenizer(name, Inner.from_pretrained(name))
    except Exception as error:  # of the network, the hub or the library
        raise ValueError(
            f"tokenizer {name!r} is neither 'bytes' nor a file, and it cannot be loaded from the "
            f"Hugging Face hub ({error}){did_you_mean(name, ['bytes'])}"
        ) from error


def until(rows: Iterable[list[int]], eos_id: int) -> list[list[int]]:
    """The ids of each row before its first end of text."""
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


class StreamDecoder:
    """Decodes ids incrementally, in whole characters.

    >>> decoder = StreamDecoder(load_tokenizer("bytes"))
    >>> [decoder.feed([id]) for id in "né".encode()], decoder.flush()
    (['n', '', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_known = 0  # ids already returned, kept as context for the next ones
        self._num_shown = 0  # characters of the text of `_ids` already returned

    def feed(self, ids: Iterable[int]) -> str:
        """Add ids and return the characters that they complete, possibly none."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        # An incomplete character is decoded as replacement characters at the end.
        whole = len(text.rstrip(REPLACEMENT))
        piece = text[self._num_shown : whole]
        self._num_shown = max(self._num_shown, whole)
        if piece and whole == len(text):
            del self._ids[: self._num_known]
            self._num_known = len(self._ids)
            self._num_shown = len(self._tokenizer.decode(self._ids))
        return piece

    def flush(self) -> str:
        """Return the rest of the text, with U+FFFD for an incomplete character."""
        piece = self._tokenizer.decode(self._ids)[self._num_shown :]
        self._ids, self._num_known, self._num_shown = [], 0, 0
        return piece


def _decoder_steps(inner: "tokenizers.Tokenizer") -> set[str]:
    """The types of the decoder's steps in the tokenizer file."""

    def flatten(decoder: dict[str, Any] | None) -> set[str]:
        if decoder is None:
            return set()
        return {decoder["type"]}.union(*map(flatten, decoder.get("decoders", ())))

    return flatten(json.loads(inner.to_str())["decoder"])
