"""Components that several panels share."""

from collections.abc import Callable, Sequence
from typing import Any

from diffmm.app.answers import page


def two_columns(gr: Any) -> tuple[Any, Any]:
    """A column for the inputs and one for the answer; one below the other on a narrow screen."""
    with gr.Row(elem_classes="columns"):
        left = gr.Column(scale=2, min_width=300, elem_classes="inputs")
        right = gr.Column(scale=3, min_width=320)
    return left, right


def medium_input(gr: Any, reader: Any) -> Any:
    """A field to drop one file of the reader's kind. Only the reader opens it."""
    endings = [extension.removeprefix(".") for extension in reader.extensions]
    return gr.File(
        label=f"{reader.kind.capitalize()} ({', '.join(endings)})",
        file_types=list(reader.extensions),
        file_count="single",
        type="filepath",
        height=150,
        elem_id="file",
    )


def layer_slider(gr: Any, count: int, label: str = "Layer") -> Any:
    """The number of the attention layer, of `count`, whose maps are shown, from 1; the last by
    default."""
    most = max(count, 2)  # Gradio takes no empty range
    return gr.Slider(
        1, most, value=count, step=1, label=label, visible=count > 1, elem_classes="layer"
    )


def answer_field(gr: Any, name: str = "answer") -> Any:
    """The place of an answer, empty at first."""
    return gr.HTML(page(), elem_classes="flush", elem_id=name)


def respond_to(
    gr: Any,
    events: Sequence[Any],
    function: Callable[..., Any],
    inputs: Sequence[Any],
    shown: Any,
) -> Any:
    """Show what a function returns, or yields, for the inputs after any of the events.

    Maps are computed in hooks of the model, so that all functions of a page wait for each other.
    While one runs, only the last of its further events counts.
    """
    return gr.on(
        events,
        function,
        inputs,
        shown,
        trigger_mode="always_last",
        concurrency_id="model",
        concurrency_limit=1,
        show_progress="minimal",
        api_visibility="private",
    )
