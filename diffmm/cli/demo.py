"""`diffmm demo`: train softmax attention and its differential twins on text, images and sound."""

import argparse
import contextlib
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffmm import __version__
from diffmm.recipes.catalog import description, find_recipe
from diffmm.recipes.errors import InputError
from diffmm.recipes.importing import importing
from diffmm.recipes.settings import load, override

if TYPE_CHECKING:
    from diffmm.analysis.report import Section

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")
SEED = 0
NUM_THREADS = 1
RESULTS_NAME = "results.json"
REPORT_NAME = "report.html"


class Modality(NamedTuple):
    """A modality of the demo, and its recipe."""

    name: str
    title: str
    recipe: str
    metric: str
    """Name of the metric in the logs; `metric_name` is its name in the report."""
    metric_name: str
    rates: tuple[float, float, float]
    """Peak learning rates of `ATTENTIONS`."""


GRID = "2e-3, 4e-3 and 8e-3"
"""Learning rates from which the best was chosen for each attention, by the mean of three seeds
(docs/lab_notes.md, "A slow start")."""

MODALITIES = (
    Modality(
        "text",
        "Text",
        "text/stdlib_tiny",
        "val/bits_per_byte",
        "bits per byte",
        (4e-3, 4e-3, 8e-3),
    ),
    Modality(
        "image", "Images", "image/digits_tiny", "val/accuracy", "accuracy", (2e-3, 2e-3, 2e-3)
    ),
    Modality(
        "audio",
        "Sound",
        "audio/sound_events_tiny",
        "val/accuracy",
        "accuracy",
        (4e-3, 2e-3, 4e-3),
    ),
)


def run(verb: str, arguments: Sequence[str]) -> int:
    """`diffmm demo [--output DIR] [--max-steps N]`."""
    parser = argparse.ArgumentParser(
        prog="diffmm demo",
        description="Train softmax, diff_v1 and diff_v2 twins on text, images and sound, on the "
        "CPU and offline; print a table and write a report with curves and attention "
        "maps.",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("runs/demo"),
        help="directory of the demo, replaced when it is complete (default: %(default)s)",
    )
    parser.add_argument(
        "--max-steps", metavar="N", type=int, help="number of steps of each run, for a quick look"
    )
    options = parser.parse_args(arguments)
    if options.max_steps is not None and options.max_steps < 1:
        raise InputError(f"--max-steps must be at least 1, got {options.max_steps}")
    demo(options.output, max_steps=options.max_steps)
    return 0


def demo(output: Path, *, max_steps: int | None = None) -> None:
    """Train the nine models, print the table, write the report.

    Args:
        output: Directory for `report.html`, `results.json` and one run directory per model. It must
            not exist or contain an earlier demo, which is replaced once this one is complete.
        max_steps: Number of steps of every run; by default, as in the recipes.

    Raises:
        InputError: If `output` contains anything else.
    """
    start = time.monotonic()
    with replacing(output) as directory:
        import torch

        from diffmm.analysis.report import render_report
        from diffmm.analysis.results import table

        # Such small models gain little from a second thread, and lose much if its core is busy.
        torch.set_num_threads(min(NUM_THREADS, torch.get_num_threads()))
        print(f"Nine small models, seed {SEED}, on the CPU: a few minutes in all.", flush=True)
        sections = [
            train_twins(modality, number * len(ATTENTIONS), directory, max_steps)
            for number, modality in enumerate(MODALITIES)
        ]
        results = [result for section in sections for result in section.results]
        facts = {**machine(), "seed": SEED, "seconds": round(time.monotonic() - start, 1)}
        rows = [result.row() for result in results]
        write(directory / RESULTS_NAME, json.dumps({**facts, "runs": rows}, indent=2) + "\n")
        write(directory / REPORT_NAME, render_report(sections, facts=in_words(facts)))
    print(f"\n{table(results)}\n\n{time.monotonic() - start:.0f} s in all; one seed, so small")
    print(f"differences may be noise. Each learning rate is the best of {GRID}.")
    print(f"Curves and attention maps: {output / REPORT_NAME}")


def train_twins(
    modality: Modality, number: int, directory: Path, max_steps: int | None
) -> "Section":
    """Train the three runs of a modality, and return their section of the report."""
    with importing():
        from diffmm.analysis.report import Section
        from diffmm.cli.demo_runs import train
        from diffmm.cli.demo_samples import SAMPLES

    recipe = find_recipe(modality.recipe)
    runs = []
    for offset, attention in enumerate(ATTENTIONS, start=1):
        values = load([recipe])
        override(values, "vars.attention", attention)
        override(values, "vars.seed", SEED)
        override(values, "vars.learning_rate", modality.rates[offset - 1])
        if max_steps is not None:
            override(values, "trainer.max_steps", max_steps)
        progress = f"[{number + offset}/{len(MODALITIES) * len(ATTENTIONS)}]"
        runs.append(train(modality, values, directory / modality.name / attention, progress))
    samples = SAMPLES[modality.name]
    return Section(
        title=modality.title,
        task=description(recipe.read_text(encoding="utf-8")),
        results=[run.result for run in runs],
        exhibits=samples.make({run.result.attention: run.model for run in runs}, runs[0].data),
        maps_caption=samples.caption,
    )


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a new directory, which replaces `target` when the block succeeds.

    Raises:
        InputError: If `target` exists and is not an earlier demo.
    """
    if target.exists() and not (target.is_dir() and _is_ours(target)):
        raise InputError(
            f"{target} exists and is not an earlier demo: give another --output, or remove it"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    building.chmod(0o755)
    try:
        yield building
        if target.exists():
            shutil.rmtree(target)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _is_ours(directory: Path) -> bool:
    return (directory / RESULTS_NAME).is_file() or not any(directory.iterdir())


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def machine() -> dict[str, str | int]:
    """Return facts about the machine and the installed versions."""
    import torch

    return {
        "diffmm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def in_words(facts: Mapping[str, Any]) -> str:
    """Format the last line of the report."""
    return (
        f"diffmm {facts['diffmm']}, torch {facts['torch']}, Python {facts['python']}, "
        f"{facts['machine']}, {facts['threads']} threads, seed {facts['seed']}; "
        f"{facts['seconds']:.0f} seconds in all. Made by diffmm demo."
    )
