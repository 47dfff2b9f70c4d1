"""The page of a trained model."""

from collections.abc import Callable, Coroutine
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from diffmm.app.panels import panel_of
from diffmm.hub.trained import TrainedModel
from diffmm.layers import ATTENTIONS

MOST_WAITING = 8
"""Maximum number of requests that wait for the model."""


class Page(NamedTuple):
    """A page for `gradio.mount_gradio_app`."""

    blocks: Any
    head: str
    """Its style sheet, for the head of the document."""


def make_page(gr: Any, trained: TrainedModel, folder: Path) -> Page:
    """Create the page of a model.

    Args:
        gr: The module `gradio`.
        trained: The model.
        folder: Folder of the uploads, the only files that a request may name.

    Raises:
        ValueError: If there is no panel for the model.
    """
    panel = panel_of(trained)
    title = f"{trained.job.recipe or Path(trained.origin).name} · diffmm"
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.HTML(_header(trained, panel.describe(trained)), elem_classes="flush")
        panel.build(gr, trained)
    blocks.queue(max_size=MOST_WAITING, api_open=False)
    for block in blocks.blocks.values():
        block.async_move_resource_to_block_cache = _only_in(folder)
    return Page(blocks, f"<style>{_style()}</style>")


def theme_of(gr: Any) -> Any:
    """The theme: the colors of the reports, and fonts that need no file."""
    font = gr.themes.utils.fonts.Font
    return gr.themes.Base(
        primary_hue=gr.themes.colors.violet,
        neutral_hue=gr.themes.colors.stone,
        font=[font("sans-serif")],
        font_mono=[font("monospace")],
    )


def _only_in(folder: Path) -> Callable[[Any], Coroutine[Any, Any, str]]:
    """What Gradio calls with the path or the address of each file in a request. It would otherwise
    copy any file, and download from any address, for a page that another server has mounted."""

    async def check(path: Any) -> str:
        found = Path(str(path)).resolve()
        if folder.resolve() not in found.parents:
            raise ValueError(f"{path} was not uploaded")
        return str(found)

    return check


def _header(trained: TrainedModel, does: str) -> str:
    """The name of the model, and what it is."""
    model: Any = trained.model
    towers = getattr(model.config, "towers", {"": model.config})
    attentions = dict.fromkeys(tower.backbone.attention for tower in towers.values())
    labels = ", ".join(ATTENTIONS[name].label for name in attentions)
    size = sum(parameter.numel() for parameter in model.parameters())
    device = next(model.parameters()).device
    facts = f"{does}. {labels} attention, {size:,} parameters, on {device}."
    name = trained.job.recipe or Path(trained.origin).name
    return f'<header class="page-head"><h1>{escape(name)}</h1><p>{escape(facts)}</p></header>'


def _style() -> str:
    """The style sheet of the reports for the answers alone, and that of the page."""
    report = files("diffmm.analysis").joinpath("report.css").read_text(encoding="utf-8")
    own = files("diffmm.app").joinpath("page.css").read_text(encoding="utf-8")
    return f".answer, .page-head {{ {report.replace(':root', '&')} }} {own}"
