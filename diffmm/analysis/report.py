"""A self-contained HTML page that compares softmax and differential attention.

It has no scripts or external files: charts are inline SVG and maps are embedded PNGs. A light and a
dark theme follow the system's setting.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import numpy as np
from PIL import Image

from diffmm.analysis.charts import Line, line_chart, marker, styles_of
from diffmm.analysis.exhibits import Exhibit, ImageExhibit, SoundExhibit, TextExhibit, View
from diffmm.analysis.results import RunResult
from diffmm.analysis.word_maps import WordsExhibit
from diffmm.layers import ATTENTIONS

Array = np.ndarray

ATTEND, OPPOSE = (0x7C, 0x4D, 0xD6), (0x12, 0x94, 0x6A)
"""Colors of positive and negative weights, also `--attend` and `--oppose` in the style sheet. They
have medium lightness, so that they are visible on white and on black."""


@dataclass(frozen=True)
class Section:
    """The contents of one modality.

    Attributes:
        title: Heading of the section.
        task: Description of the task and the data, in one or two sentences.
        results: Results of the runs, in the order of the table.
        exhibits: Samples with attention maps.
        maps_caption: Caption that says which attention the maps show.
    """

    title: str
    task: str
    results: Sequence[RunResult]
    exhibits: Sequence[Exhibit]
    maps_caption: str


def render_report(sections: Sequence[Section], *, facts: str) -> str:
    """Render the page as HTML.

    Args:
        sections: One section per modality.
        facts: Versions and machine, for the last line.
    """
    runs = [run for section in sections for run in section.results]
    millions = [run.num_parameters / 1e6 for run in runs]
    style = files("diffmm.analysis").joinpath("report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{_anchor(s)}">{escape(s.title)}</a>' for s in sections)
    kinds = list(dict.fromkeys(run.attention for run in runs))
    equations = "".join(
        f'<dt class="key {kind}">{_swatch(kind)}{_label(kind)}</dt>'
        f"<dd>{ATTENTIONS[kind].equation}</dd>"
        for kind in kinds
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>diffmm demo: softmax and differential attention</title>
<style>
{style}{styles_of(list(ATTENTIONS))}</style>
</head>
<body>
<header>
<h1>Softmax and differential attention, side by side</h1>
<p class="lede">Twins with equal parameters, trained by the same recipe on the same data in the same
order. Only the attention differs.</p>
<dl class="equations">{equations}</dl>
<div class="note"><p><strong>One seed, minutes of training, models of {min(millions):.2f} to
{max(millions):.2f} million parameters.</strong> This page shows that everything runs and what the
maps look like. It does not show which attention is better: with another seed, differences as small
as these may vanish or change sign.</p></div>
<nav><a href="#results">Results</a>{links}</nav>
</header>
<main>
<h2 id="results">Results</h2>
{_table(sections)}
{"".join(_section(section) for section in sections)}
</main>
<footer class="quiet"><p>{escape(facts)}</p></footer>
</body>
</html>
"""


def _table(sections: Sequence[Section]) -> str:
    bodies = []
    for section in sections:
        rows = "".join(
            f'<tr><td class="name {run.attention}">{_label(run.attention)}</td>'
            f"<td>{run.num_parameters:,}</td><td>{run.learning_rate:g}</td>"
            f"<td>{run.num_steps:,}</td><td>{run.loss:.4f}</td>"
            f"<td>{run.metric_text}</td><td>{run.seconds:.1f}</td></tr>"
            for run in section.results
        )
        metric = section.results[0].metric_name
        heads = ("parameters", "learning rate", "steps", "loss", metric, "seconds")
        bodies.append(
            f'<tbody><tr><th scope="rowgroup">{escape(section.title)}</th>'
            f"{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</tbody>"
        )
    return (
        f'<div class="scroll"><table>{"".join(bodies)}</table></div>'
        '<p class="quiet">Loss (in nats) and metric are for held-out data after the last step. '
        "Seconds are for this machine and include data loading, validation and logging.</p>"
    )


