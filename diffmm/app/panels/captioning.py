"""The panel of a captioning or CTC model: an image or a sound, its text, and the maps of words."""

from collections.abc import Iterator
from typing import Any

import torch

from diffmm.analysis.word_maps import reading_layers
from diffmm.app.answers import (
    NUM_MAP_WORDS,
    growing,
    maps_section,
    page,
    player,
    problem,
    word_maps,
)
from diffmm.app.components import (
    answer_field,
    layer_slider,
    medium_input,
    respond_to,
    two_columns,
)
from diffmm.hub.trained import TrainedModel
from diffmm.models import CaptioningModel, CTCModel

LONGEST = 2000
"""Maximum number of characters of the beginning of a text."""


def suits(trained: TrainedModel) -> bool:
    """Whether the model writes texts about images or sounds."""
    return isinstance(trained.model, CaptioningModel | CTCModel)


def describe(trained: TrainedModel) -> str:
    """What the model does, in a few words."""
    if isinstance(trained.model, CTCModel):
        return "Transcribes sounds"
    kind = trained.reader.kind
    return f"Describes or transcribes {kind}s" if kind == "sound" else f"Describes {kind}s"


def answer(trained: TrainedModel, file: str | None, beginning: str = "") -> Iterator[str]:
    """The text about a file as it grows, as HTML; an error is shown in its place.

    Args:
        trained: The model.
        file: Path of the file; None if there is none yet.
        beginning: The beginning of the text, for a captioning model.
    """
    if file is None:
        yield page()
        return
    try:
        _ = trained.reader.read(file)  # an error before the first page
        if isinstance(trained.model, CTCModel):
            yield from growing("", iter([trained.predict(file).text]))
        else:
            yield from growing(beginning, trained.write(file, beginning))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        yield page(problem(error, file))


def maps(trained: TrainedModel, file: str | None, beginning: str, layer: int) -> str:
    """A player of a sound, and the attention maps of the words, as HTML; nothing if the file cannot
    be read.

    Args:
        trained: The model.
        file: As in `answer`.
        beginning: As there.
        layer: Index of the attention layer.
    """
    if file is None:
        return page()
    try:
        _ = trained.reader.read(file)
        text = beginning + trained.generate(file, beginning) if beginning else None
    except (ValueError, OSError, torch.OutOfMemoryError):  # shown by `answer`
        return page()
    by = (
        "What the encoder attends to at the times of"
        if isinstance(trained.model, CTCModel)
        else "What the decoder attends to when it chooses"
    )
    return page(
        player(trained.reader, file),
        maps_section(
            "Attention",
            f"{by} each of the first {NUM_MAP_WORDS} words, in layer {layer + 1}, as means over "
            f"the heads:",
            lambda: word_maps(trained, file, text, layer),
            of="word",
        ),
    )


def build(gr: Any, trained: TrainedModel) -> None:
    """Add the panel to the page."""
    model: Any = trained.model
    takes_text = isinstance(model, CaptioningModel)
    left, right = two_columns(gr)
    with left:
        file = medium_input(gr, trained.reader)
        beginning = gr.Textbox(
            label="The text begins with",
            max_length=LONGEST,
            visible=takes_text,
            elem_id="beginning",
        )
        layer = layer_slider(gr, len(reading_layers(model)))
    with right:
        shown = answer_field(gr)
        seen = answer_field(gr, "maps")

    def respond(file: str | None, beginning: str) -> Iterator[str]:
        yield from answer(trained, file, beginning)

    def show(file: str | None, beginning: str, layer: int) -> str:
        return maps(trained, file, beginning, layer - 1)

    respond_to(gr, [file.change, beginning.submit], respond, [file, beginning], shown)
    events = [file.change, beginning.submit, layer.change]
    respond_to(gr, events, show, [file, beginning, layer], seen)
