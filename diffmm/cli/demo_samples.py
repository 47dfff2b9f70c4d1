"""Validation samples for the attention maps of the demo's report, the same for every model."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from diffmm.analysis.exhibits import Exhibit, image_exhibit, sound_exhibit, text_exhibit

DIGITS = ("2", "4", "8")
SOUNDS = ("chirp up", "bell", "clicks")
"""Classes that look different from each other."""

PRINTABLE = re.compile(r"[\n -~]*")
WORD = re.compile(r"[a-zA-Z_]{7,}")


class Samples(NamedTuple):
    """The samples that the page shows for a modality."""

    make: Callable[[Mapping[str, Any], Any], Sequence[Exhibit]]
    """Makes the exhibits from the models, by attention, and the datamodule after `setup`."""
    caption: str


def text_samples(models: Mapping[str, Any], data: Any) -> list[Exhibit]:
    """Return the longest text that stops inside a word which occurs earlier in the text."""
    # The tokens of the demo are bytes, some of which are not printable.
    vocab_size = next(iter(models.values())).config.vocab_size
    pieces = [chr(i) if PRINTABLE.fullmatch(chr(i)) else "·" for i in range(vocab_size)]
    rows = [tokens for batch in data.val_dataloader() for tokens in batch["tokens"]]
    found = [text for text in map(repeated_word, rows) if text is not None]
    found = found or [(rows[0][:-1], int(rows[0][-1]))]
    tokens, target = max(found, key=lambda text: len(text[0]))
    return [text_exhibit(models, tokens, target, pieces)]


def repeated_word(tokens: Tensor) -> tuple[Tensor, int] | None:
    """Return a part of `tokens` (bytes) that ends after three letters of a word which occurs
    earlier in it, and the next letter; `None` if there is no such part."""
    text = "".join(chr(token) if token < 256 else "\0" for token in tokens.tolist())
    seen: dict[str, int] = {}
    for word in WORD.finditer(text):
        before, end = seen.get(word[0], -1), word.start() + 3
        seen[word[0]] = word.start()
        start = text.find("\n", 0, before) + 1 if before >= 0 else end  # at a whole line
        # Require some distance between the two occurrences, so that attention is visible.
        is_apart = start <= before < word.start() - 40
        if is_apart and PRINTABLE.fullmatch(text[start:end]):
            return tokens[start:end], ord(text[end])
    return None


def image_samples(models: Mapping[str, Any], data: Any) -> list[Exhibit]:
    """Return the first image of each of three digits."""
    names = data.class_names
    return [
        image_exhibit(models, batch["images"][i], label, names)
        for batch, i, label in firsts(data.val_dataloader(), map(names.index, DIGITS))
    ]


def sound_samples(models: Mapping[str, Any], data: Any) -> list[Exhibit]:
    """Return the first clip of each of three events."""
    names = [name.replace("_", " ") for name in data.class_names]
    return [
        sound_exhibit(models, batch["waveforms"][i, : batch["num_samples"][i]], label, names)
        for batch, i, label in firsts(data.val_dataloader(), map(names.index, SOUNDS))
    ]


def firsts(batches: Iterable[Any], labels: Iterable[int]) -> list[tuple[Any, int, int]]:
    """Return batch, row and label of the first sample of each of these labels."""
    wanted = list(labels)
    found: dict[int, tuple[Any, int, int]] = {}
    for batch in batches:
        for i, label in enumerate(batch["labels"].tolist()):
            found.setdefault(label, (batch, i, label))
        if found.keys() >= set(wanted):
            break
    return [found[label] for label in wanted]


SAMPLES = {
    "text": Samples(
        text_samples,
        "Rows attend to columns, and only to the past. The text of the held-out file stops inside "
        "a word that occurred before; colors show what its last letter attends to. Their strength "
        "is the square root of the weight.",
    ),
    "image": Samples(
        image_samples, "Held-out images, and how much the head reads from each of their patches."
    ),
    "audio": Samples(
        sound_samples,
        "Held-out clips as log-mel spectrograms, time to the right and frequency upward, and how "
        "much the head reads from each of their patches.",
    ),
}
