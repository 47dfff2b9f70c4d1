"""The quality of attention variants at equal parameters, tokens and time: the table.

    python -m benchmarks.quality prepare DATA [--tasks text,speech]
    python -m benchmarks.quality [run] [--tasks text,digits] [--variants softmax,diff_v1]
        [--data DATA] [--out DIR] [--minutes M] [--part 0/2] [--size tiny]
    python -m benchmarks.quality table [--out DIR]
    python -m benchmarks.quality weights FOLDER [--tasks text] [--out DIR]

`run` fills the table cell by cell. A cell is one training run of a recipe: a task, a variant, a
peak learning rate and a seed. All variants have the same number of parameters (the library's rule),
see the same data in the same order, and have a learning rate tuned over the same grid, which is
extended where the best rate is at its end (see `benchmarks.quality.plan`). Each cell is appended to
`OUT/cells/TASK.jsonl` as it ends, with its validation metrics at several steps. Cells in that file
are not run again, so that the table can be filled over many sittings (`--minutes` starts no cell
after that time) and by several processes (`--part I/N` takes every Nth pair of task and variant).
`--together N` trains N cells of small models at the same time, step by step in turns, each in a
CUDA stream of its own. Cells that share a device disturb each other's times: this needs
`--no-equal-time`, and processes that share one need that or `--shared`, with which cells of equal
time have the steps that follow from times measured before.
`--size tiny` runs a table of tiny models in minutes on a CPU.

`table` prints the table and writes `OUT/quality.md`, `quality.csv` and `quality.png`. `weights`
trains the best seed of each variant again and exports its weights with a model card.

The tasks text, fashion_mnist, letters, speech, emoji and transcripts need prepared data, which
`prepare` makes from Python's packages and Debian's (dataset-fashion-mnist, fonts,
asterisk-core-sounds-*, fonts-noto-color-emoji, unicode-cldr-core) and which can be carried to a
machine without them: each task is a folder of DATA of its own. Cells keep a fingerprint of it, and
`OUT/cells` takes no cells of other data, with which they could not be compared.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality import weights
from benchmarks.quality.cells import CELLS, Bench, fill, read_cells
from benchmarks.quality.engine import finish
from benchmarks.quality.plan import Settings, results
from benchmarks.quality.prepared import Sources, prepare
from benchmarks.quality.table import draw, lines, markdown, write_csv
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.variants import ALL, SOFTMAX, VARIANTS
from diffmm.recipes.errors import InputError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("prepare", help="prepare data")
    made.add_argument("folder", type=Path, metavar="DATA")
    prepared = [name for name, spec in TASKS.items() if spec.prepared]
    made.add_argument("--tasks", default=",".join(prepared), help="(default: %(default)s)")
    made.add_argument(
        "--text-mib",
        type=int,
        default=110,
        metavar="N",
        help="text before compression, in MiB; about 0.17 of that after it (default: %(default)s)",
    )
    run = verbs.add_parser("run", help="run cells")
    run.add_argument("--data", type=Path, default=Path("data/quality"), metavar="DATA")
    run.add_argument("--minutes", type=float, metavar="M", help="start no cell after this time")
    run.add_argument(
        "--equal-time",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="cells of equal time, too; without, for cells that share a device",
    )
    run.add_argument(
        "--shared",
        action="store_true",
        help="other processes use the device: the times of these cells are not compared",
    )
    run.add_argument(
        "--together",
        type=int,
        default=1,
        metavar="N",
        help="cells that train at the same time; more than one needs --no-equal-time",
    )
    run.add_argument("--part", default="0/1", metavar="I/N", help="every Nth pair from the Ith")
    table = verbs.add_parser("table", help="print and draw the table")
    exported = verbs.add_parser("weights", help="export the best twins")
    exported.add_argument("folder", type=Path, metavar="FOLDER")
    exported.add_argument("--data", type=Path, default=Path("data/quality"), metavar="DATA")
    for each in (run, table, exported):
        each.add_argument("--out", type=Path, default=Path("runs/quality"), metavar="DIR")
        each.add_argument("--size", choices=("full", "tiny"), default="full")
        each.add_argument("--seeds", default="0,1,2,3", help="(default: %(default)s)")
        each.add_argument("--tuning-seeds", default="0", help="(default: %(default)s)")
        each.add_argument("--rates", help="grid of learning rates; each task's own by default")
        each.add_argument("--steps", type=int, help="number of steps; each task's own by default")
        each.add_argument("--compile", action="store_true", help="cells of compiled models")
    for each in (run, exported):
        each.add_argument("--tasks", default=",".join(TASKS), help="(default: %(default)s)")
        each.add_argument("--variants", default=",".join(VARIANTS), help="(default: %(default)s)")
    return parser


def names(
    parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]
) -> list[str]:
    """The names in a comma-separated option."""
    given = text.split(",")
    for name in given:
        if name not in known:
            parser.error(f"{option}: {name!r} is not one of {', '.join(known)}")
    return given


def numbers(
    parser: argparse.ArgumentParser, option: str, text: str, kind: Callable[[str], float]
) -> list[float]:
    """The different numbers of a comma-separated option, at least 0."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        parser.error(f"{option} must be numbers separated by commas, got {text!r}")
    if len(set(found)) != len(found) or min(found) < 0:
        parser.error(f"{option} must be different numbers of at least 0, got {text!r}")
    return found