def _section(section: Section) -> str:
    charts = "".join(
        f'<figure class="card">{chart}</figure>'
        for chart in (
            _chart(section, "train_curve", "Training loss", markers=False),
            _chart(section, "val_curve", "Validation loss", markers=True),
        )
    )
    return (
        f'<section><h2 id="{_anchor(section)}">{escape(section.title)}</h2>'
        f"<p>{escape(section.task)}</p>"
        f'<div class="charts">{charts}</div>'
        '<p class="quiet">Loss in nats. The first tenth of the steps is ignored when scaling the '
        "axis: lines may start above the chart. One seed per line.</p>"
        "<h3>What the last layer attends to</h3>"
        f'<p class="quiet">{escape(section.maps_caption)} Weights are means over heads, after '
        'training: <span class="scale-line">negative<span class="scale"></span>positive.</span> '
        "All maps of one model and sample have the same scale, so that they can be compared "
        "before and after the subtraction.</p>"
        f"{''.join(draw_exhibit(exhibit) for exhibit in section.exhibits)}</section>"
    )


def _chart(section: Section, curve: str, title: str, *, markers: bool) -> str:
    lines = [
        Line(run.attention, _label(run.attention), getattr(run, curve), _number(run.attention))
        for run in section.results
    ]
    return line_chart(lines, title=title, x_label="step", markers=markers)


def draw_exhibit(exhibit: Exhibit) -> str:
    """Draw a sample and the attention maps of each model."""
    if isinstance(exhibit, TextExhibit):
        return _text(exhibit)
    if isinstance(exhibit, WordsExhibit):
        return f"{draw_exhibit(exhibit.whole)}{draw_words(exhibit)}"
    if isinstance(exhibit, ImageExhibit):
        return _picture(exhibit, exhibit.pixels, "square")
    assert isinstance(exhibit, SoundExhibit)
    title = f"{exhibit.truth}, {exhibit.clip_seconds:.1f} s"
    return _picture(exhibit, exhibit.spectrogram[::-1], "wide", title=title, upward=True)


def draw_words(exhibit: WordsExhibit) -> str:
    """Draw the maps of the words of each model's text, layer by layer."""
    whole, drawn = exhibit.whole, []
    is_sound = isinstance(whole, SoundExhibit)
    pixels = whole.spectrogram[::-1] if isinstance(whole, SoundExhibit) else whole.pixels
    for attention, written in exhibit.written.items():
        text = _quoted(written.text) if written.text else "nothing"
        drawn.append(f"<p>{_label(attention)} writes {text}</p>")
        for each in written.words:
            views = {
                f"{_quoted(each.word)}, layer {layer + 1}": view
                for layer, view in each.layers.items()
            }
            groups = _maps_over(views, pixels, attention, is_sound)
            drawn.append(f'<div class="sample {_size(whole)}">{"".join(groups)}</div>')
    return "".join(drawn)


def _size(whole: Exhibit) -> str:
    return "wide" if isinstance(whole, SoundExhibit) else "square"


def _picture(
    exhibit: Exhibit, pixels: Array, size: str, *, title: str | None = None, upward: bool = False
) -> str:
    """Draw a picture and the maps of each model over it."""
    original = _tile("input", [("ink" if pixels.ndim == 2 else "", _ink(pixels))], _shape(pixels))
    groups = [_group("", escape(title or exhibit.truth or ""), original)]
    for attention, view in exhibit.views.items():
        groups += _maps_over({_says(attention, view, escape): view}, pixels, attention, upward)
    return f'<div class="sample {size}">{"".join(groups)}</div>'


def _maps_over(views: Mapping[str, View], pixels: Array, attention: str, upward: bool) -> list[str]:
    """A group of maps over a picture for each view, whose key is its title."""
    shape, ink, groups = _shape(pixels), _ink(pixels), []
    for title, view in views.items():
        strongest = _strongest(view)
        tiles = "".join(
            _tile(
                name,
                [
                    ("ink faint" if pixels.ndim == 2 else "faint", ink),
                    ("", _heat((weights[::-1] if upward else weights) / strongest)),
                ],
                shape,
            )
            for name, weights in view.maps.items()
        )
        groups.append(_group(attention, title, tiles))
    return groups


def _shape(pixels: Array) -> str:
    return f"--shape:{pixels.shape[1]}/{pixels.shape[0]}"


