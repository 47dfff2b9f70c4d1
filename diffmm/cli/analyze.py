"""`diffmm analyze`: the paper's measurements on trained models, as tables, a page and files."""

import argparse
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffmm.checkpoint_folders import write_text
from diffmm.cli.compare import check_output, text_table
from diffmm.new_folders import appearing
from diffmm.recipes.errors import InputError, refusing, warn
from diffmm.recipes.importing import importing
from diffmm.recipes.trust import add_trust_option

if TYPE_CHECKING:
    from diffmm.analysis.exhibits import Exhibit
    from diffmm.analysis.figures import Figure
    from diffmm.analysis.sections import AnalysisSection
    from diffmm.cli.analyze_subjects import Request, Subject
    from diffmm.runs.summaries import Summary

DESCRIPTION = """Measure trained models on samples of their validation data, of other data (--data)
or on a text (--text): attention scores (the share of attention to an answer and to noise),
concentration of the maps, lambda, outliers of logits and hidden states, the effect of quantization,
and gradients at the start of training. What cannot be measured is reported with the reason."""

NUM_SAMPLES = 32


def run(verb: str, arguments: Sequence[str]) -> int:
    """Analyze models."""
    options = make_parser().parse_args(arguments)
    check_output(options.output, ".html")
    for name in ("csv", "png"):
        check_folder(getattr(options, name))
    if options.samples < 1:
        raise InputError(f"--samples must be at least 1, got {options.samples}")
    if options.text is not None and options.data is not None:
        raise InputError("--text and --data exclude each other: give one of them")
    if options.text == "":
        raise InputError("--text is empty: it needs at least one character")
    if options.span is not None and options.text is None:
        raise InputError(f"--span {options.span} marks the answer in a text: give --text TEXT")
    span = None if options.span is None else parse_span(options.span)
    with importing():
        from diffmm.cli.analyze_subjects import Request

    request = Request(
        num_samples=options.samples,
        data=options.data,
        text=options.text,
        span=span,
        device=options.device,
        tokenizer=options.tokenizer,
        trust=options.trust,
    )
    analyze(options.runs, request, page=options.output, csv_dir=options.csv, png_dir=options.png)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Create the parser."""
    parser = argparse.ArgumentParser(
        prog="diffmm analyze", allow_abbrev=False, description=DESCRIPTION
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run, a folder of runs, a checkpoint, or model.safetensors (or its folder)",
    )
    parser.add_argument(
        "--output", metavar="PAGE.html", type=Path, help="also write a page with tables and figures"
    )
    parser.add_argument(
        "--csv",
        metavar="DIR",
        type=Path,
        help="also write all tables, per layer and head, and the numbers of all figures and "
        "attention maps to DIR",
    )
    parser.add_argument(
        "--png", metavar="DIR", type=Path, help="also write all figures and attention maps to DIR"
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=int,
        default=NUM_SAMPLES,
        help=f"number of samples of the data [{NUM_SAMPLES}]",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="use this instead of the validation data: labeled images or sounds as in `diffmm "
        "validate`, or a text file or a folder of them",
    )
    parser.add_argument("--text", metavar="TEXT", help="use this text instead of data")
    parser.add_argument(
        "--span",
        metavar="A:B",
        help="characters A to B of the text (0-based, B exclusive) hold the answer that follows "
        "the text: attention scores of its last token",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="tokenizer of texts, if the weights do not name one"
    )
    add_trust_option(parser)
    return parser


def parse_span(span: str) -> tuple[int, int]:
    """Parse `A:B`.

    Raises:
        InputError: If it has another format, or is empty.
    """
    match = re.fullmatch(r"(\d+):(\d+)", span)
    if match is None:
        raise InputError(f"--span must be A:B, two numbers of characters, got {span!r}")
    start, end = int(match[1]), int(match[2])
    if start >= end:
        raise InputError(f"--span {span} is empty: A must be less than B")
    return start, end


def check_folder(path: Path | None) -> None:
    """Check that a folder for files can be made, before anything is read.

    Raises:
        InputError: If it cannot; the message names it.
    """
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: give a folder")
    if not path.absolute().parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to make {path.name} in")


def analyze(
    paths: Sequence[str],
    request: "Request",
    *,
    page: Path | None = None,
    csv_dir: Path | None = None,
    png_dir: Path | None = None,
) -> None:
    """Measure models, print the tables, and write the given files.

    Args:
        paths: Runs, folders of runs, checkpoints, or files of weights.
        request: What to measure them on.
        page: HTML file to write.
        csv_dir: Folder for CSV files.
        png_dir: Folder for figures.

    Raises:
        InputError: If a path does not exist, or nothing could be measured.
    """
    from diffmm.analysis.sections import sections_of
    from diffmm.cli.analyze_subjects import find_subjects

    subjects = find_subjects(paths, request)
    # Curves of lambda over training need neither weights nor data; only files show them.
    has_files = page is not None or csv_dir is not None or png_dir is not None
    is_own = request.text is None and request.data is None
    has_curves = is_own and has_files
    if all(s.problem and not (has_curves and s.analyzed.curves) for s in subjects):
        raise InputError(*(subject.problem for subject in subjects))
    head, rows = table_of(subjects)
    print(text_table(head, rows))
    sections = sections_of([subject.analyzed for subject in subjects])
    for subject in subjects:
        if subject.problem:
            warn(subject.problem)
    for section in sections:
        if section.summary is not None:
            print(f"\n{section.title}")
            print(text_table(section.summary.head, section.summary.texts()))
        for problem in section.problems:
            warn(f"{section.title.lower()}: {problem}")
    if has_files:
        _write_files(paths, request, subjects, sections, page, csv_dir, png_dir)
    if not any(section.summary or (has_curves and section.figures) for section in sections):
        raise InputError("nothing was measured, for the reasons above")


def _write_files(
    paths: Sequence[str],
    request: "Request",
    subjects: Sequence["Subject"],
    sections: Sequence["AnalysisSection"],
    page: Path | None,
    csv_dir: Path | None,
    png_dir: Path | None,
) -> None:
    """Write the files that are given, as in `analyze`."""
    from diffmm.analysis.map_figures import map_figures
    from diffmm.runs.summaries import find_runs, summarize

    is_own = request.text is None and request.data is None
    runs = summarize(find_runs(paths)) if all(s.is_run for s in subjects) else []
    exhibits, why_none = _exhibits(runs, request)
    if runs and is_own and why_none and not any(subject.problem for subject in subjects):
        warn(f"attention maps: {why_none}")
    maps = list(map_figures(exhibits, [subject.analyzed.name for subject in subjects]))
    if csv_dir is not None:
        write_tables(sections, maps, csv_dir)
    if png_dir is not None:
        write_figures(sections, maps, png_dir)
    if page is not None:
        write_page(page, request, subjects, sections, runs, exhibits, why_none)


def _exhibits(runs: Sequence["Summary"], request: "Request") -> "tuple[Sequence[Exhibit], str]":
    """Samples with attention maps, or the reason why there are none."""
    from diffmm.cli.compare_maps import exhibits_of

    if request.text is not None or request.data is not None:
        return [], "they are drawn for samples of the runs' own data"
    if not runs:
        return [], "they are drawn for runs, with their data"
    return exhibits_of(runs)


def table_of(subjects: Sequence["Subject"]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of models."""
    metrics = list(dict.fromkeys(m for subject in subjects for m in subject.metrics))
    head = ["run", "attention", "parameters", "samples", *metrics]
    rows = [
        [
            subject.analyzed.name,
            subject.attention,
            "-" if subject.num_parameters is None else f"{subject.num_parameters:,}",
            str(subject.num_samples),
            *(f"{subject.metrics[m]:.4g}" if m in subject.metrics else "-" for m in metrics),
        ]
        for subject in subjects
    ]
    return head, rows


