"""`diffmm compare`: runs side by side, as a table, a CSV file or a page."""

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmm.checkpoint_folders import write_text
from diffmm.recipes.errors import InputError, warn

if TYPE_CHECKING:
    from diffmm.runs.summaries import Best, Summary

DESCRIPTION = """Print the settings in which runs differ, and for each run the best and the last
value of every validation metric, the number of parameters and the speed. A resumed run is one run,
with one curve. Of runs that differ only in their seeds, the mean and the standard deviation follow,
and the differences to the first group, seed by seed, with the 95 % intervals of their means."""

MOST_SETTINGS = 6
"""Maximum number of settings in a printed table; the CSV file has all of them."""

WIDEST = 40
"""Maximum width of a printed cell, in characters."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Compare runs."""
    parser = argparse.ArgumentParser(
        prog="diffmm compare", allow_abbrev=False, description=DESCRIPTION
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's directory, or a folder of runs (a sweep)"
    )
    parser.add_argument(
        "--output",
        metavar="PAGE.html",
        type=Path,
        help="also write a page with the table, the curves and, if the runs' checkpoints and "
        "data allow it, attention maps",
    )
    parser.add_argument(
        "--csv", metavar="FILE.csv", type=Path, help="also write the table to this file"
    )
    options = parser.parse_args(arguments)
    check_output(options.output, ".html")
    check_output(options.csv, ".csv")
    compare(options.runs, page=options.output, table=options.csv)
    return 0


def compare(paths: Sequence[str], *, page: Path | None = None, table: Path | None = None) -> None:
    """Print the table of runs, and write it to the given files.

    Args:
        paths: Run directories, or folders of run directories.
        page: HTML file to write.
        table: CSV file to write.

    Raises:
        InputError: If a path is not a run.
    """
    from diffmm.runs.summaries import differing, find_runs, summarize

    runs = summarize(find_runs(paths))
    print(text_table(*rows_of(runs)))
    left_out = len(differing(runs)) - len(shown_settings(runs))
    if left_out > 0:
        print(f"{left_out} more settings differ: --csv FILE.csv lists all of them")
    for head, rows in seed_tables(runs):
        print(f"\n{text_table(head, rows)}")
    for run in runs:
        if not run.curves:
            warn(f"{run.path} has no metrics in a CSV file")
    if table is not None:
        write_csv(runs, table)
        print(f"table: {table}")
    if page is not None:
        from diffmm.analysis.comparison import render_comparison
        from diffmm.cli.compare_maps import exhibits_of

        exhibits, why_none = exhibits_of(runs)
        if why_none:
            warn(f"the page has no attention maps: {why_none}")
        write_text(page, render_comparison(page_of(runs), exhibits, why_none))
        print(f"page: {page}")


def check_output(path: Path | None, ending: str) -> None:
    """Check that an output file can be written, before anything is read.

    Raises:
        InputError: If it cannot; the message names it.
    """
    if path is None:
        return
    if path.suffix.lower() != ending:
        raise InputError(f"{path} must end in {ending}")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to write {path.name} to")
    if path.is_dir():
        raise InputError(f"{path} is a folder")