def _text(exhibit: TextExhibit) -> str:
    """Draw each model's maps between all tokens, and the text with the weights of the query."""
    rows = []
    for attention, view in exhibit.views.items():
        # The first tokens attend to few tokens; their large weights would hide all others.
        strongest = _strongest(view, percentile=99.0)
        tiles = "".join(
            _tile(name, [("", _heat(_root(weights / strongest)))], "--shape:1")
            for name, weights in view.maps.items()
        )
        *_, combined = view.maps.values()
        weights = combined.mean(0) if exhibit.query is None else combined[exhibit.query]
        shades = _root(weights / (np.abs(weights).max() or 1.0))
        spans = [
            f'<span class="{"n" if weight < 0 else "p"}" title="{weight:.3f}" '
            f'style="--a:{90 * abs(shade):.0f}">{_visible(piece)}</span>'
            for piece, weight, shade in zip(exhibit.pieces, weights, shades, strict=True)
        ]
        if exhibit.query is not None:
            spans[exhibit.query] = spans[exhibit.query].replace('class="', 'class="query ', 1)
        says = _says(attention, view, _quoted)
        rows.append(
            f'<div class="sample text">{_group(attention, says, tiles)}'
            f"<pre>{''.join(spans)}</pre></div>"
        )
    comes = ""
    if exhibit.truth is not None:
        is_last = exhibit.query in (-1, len(exhibit.pieces) - 1)
        start = "Next comes" if is_last else "The outlined token hides"
        comes = f"{start} {_quoted(exhibit.truth)}."
    return f"{''.join(rows)}<p class='quiet'>{comes}</p>"


def _says(attention: str, view: View, shown: Callable[[str], str]) -> str:
    """A model's name, lambda and, on a second line, its prediction, if there is one."""
    lam = "" if view.lam is None else f", λ = {view.lam:.2f}"
    name = f"{_label(attention)}{lam}"
    if view.answer is None:
        return name
    return (
        f'{name}<br><span class="quiet">says {shown(view.answer)}, '
        f"{100.0 * view.probability:.0f}%</span>"
    )


def _group(attention: str, title: str, tiles: str) -> str:
    return (
        f'<div class="group {attention}"><strong>{title}</strong>'
        f'<div class="tiles">{tiles}</div></div>'
    )


def _tile(caption: str, layers: Sequence[tuple[str, str]], shape: str) -> str:
    """Stack pictures, given as `(class, data URL)`."""
    images = "".join(f'<img class="{kind}" alt="" src="{source}">' for kind, source in layers)
    return (
        f'<figure class="tile" style="{shape}"><div class="stack">{images}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _strongest(view: View, percentile: float = 100.0) -> float:
    return max(float(np.percentile(np.abs(w), percentile)) for w in view.maps.values()) or 1.0


def _root(shades: Array) -> Array:
    """Signed square roots, which make small weights of sparse text maps visible."""
    return np.sign(shades) * np.sqrt(np.abs(shades))


def _heat(shades: Array) -> str:
    """A map as a picture: the opacity is the absolute value, the color the sign."""
    opacity = np.clip(np.abs(shades), 0.0, 1.0) * 230.0
    color = np.where(shades[..., None] < 0, OPPOSE, ATTEND)
    return _png(np.concatenate([color, opacity[..., None]], axis=-1), "RGBA")


def _ink(pixels: Array) -> str:
    """A picture; gray values become the opacity of black, which the dark theme inverts."""
    if pixels.ndim == 3:
        return _png(255.0 * pixels, "RGB")
    return _png(np.stack([np.zeros_like(pixels), 255.0 * pixels], axis=-1), "LA")


def _png(values: Array, mode: str) -> str:
    """A PNG as a data URL; `values` are `[H, W, C]` in [0, 255]."""
    image = Image.fromarray(np.ascontiguousarray(values.round().astype(np.uint8)))
    assert image.mode == mode
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _visible(piece: str) -> str:
    """The text of a token, with line breaks made visible."""
    return escape(piece).replace("\n", "⏎\n")


def _quoted(piece: str) -> str:
    words: Mapping[str, str] = {" ": "a space", "\n": "a line break", "\t": "a tab"}
    return words.get(piece) or f"“{escape(piece)}”"


def _label(attention: str) -> str:
    """The label of an attention; other names are unchanged."""
    layer = ATTENTIONS.get(attention)
    return escape(attention if layer is None else layer.label)


def _number(attention: str) -> int:
    return list(ATTENTIONS).index(attention) if attention in ATTENTIONS else 0


def _swatch(kind: str) -> str:
    """A legend symbol, as in the charts."""
    return (
        f'<svg viewBox="0 0 44 14" class="{kind}" aria-hidden="true"><g class="{kind}">'
        f'<path class="line" d="M2 7H42"/>'
        f'<path class="dot" transform="translate(22 7)" d="{marker(_number(kind))}"/></g></svg>'
    )


def _anchor(section: Section) -> str:
    return section.results[0].modality
