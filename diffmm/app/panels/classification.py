"""The panel of a classifier: an image or a sound, its classes, and the maps over it."""

from typing import Any

from diffmm.app.answers import (
    maps_section,
    medium_maps,
    page,
    player,
    ranking,
    refused,
    section,
)
from diffmm.app.components import (
    answer_field,
    layer_slider,
    medium_input,
    respond_to,
    two_columns,
)
from diffmm.hub.trained import TrainedModel
from diffmm.models import AudioModel, ImageModel

NUM_CLASSES = 10
"""Maximum number of classes shown."""


def suits(trained: TrainedModel) -> bool:
    """Whether the model is a classifier of images or sounds."""
    model = trained.model
    return isinstance(model, ImageModel | AudioModel) and model.num_classes > 0


def describe(trained: TrainedModel) -> str:
    """What the model does, in a few words."""
    return f"Classifies {trained.reader.kind}s into {len(trained.class_names)} classes"


def answer(trained: TrainedModel, file: str | None, layer: int) -> str:
    """The most likely classes of a file, and the attention maps, as HTML.

    Args:
        trained: The classifier.
        file: Path of the file; None if there is none yet.
        layer: Index of the attention layer.

    Raises:
        ValueError: If the file cannot be read; the message names it.
    """
    if file is None:
        return page()
    found = trained.predict(file, top_k=NUM_CLASSES)
    shares = [f"{100.0 * score:.1f}%" for score in found.scores]
    title = "Classes, each on its own" if trained.job.multi_label else "Classes"
    kind = trained.reader.kind
    return page(
        player(trained.reader, file),
        section(title, ranking(found.labels, found.scores, shares)),
        maps_section(
            "Attention",
            f"How much the head reads from each patch of the {kind} in layer {layer + 1}, as means "
            f"over the heads:",
            lambda: medium_maps(trained.model, trained.reader, file, layer),  # type: ignore[arg-type]
        ),
    )


def build(gr: Any, trained: TrainedModel) -> None:
    """Add the panel to the page."""
    left, right = two_columns(gr)
    with left:
        file = medium_input(gr, trained.reader)
        config: Any = trained.model.config
        layer = layer_slider(gr, config.backbone.depth)
    with right:
        shown = answer_field(gr)

    @refused
    def respond(file: str | None, layer: int) -> str:
        return answer(trained, file, layer - 1)

    respond_to(gr, [file.change, layer.change], respond, [file, layer], shown)
