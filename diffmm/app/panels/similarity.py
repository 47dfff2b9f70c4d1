"""The panel of a contrastive model: an image or a sound, compared with typed texts."""

from typing import Any

from diffmm.app.answers import (
    maps_section,
    medium_maps,
    page,
    player,
    ranking,
    refused,
    section,
    text_maps,
)
from diffmm.app.components import (
    answer_field,
    layer_slider,
    medium_input,
    respond_to,
    two_columns,
)
from diffmm.hub.trained import TrainedModel
from diffmm.hub.zero_shot import by_tower, towers_of
from diffmm.models.contrastive import ContrastiveModel

MOST_TEXTS = 64
"""Maximum number of texts."""


def suits(trained: TrainedModel) -> bool:
    """Whether the model is a contrastive one."""
    return isinstance(trained.model, ContrastiveModel)


def describe(trained: TrainedModel) -> str:
    """What the model does, in a few words."""
    return f"Compares {trained.reader.kind.replace(' or ', 's or ')}s with texts"


def texts_in(typed: str) -> list[str]:
    """The texts in a field, one per line, without empty and repeated ones.

    Raises:
        ValueError: If there are more than `MOST_TEXTS`.
    """
    texts = list(dict.fromkeys(line.strip() for line in typed.splitlines() if line.strip()))
    if len(texts) > MOST_TEXTS:
        raise ValueError(f"at most {MOST_TEXTS} texts are compared, got {len(texts)}")
    return texts


def answer(trained: TrainedModel, file: str | None, typed: str, layer: int, text_layer: int) -> str:
    """The similarities of a file with texts, and the attention maps of both towers, as HTML.

    Args:
        trained: The contrastive model.
        file: Path of the file; None if there is none yet.
        typed: The texts, one per line.
        layer: Index of the attention layer of the image or audio tower.
        text_layer: Index of the attention layer of the text tower.

    Raises:
        ValueError: If the file cannot be read, or there are too many texts.
    """
    if file is None:
        return page()
    model, reader = trained.model, trained.reader
    assert isinstance(model, ContrastiveModel)
    texts, parts = texts_in(typed), [player(reader, file)]
    if texts:
        similarities = trained.similarity(file, texts)[0].tolist()
        found = trained.zero_shot(file, texts, templates=("{}",), top_k=len(texts))
        values = dict(zip(texts, similarities, strict=True))
        table = ranking(
            found.labels,
            found.scores,
            [
                f"{values[text]:.3f} · {100.0 * score:.1f}%"
                for text, score in zip(found.labels, found.scores, strict=True)
            ],
        )
        meaning = "of each pair on its own" if model.bias is not None else "among these texts"
        caption = f'<p class="quiet">Cosine similarity, and probability {meaning}.</p>'
        parts.append(section("Similarity", caption, table))
    parts.append(
        maps_section(
            f"Attention over the {reader.kind}",
            f"How much its embedding reads from each patch in layer {layer + 1}, as means over the "
            f"heads:",
            lambda: medium_maps(tower_of(model, reader, file), reader, file, layer),
        )
    )
    if texts:
        parts.append(
            maps_section(
                f"Attention in “{found.label}”",
                f"What the tokens of the best text attend to in layer {text_layer + 1}, and over "
                f"the text what its embedding reads:",
                lambda: text_maps(model.text, reader, found.label, text_layer),
            )
        )
    return page(*parts)


def tower_of(model: ContrastiveModel, reader: Any, file: str) -> Any:
    """The tower that embeds a file."""
    ((name, _, _),) = by_tower(model, reader, [reader.read(file)])
    return model.towers[name]


def build(gr: Any, trained: TrainedModel) -> None:
    """Add the panel to the page."""
    model, reader = trained.model, trained.reader
    assert isinstance(model, ContrastiveModel)
    left, right = two_columns(gr)
    with left:
        file = medium_input(gr, reader)
        typed = gr.Textbox(
            label="Texts, one per line", lines=5, max_lines=20, elem_id="texts", max_length=20_000
        )
        button = gr.Button("Compare", variant="primary", elem_id="compare")
        towers = [model.towers[name] for name in towers_of(model, reader)]
        depth = min(tower.config.backbone.depth for tower in towers)
        layer = layer_slider(gr, depth, f"Layer ({reader.kind})")
        text_layer = layer_slider(gr, model.text.config.backbone.depth, "Layer (text)")
    with right:
        shown = answer_field(gr)

    @refused
    def respond(file: str | None, typed: str, layer: int, text_layer: int) -> str:
        return answer(trained, file, typed, layer - 1, text_layer - 1)

    events = [file.change, button.click, layer.change, text_layer.change]
    respond_to(gr, events, respond, [file, typed, layer, text_layer], shown)
