"""The figures in the summary of docs/performance.md and in the README are those of its tables."""

import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
SUMMARY, TABLES = DOC.split("\n## ", 1)


def rows_of(heading: str) -> list[list[str]]:
    """The cells of all table rows below a heading."""
    section = re.split(r"^## ", DOC.split(f"\n## {heading}\n")[1], flags=re.M)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def ratios(heading: str) -> list[float]:
    """The bold ratios below a heading."""
    cells = [cell for row in rows_of(heading) for cell in row]
    return [float(text) for cell in cells for text in re.findall(r"\(\*\*([\d.]+)\*\*\)", cell)]


def two_digits(figure: str) -> Decimal:
    """A figure with two decimals; halves are rounded up."""
    return Decimal(figure).quantize(Decimal("0.01"), ROUND_HALF_UP)


def row(heading: str, *beginnings: str) -> list[str]:
    """The row whose cells begin so."""
    (found,) = (
        row
        for row in rows_of(heading)
        if all(cell.startswith(text) for cell, text in zip(row, beginnings, strict=False))
    )
    return found


def test_the_summary_is_of_the_tables() -> None:
    lines = [line for line in SUMMARY.splitlines() if line.startswith("| ")][1:]
    figures = [figure for line in lines for figure in re.findall(r"\d\.\d+", line)]
    # The second column has targets, and the last row names the range of several runs.
    targets = [line.split("|")[2].strip() for line in lines]
    for target in targets:
        if target:
            figures.remove(target)
    assert len(figures) > 20
    assert [figure for figure in figures if not re.search(rf"\b{figure}\b", TABLES)] == ["0.99"]


def test_the_readme_has_the_ratios_of_the_op_and_of_whole_models() -> None:
    h200 = [cells[2] for cells in rows_of("One attention op")[2:8]]
    times = [float(text) for cell in h200 for text in re.findall(r"\*\*([\d.]+)\*\*", cell)]
    assert len(times) == 6
    assert f"take {min(times):.2f} to {max(times):.2f} times as long" in README
    short, long = (
        row("Whole models", f"text, {n}", rate) for n, rate in ((2048, "117"), (8192, "95"))
    )
    v1, v2 = (
        [two_digits(re.findall(r"\(\**([\d.]+)", cells[i])[0]) for cells in (short, long)]
        for i in (2, 3)
    )
    assert f"trains at {v1[0]} of the rate" in README
    assert f"and at {v1[1]} for 8,192" in README
    assert f"For v2, the ratios are {v2[0]} and {v2[1]}" in README
    (grouped,) = re.findall(r"grouped, 4 signal heads per noise head: [\d,]+ \(([\d.]+)\)", DOC)
    assert f"per noise head, {two_digits(grouped)} for 8,192 tokens" in README


def test_the_readme_has_the_ratios_of_fit_and_generate() -> None:
    fit = ratios("The command line")
    assert len(fit) == 6
    assert f"trains at {min(fit):.2f} to {max(fit):.2f} of the rate" in README
    per_token = [
        float(cells[2].split()[0]) / float(cells[1]) for cells in rows_of("Generation")[2:]
    ]
    assert len(per_token) == 6
    assert f"takes {min(per_token):.2f} to {max(per_token):.2f} times as long" in README
