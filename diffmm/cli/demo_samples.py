"""What the demo's report looks at: samples of the validation data, the same for every model."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from diffmm.analysis.exhibits import Exhibit, image_exhibit, sound_exhibit, text_exhibit

LONGEST_TEXT = 160
"""In tokens."""

PRINTABLE = re.compile(r"[\n -~]*")
WORD = re.compile(r"[a-zA-Z_]{7,}")


class Samples(NamedTuple):
    make: Callable[[Mapping[str, Any], Any], Sequence[Exhibit]]
    """From the models by attention, and the data, which is set up."""
    caption: str


def text_samples(models: Mapping[str, Any], data: Any) -> list[Exhibit]:
    """A text that stops inside a word which it holds once already."""
    # The demo reads bytes: a token is a letter.
    pieces = [chr(i) if chr(i).isprintable() or i == 10 else "·" for i in range(256)]
    pieces += ["·"] * (next(iter(models.values())).config.vocab_size - len(pieces))
    found = None
    for batch in data.val_dataloader():
        for tokens in batch["tokens"]:
            found = found or repeated_word(tokens)
        if found is not None:
            break
    tokens, target = found or (tokens[:-1], int(tokens[-1]))
    return [text_exhibit(models, tokens, target, pieces)]


def repeated_word(tokens: Tensor) -> tuple[Tensor, int] | None:
    """A piece of `tokens`, which are bytes, that ends after three letters of a word it has had
    before, and the letter that follows; None where there is no such piece."""
    text = "".join(chr(token) if token < 256 else "\0" for token in tokens.tolist())
    seen: dict[str, int] = {}
    for word in WORD.finditer(text):
        before, end = seen.get(word[0], -1), word.start() + 3
        seen[word[0]] = word.start()
        start = max(0, end - LONGEST_TEXT)
        start = text.find("\n", start, end) + 1 if start else 0  # a whole line to begin with
        # Far enough apart for a look to be worth its while.
        is_apart = start <= before < word.start() - 40
        if is_apart and PRINTABLE.fullmatch(text[start:end]):
            return tokens[start:end], ord(text[end])
    return None


def image_samples(models: Mapping[str, Any], data: Any) -> list[Exhibit]:
    """The first image of each of three classes."""
    return [
        image_exhibit(models, batch["images"][i], label, data.class_names)
        for batch, i, label in first_of_classes(data.val_dataloader(), 3)
    ]


def sound_samples(models: Mapping[str, Any], data: Any) -> list[Exhibit]:
    """The first clip of each of three classes."""
    names = [name.replace("_", " ") for name in data.class_names]
    return [
        sound_exhibit(models, batch["waveforms"][i, : batch["num_samples"][i]], label, names)
        for batch, i, label in first_of_classes(data.val_dataloader(), 3)
    ]


def first_of_classes(batches: Any, count: int) -> list[tuple[Any, int, int]]:
    """The first sample of each of the first `count` classes: its batch, its row, its label."""
    found: dict[int, tuple[Any, int, int]] = {}
    for batch in batches:
        for i, label in enumerate(batch["labels"].tolist()):
            if len(found) < count:
                found.setdefault(label, (batch, i, label))
        if len(found) == count:
            break
    return list(found.values())


SAMPLES = {
    "text": Samples(
        text_samples,
        "Rows look at columns, and see only the past. The text of the held-out file stops inside a "
        "word that stood there before; colours show what its last letter attends to.",
    ),
    "image": Samples(
        image_samples, "Held-out images, and what the head reads from each patch of them."
    ),
    "audio": Samples(
        sound_samples,
        "Held-out clips as log-mel spectrograms, time to the right and frequency upward, and what "
        "the head reads from each patch of them.",
    ),
}
