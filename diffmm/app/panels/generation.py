"""The panel of a text decoder: a prompt, its continuation or answer, and the maps over it."""

from collections.abc import Iterator
from typing import Any

import torch

from diffmm.app.answers import NUM_MAP_TOKENS, growing, maps_section, page, problem, prompt_maps
from diffmm.app.components import answer_field, layer_slider, two_columns
from diffmm.hub.trained import MAX_NEW_TOKENS, TrainedModel
from diffmm.models.text import TextModel

CONTINUE, REPLY = "Continue", "Answer"
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


def answer(
    trained: TrainedModel,
    prompt: str,
    layer: int,
    *,
    chat: bool = False,
    most_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.8,
    seed: int = 0,
) -> Iterator[str]:
    """The continuation of a prompt, or the answer to it, piece by piece, with the attention maps
    over the prompt, as HTML; an error is shown in their place.

    Args:
        trained: The decoder.
        prompt: The text.
        layer: Index of the attention layer.
        chat: As in `TrainedModel.write`.
        most_tokens: Maximum number of generated tokens; less if the model's `max_length` leaves
            less.
        temperature: As there.
        seed: As there.
    """
    try:
        if chat:
            ids = trained.reader.chat.prompt([{"role": "user", "content": prompt}])
        else:
            ids = trained.reader.read(prompt)["tokens"]
        assert isinstance(trained.model, TextModel)
        room = max(1, trained.model.config.max_length - len(ids))
        pieces = trained.write(
            prompt,
            chat=chat,
            max_new_tokens=min(most_tokens, room),
            temperature=temperature,
            seed=seed,
        )
        part = f"the last {NUM_MAP_TOKENS} tokens of " if len(ids) > NUM_MAP_TOKENS else ""
        maps = maps_section(
            "Attention",
            f"What the tokens of {part}the prompt attend to in layer {layer + 1}, as means over "
            f"the heads; over the text, what the last one attends to:",
            lambda: prompt_maps(trained, ids, layer),
        )
        yield from growing("" if chat else prompt, pieces, maps)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        yield page(problem(error))


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
        most = min(1000, model.config.max_length - 1)
        count = gr.Slider(
            1, most, value=min(MAX_NEW_TOKENS, most), step=1, label="New tokens, at most"
        )
        temperature = gr.Slider(0.0, 2.0, value=0.8, step=0.05, label="Temperature")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        layer = layer_slider(gr, model)
    with right:
        shown = answer_field(gr)

    def respond(
        prompt: str, mode: str, count: int, temperature: float, seed: int, layer: int
    ) -> Iterator[str]:
        yield from answer(
            trained,
            prompt,
            layer - 1,
            chat=mode == REPLY,
            most_tokens=count,
            temperature=temperature,
            seed=seed,
        )

    inputs = [prompt, mode, count, temperature, seed, layer]
    event = gr.on([button.click, layer.release], respond, inputs, shown)
    stop.click(None, cancels=[event])