def write_tables(
    sections: Sequence["AnalysisSection"], maps: Sequence["Figure"], folder: Path
) -> None:
    """Write all tables, and the numbers of all figures and maps, as CSV."""
    from diffmm.analysis.sections import tables_of

    tables = tables_of(sections) + [(f"figure_{figure.name}", figure.table()) for figure in maps]
    with refusing(), appearing(folder) as unfinished:
        for name, rows in tables:
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows(rows)
            (unfinished / f"{name}.csv").write_text(text.getvalue(), encoding="utf-8")
    print(f"tables: {folder} ({len(tables)} files)")


def write_figures(
    sections: Sequence["AnalysisSection"], maps: Sequence["Figure"], folder: Path
) -> None:
    """Write all figures and maps as PNG."""
    from diffmm.analysis.figures import png
    from diffmm.analysis.sections import figures_of

    figures: list[Figure] = [*figures_of(sections), *maps]
    with refusing(), appearing(folder) as unfinished:
        for figure in figures:
            (unfinished / f"figure_{figure.name}.png").write_bytes(png(figure))
    print(f"figures: {folder} ({len(figures)} files)")


def write_page(
    page: Path,
    request: "Request",
    subjects: Sequence["Subject"],
    sections: Sequence["AnalysisSection"],
    runs: Sequence["Summary"],
    exhibits: Sequence["Exhibit"],
    why_none: str,
) -> None:
    """Write the page, with what `diffmm compare` has of the models if they are those of runs."""
    from diffmm import __version__
    from diffmm.analysis.analysis_page import AnalysisPage, render_analysis
    from diffmm.cli.compare import page_of

    head, rows = table_of(subjects)
    contents = AnalysisPage(
        title="Analysis" if len(subjects) == 1 else f"Analysis of {len(subjects)} runs",
        data=request.description,
        head=head,
        rows=rows,
        problems=[subject.problem for subject in subjects if subject.problem],
        sections=sections,
        training=page_of(runs) if any(run.curves for run in runs) else None,
        exhibits=exhibits,
        why_none=why_none,
        facts=f"diffmm {__version__}. Made by diffmm analyze.",
    )
    write_text(page, render_analysis(contents))
    print(f"page: {page}")
