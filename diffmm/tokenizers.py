"""Text to tokens and back: bytes built in, and every tokenizer of Hugging Face `tokenizers`."""

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
    """What texts are encoded with.

    Special tokens (end of text, mask, padding) stand between texts, never for a part of one:
    `encode` makes none, even where a text spells one out, and `decode` leaves them out.
    """

    name: str
    """What `load_tokenizer` was given."""
    vocab_size: int
    """One more than the largest id."""
    special_ids: frozenset[int]
    """The ids that stand for no text."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The end of a text. `ValueError` where the tokenizer has none."""

    @property
    @abstractmethod
    def mask_id(self) -> int:
        """What hides a token in masked training. `ValueError` where the tokenizer has none."""

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """What fills up a batch: the padding token, or the end of text where there is none."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The same for tokenizers that make the same tokens, whatever their names."""

    @property
    def definition(self) -> str | None:
        """What makes this tokenizer again where its file is not (see `load_tokenizer`); `None` for
        one that is built in."""
        return None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """The ids of each text, encoded in parallel where the tokenizer can."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, U+FFFD for bytes that are no UTF-8. Ids past the vocabulary (a model's
        may be larger) stand for nothing."""

    @cached_property
    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """`[vocab_size]`, how many UTF-8 bytes of text each id stands for; 0 for special ids.

        Their sum over the ids of a text is the length of the text wherever the tokenizer is
        lossless. Where it is not (WordPiece, lower casing), each id counts for what it adds to a
        decoded text.
        """

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self.encode_batch([text])[0].tolist()

    def num_bytes(self, ids: Iterable[int]) -> int:
        """How many UTF-8 bytes of text `ids` stand for. See `byte_lengths`."""
        return int(self.byte_lengths[np.fromiter(ids, np.int64)].sum())


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, then end of text, mask and padding."""

    name = "bytes"
    vocab_size = 259
    eos_id, mask_id, pad_id = 256, 257, 258
    special_ids = frozenset((256, 257, 258))
    fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(id for id in ids if id < 256).decode(errors="replace")

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        return (np.arange(self.vocab_size) < 256).astype(np.int64)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        name: as in `load_tokenizer`, for messages.
        inner: the library's tokenizer. Special tokens are found by their usual names.
    """

    def __init__(self, name: str, inner: "tokenizers.Tokenizer") -> None:
        # A tokenizer file may carry these; here sequences are cut and padded in batches.
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

    @property
    def eos_id(self) -> int:
        return self._special("end-of-text", EOS_NAMES)

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

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.definition.encode()).hexdigest()[:16]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

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
            if alphabet.issuperset(token):  # each character of this alphabet stands for a byte
                lengths[id] = len(token)
            elif "ByteFallback" in steps and len(token) == 6 and token.startswith("<0x"):
                lengths[id] = 1
            else:
                in_context.append(id)
        if in_context:
            # What stands first may lose its leading space: measure what is added to a first token.
            first = in_context[0]
            texts = self._inner.decode_batch([[first], *([first, id] for id in in_context)])
            alone, *pairs = (len(text.encode()) for text in texts)
            lengths[in_context] = np.array(pairs) - alone
        return lengths

    def _special(self, what: str, names: tuple[str, ...]) -> int:
        for name in names:
            if name in self._ids:
                return self._ids[name]
        raise ValueError(
            f"tokenizer {self.name!r} has no {what} token: looked for {', '.join(names)}"
        )


def load_tokenizer(name: str, definition: str | None = None) -> Tokenizer:
    """The tokenizer called `name`.

    Args:
        name: `bytes`, the path of a `tokenizer.json` (or of a folder that has one), or the name of
            a repository on the Hugging Face hub that has one, such as `gpt2`.
        definition: the text of its `tokenizer.json`, where that is at hand: nothing else is read.

    Raises:
        FileNotFoundError: for a path with no such file.
        ValueError: for a file that is no tokenizer, or a name the hub does not give; naming it.
    """
    if name == "bytes":
        return ByteTokenizer()
    from tokenizers import Tokenizer as Inner

    if definition is not None:
        try:
            return HuggingFaceTokenizer(name, Inner.from_str(definition))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"the definition of tokenizer {name!r} is none: {error}") from error
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if path.suffix == ".json" or path.exists():
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {name!r}: there is no file {path}")
        try:
            return HuggingFaceTokenizer(name, Inner.from_file(str(path)))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f"{path} is not a tokenizer file of the tokenizers library: {error}"
            ) from error
    try:
        return HuggingFaceTokenizer(name, Inner.from_pretrained(name))
    except Exception as error:  # of many types: the network's, the hub's, the library's
        raise ValueError(
            f"tokenizer {name!r} is neither 'bytes' nor a file, and the Hugging Face hub does not "
            f"give it ({error}){did_you_mean(name, ['bytes'])}"
        ) from error


class StreamDecoder:
    """Text as its ids arrive, never a part of a character.

    >>> decoder = StreamDecoder(load_tokenizer("bytes"))
    >>> [decoder.feed([id]) for id in "né".encode()], decoder.flush()
    (['n', '', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_known = 0  # ids given out whole, kept since the text of an id depends on the last
        self._num_shown = 0  # characters given out of the text of `_ids`

    def feed(self, ids: Iterable[int]) -> str:
        """The characters that are whole with these further ids; may be none yet."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        # An unfinished character shows as replacement characters at the end.
        whole = len(text.rstrip(REPLACEMENT))
        piece = text[self._num_shown : whole]
        self._num_shown = max(self._num_shown, whole)
        if piece and whole == len(text):
            del self._ids[: self._num_known]
            self._num_known = len(self._ids)
            self._num_shown = len(self._tokenizer.decode(self._ids))
        return piece

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that stayed unfinished."""
        piece = self._tokenizer.decode(self._ids)[self._num_shown :]
        self._ids, self._num_known, self._num_shown = [], 0, 0
        return piece


def _decoder_steps(inner: "tokenizers.Tokenizer") -> set[str]:
    """The types of the decoder's steps, as the tokenizer's file names them."""

    def flatten(decoder: dict[str, Any] | None) -> set[str]:
        if decoder is None:
            return set()
        return {decoder["type"]}.union(*map(flatten, decoder.get("decoders", ())))

    return flatten(json.loads(inner.to_str())["decoder"])