def rows_of(runs: Sequence["Summary"]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table, as text."""
    from diffmm.runs.summaries import metrics_of, short_settings, shown

    settings, metrics = shown_settings(runs), metrics_of(runs)
    head = ["run", *short_settings(settings)]
    for metric in metrics:
        head += [f"{metric} best", "step", "last"]
    units = dict.fromkeys(run.speed[0] for run in runs if run.speed)
    head += ["steps", "parameters", *(unit.replace("_per_second", "/s") for unit in units)]
    rows = []
    for run in runs:
        row = [run.name, *(shown(run, setting) for setting in settings)]
        for metric in metrics:
            best = run.best(metric)
            row += (
                [f"{best.value:.4g}", f"{best.step:,}", last_text(best, run.steps)]
                if best
                else ["-"] * 3
            )
        size = run.num_parameters
        row += [f"{run.steps:,}", "-" if size is None else f"{size:,}"]
        row += [f"{run.speed[1]:,.0f}" if run.speed and run.speed[0] == u else "-" for u in units]
        rows.append(row)
    return head, rows


def last_text(best: "Best", steps: int) -> str:
    """The last value of a metric, with its step if the run has made more steps since."""
    is_of_end = best.last_step == steps
    return f"{best.last:.4g}" if is_of_end else f"{best.last:.4g} (step {best.last_step:,})"


def shown_settings(runs: Sequence["Summary"]) -> list[str]:
    """The settings of the table, at most `MOST_SETTINGS` of those that differ: first those that all
    runs have, because the others belong to different recipes."""
    from diffmm.runs.summaries import differing

    names = differing(runs)
    if len(names) <= MOST_SETTINGS:
        return names
    return sorted(names, key=lambda n: not all(n in run.settings for run in runs))[:MOST_SETTINGS]


def seed_tables(runs: Sequence["Summary"]) -> list[tuple[list[str], list[list[str]]]]:
    """Headers and rows of the tables of runs that differ only in their seeds: means, and paired
    differences. Empty if there are none."""
    from diffmm.runs.seeds import difference_rows, groups_of, mean_rows

    groups = groups_of(runs, MOST_SETTINGS)
    tables = [mean_rows(groups), difference_rows(groups)] if groups else []
    return [(head, rows) for head, rows in tables if rows]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table as plain text, with text aligned left and numbers right."""
    padded = []
    for name, *cells in zip(head, *rows, strict=True):
        column = [name, *all_shortened(cells)]
        width = max(map(len, column))
        is_number = all(cell[:1] in "+-0123456789" for cell in column[1:])
        padded.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in column])
    lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    rule = "  ".join("─" * len(column[0]) for column in padded)
    return "\n".join([lines[0], rule, *lines[1:]])


def all_shortened(cells: Sequence[str]) -> list[str]:
    """Shorten the cells of a column, unless different ones would become equal."""
    short = list(map(shortened, cells))
    return short if len(set(short)) == len(set(cells)) else list(cells)


def shortened(cell: str) -> str:
    """Shorten a cell to `WIDEST` characters, keeping its end, which is most specific in a path."""
    return cell if len(cell) <= WIDEST else f"…{cell[1 - WIDEST :]}"


def write_csv(runs: Sequence["Summary"], path: Path) -> None:
    """Write the table as CSV, with full names and numbers."""
    from diffmm.runs.summaries import differing, metrics_of, shown

    settings, metrics = differing(runs), metrics_of(runs)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    parts = [
        part
        for m in metrics
        for part in (f"{m} best", f"{m} best step", f"{m} last", f"{m} last step")
    ]
    units = dict.fromkeys(run.speed[0] for run in runs if run.speed)
    writer.writerow(["run", *settings, *parts, "steps", "parameters", *units])
    for run in runs:
        row: list[Any] = [run.path, *(shown(run, setting) for setting in settings)]
        for metric in metrics:
            best = run.best(metric)
            row += [best.value, best.step, best.last, best.last_step] if best else [""] * 4
        row += [run.steps, "" if run.num_parameters is None else run.num_parameters]
        row += [run.speed[1] if run.speed and run.speed[0] == unit else "" for unit in units]
        writer.writerow(row)
    write_text(path, text.getvalue())


def page_of(runs: Sequence["Summary"]) -> Any:
    """Return the contents of the page except attention maps."""
    from diffmm import __version__
    from diffmm.analysis.comparison import Chart, Page
    from diffmm.analysis.lambdas import mean_lambda_curve
    from diffmm.runs.summaries import description_of, metrics_of

    head, rows = rows_of(runs)
    names = ["train/loss", *metrics_of(runs)]
    charts = [
        Chart(
            name,
            {number: run.curves[name] for number, run in enumerate(runs) if name in run.curves},
        )
        for name in names
    ]
    lambdas = {number: mean_lambda_curve(run.curves) for number, run in enumerate(runs)}
    charts.append(
        Chart("λ, mean of the layers", {n: curve for n, curve in lambdas.items() if curve})
    )
    tasks = dict.fromkeys(filter(None, map(description_of, runs)))
    return Page(
        title=f"{len(runs)} runs of diffmm",
        tasks=list(tasks),
        head=head,
        rows=rows,
        seed_tables=seed_tables(runs),
        charts=[chart for chart in charts if chart.curves],
        facts=f"diffmm {__version__}. Made by diffmm compare.",
    )
