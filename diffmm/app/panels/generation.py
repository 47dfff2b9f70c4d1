"""The panel of a text decoder: a prompt, its continuation or answer, and the maps over it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from diffmm.app.answers import NUM_MAP_TOKENS, growing, maps_section, page, problem, prompt_maps
from diffmm.app.components import answer_field, layer_slider, respond_to, two_columns
from diffmm.hub.trained import TrainedModel
from diffmm.hub.writing import MAX_NEW_TOKENS
from diffmm.models.text import TextModel

CONTINUE, REPLY = "Continue", "Answer"
MOST_TOKENS = 1000
"""Maximum of the slider for the number of new tokens."""

LONGEST = 200_000
"""Maximum number of characters of a prompt."""


def suits(trained: TrainedModel) -> bool:
    """Whether the model is a text decoder."""
    return isinstance(trained.model, TextModel) and trained.model.config.causal


def describe(trained: TrainedModel) -> str:
    """What the model does, in a few words."""
    return "Answers questions, and continues texts" if can_chat(trained) else "Continues texts"


def can_chat(trained: TrainedModel) -> bool:
    """Whether the model was trained on conversations."""
    return trained.reader.chat_template is not None


def ids_of(trained: TrainedModel, prompt: str, *, chat: bool) -> Sequence[int]:
    """The tokens of a prompt, or of the question and what precedes its answer.

    Raises:
        ValueError: If the prompt is empty, or does not fit the template of conversations.
    """
    if chat:
        return trained.reader.chat.prompt([{"role": "user", "content": prompt}])
    return trained.reader.read(prompt)["tokens"].tolist()


def answer(
    trained: TrainedModel,
    prompt: str,
    *,
    chat: bool = False,
    most_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.8,
    seed: int = 0,
) -> Iterator[str]:
    """The continuation of a prompt, or the answer to it, as it grows, as HTML; an error is shown in
    its place.

    Args:
        trained: The decoder.
        prompt: The text.
        chat: As in `TrainedModel.write`.
        most_tokens: Maximum number of generated tokens; less if the model's `max_length` leaves
            less.
        temperature: As in `TrainedModel.write`.
        seed: As there.
    """
    try:
        assert isinstance(trained.model, TextModel)
        room = trained.model.config.max_length - len(ids_of(trained, prompt, chat=chat))
        pieces = trained.write(
            prompt,
            chat=chat,
            max_new_tokens=max(1, min(most_tokens, room)),
            temperature=temperature,
            seed=seed,
        )
        yield from growing("" if chat else prompt, pieces)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        yield page(problem(error))


def maps(trained: TrainedModel, prompt: str, layer: int, *, chat: bool = False) -> str:
    """The attention maps over a prompt, as HTML; none if the prompt cannot be read.

    Args:
        trained: The decoder.
        prompt: The text.
        layer: Index of the attention layer.
        chat: As in `TrainedModel.write`.
    """
    try:
        ids = ids_of(trained, prompt, chat=chat)
    except ValueError:  # shown by `answer`
        return page()
    part = f"the last {NUM_MAP_TOKENS} tokens of " if len(ids) > NUM_MAP_TOKENS else ""
    return page(
        maps_section(
            "Attention",
            f"What the tokens of {part}the prompt attend to in layer {layer + 1}, as means over "
            f"the heads; over the text, what the last one attends to:",
            lambda: prompt_maps(trained, ids, layer),
        )
    )


def build(gr: Any, trained: TrainedModel) -> None:
    """Add the panel to the page."""
    model = trained.model
    assert isinstance(model, TextModel)
    chats = can_chat(trained)
    modes = [REPLY, CONTINUE] if chats else [CONTINUE]
    left, right = two_columns(gr)
    with left:
        prompt = gr.Textbox(
            label="Prompt", lines=6, max_lines=20, max_length=LONGEST, elem_id="prompt"
        )
        mode = gr.Radio(modes, value=modes[0], show_label=False, visible=chats, elem_id="mode")
        with gr.Row():
            button = gr.Button("Generate", variant="primary", elem_id="generate", min_width=80)
            stop = gr.Button("Stop", elem_id="stop", min_width=80)
        most = max(2, min(MOST_TOKENS, model.config.max_length - 1))
        count = gr.Slider(
            1, most, value=min(MAX_NEW_TOKENS, most), step=1, label="New tokens, at most"
        )
        temperature = gr.Slider(0.0, 2.0, value=0.8, step=0.05, label="Temperature")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        layer = layer_slider(gr, model.config.backbone.depth)
    with right:
        shown = answer_field(gr)
        seen = answer_field(gr, "maps")

    def respond(prompt: str, mode: str, count: int, temperature: float, seed: int) -> Iterator[str]:
        yield from answer(
            trained,
            prompt,
            chat=mode == REPLY,
            most_tokens=count,
            temperature=temperature,
            seed=seed,
        )

    def show(prompt: str, mode: str, layer: int) -> str:
        return maps(trained, prompt, layer - 1, chat=mode == REPLY)

    respond_to(gr, [button.click, layer.change], show, [prompt, mode, layer], seen)
    inputs = [prompt, mode, count, temperature, seed]
    event = respond_to(gr, [button.click], respond, inputs, shown)
    stop.click(None, cancels=[event])