def settings_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Settings:
    """The settings of a command line."""
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    seeds, tuning = (
        [int(seed) for seed in numbers(parser, option, text, int)]
        for option, text in (("--seeds", options.seeds), ("--tuning-seeds", options.tuning_seeds))
    )
    rates = options.rates and numbers(parser, "--rates", options.rates, float)
    return Settings(seeds, tuning, rates, options.size, options.compile, options.steps)


def export(bench: Bench, tasks: Sequence[str], variants: Sequence[str], folder: Path) -> list[Path]:
    """Train the best seeds of the table again, and save them.

    Raises:
        SystemExit: If the table has no such cells.
    """
    rows = read_cells(bench.out)
    found = [
        line
        for line in lines(rows, bench.settings)
        if line.budget == "tokens" and line.task in tasks and line.variant in variants
    ]
    if not found:
        raise SystemExit(f"{bench.out / CELLS} has no complete cells of these tasks and variants")
    saved = []
    for line in found:
        seed = weights.best_seed(line)
        row = results(rows, bench.settings, line.task, line.variant)[seed]
        cell = bench.settings.cell(line.task, line.variant, line.rate, seed)
        run, again = finish(bench.training(cell))
        bench.forget(())
        target = folder / f"{line.task}_{line.variant}"
        saved.append(weights.save(target, run.task, line, row, again))
    return saved


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    parser = make_parser()
    options = parser.parse_args(given)
    if options.verb == "prepare":
        if options.text_mib < 1:
            parser.error(f"--text-mib must be at least 1, got {options.text_mib}")
        prepared = [name for name, spec in TASKS.items() if spec.prepared]
        for name in names(parser, "--tasks", options.tasks, prepared):
            folder = options.folder / name
            if not folder.exists():
                options.folder.mkdir(parents=True, exist_ok=True)
                prepare(name, folder, Sources(text_bytes=options.text_mib * 2**20))
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"{folder}: {size / 2**20:.1f} MiB", flush=True)
        return
    settings = settings_of(parser, options)
    if options.verb == "table":
        found = lines(read_cells(options.out), settings)
        if not found:
            raise SystemExit(f"{options.out / CELLS} has no complete cells of this size")
        text = markdown(found)
        print(text)
        (options.out / "quality.md").write_text(text, encoding="utf-8")
        write_csv(found, options.out / "quality.csv")
        draw(found, options.out / "quality.png")
        return
    tasks = names(parser, "--tasks", options.tasks, list(TASKS))
    variants = names(parser, "--variants", options.variants, list(ALL))
    if options.verb == "weights":
        bench = Bench(options.data, options.out, settings)
        for path in export(bench, tasks, variants, options.folder):
            print(path, flush=True)
        return
    if SOFTMAX not in variants:
        parser.error(f"--variants needs {SOFTMAX}, which the others are compared with")
    if options.together < 1:
        parser.error(f"--together must be at least 1, got {options.together}")
    if options.together > 1 and options.equal_time:
        parser.error(
            "--together needs --no-equal-time, because cells that share a device disturb each "
            "other's times"
        )
    part, slash, parts = options.part.partition("/")
    if not slash or not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        parser.error(f"--part must be I/N with 0 <= I < N, got {options.part}")
    pairs = [(task, variant) for task in tasks for variant in variants][int(part) :: int(parts)]
    bench = Bench(
        options.data,
        options.out,
        settings,
        equal_time=options.equal_time,
        shared=options.shared,
    )
    deadline = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    for row in fill(
        bench, pairs, deadline, equal_time=options.equal_time, together=options.together
    ):
        metric = TASKS[row["task"]].metric
        print(
            f"{row['task']} {row['variant']} rate {row['rate']:g} seed {row['seed']} equal "
            f"{row['budget']}: {metric} {row[metric]:.4f}, {row['wall_seconds']:.1f} s",
            flush=True,
        )


def command() -> None:
    """`main`, whose interruption and whose errors of files and settings end it with one line."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command continues with the next cell") from None
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    command()
