"""Heat maps of retrieval: the accuracy of runs over depth (or another setting) and length.

    python -m benchmarks.retrieval RUN... [--lengths 64,96,128] [--values 0,0.25,0.5,0.75,1]
        [--num-samples 200] [--out DIR]

RUN is a run of a recipe with `datamodules.RetrievalData`, such as text/needles_tiny. Each heat map
varies the length and the setting `axis` of the run's source: the depth of the needles that are
asked for, the number of pairs, or the number of classes. Sequences are drawn from the seed of the
run's test split, and are the same for all runs with the same settings.

For each run, `OUT/NAME.csv` has the numbers and `OUT/NAME.png` the picture.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from datamodules.text.retrieval.data import TEST, RetrievalData, RetrievalSamples
from datamodules.text.retrieval.sources import RetrievalSource
from diffmm import load
from diffmm.analysis.retrieval import RetrievalGrid, measure_retrieval
from diffmm.batch import TextBatch
from diffmm.recipes.errors import InputError
from diffmm.recipes.settings import load as load_values
from diffmm.recipes.trainer import RecipeCLI
from diffmm.runs.directories import config_around


@dataclass(frozen=True)
class Grid:
    """The cells of a heat map, and the number of sequences per cell."""

    values: Sequence[float]
    lengths: Sequence[int]
    num_samples: int = 200
    batch_size: int = 50


def batches(data: RetrievalData, grid: Grid, value: float, length: int) -> Iterator[TextBatch]:
    """The batches of a cell."""
    samples = RetrievalSamples(
        data.source.varied(value),
        length=length,
        num_samples=grid.num_samples,
        split=TEST,
        seed=data.seed,
    )
    for start in range(0, grid.num_samples, grid.batch_size):
        stop = min(start + grid.batch_size, grid.num_samples)
        yield default_collate([samples[index] for index in range(start, stop)])


def run_data(run: str) -> RetrievalData:
    """The datamodule of a run.

    Raises:
        InputError: If it is not a run, or of other data.
    """
    config = config_around(Path(run))
    if config is None:
        raise InputError(f"{run} is not a run: it has no config.yaml")
    overrides = ["--trainer.logger=false", "--trainer.accelerator=auto", "--trainer.callbacks=[]"]
    cli: Any = RecipeCLI({**load_values([config], overrides), "run_dir": "runs"}, trust=False)
    if not isinstance(cli.datamodule, RetrievalData):
        raise InputError(
            f"{run} was trained on {type(cli.datamodule).__name__}: a heat map needs a run of "
            f"RetrievalData, such as text/needles_tiny"
        )
    return cli.datamodule


def lengths_of(source: RetrievalSource, values: Sequence[float], longest: int) -> list[int]:
    """Up to four lengths, from the shortest that fits all values to `longest`.

    Raises:
        InputError: If `longest` is too short.
    """
    least = max(source.varied(value).least_length for value in values)
    if least > longest:
        raise InputError(
            f"{source!r} needs {least} tokens for {source.axis} {', '.join(map(str, values))}, but "
            f"the model's max_length is {longest}: choose other --values"
        )
    return sorted({round(least + (longest - least) * part / 3) for part in range(4)})


def measure(
    run: str, values: Sequence[float] | None, lengths: Sequence[int] | None, num_samples: int
) -> RetrievalGrid:
    """Measure a run.

    Raises:
        InputError: If the run or the grid does not fit.
    """
    data = run_data(run)
    source = data.source
    # Settings of whole numbers, such as a number of pairs, come as floats.
    kind = int if isinstance(source.axis_values[0], int) else float
    chosen = [kind(value) for value in values or source.axis_values]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model: Any = load(run, device=device).model
        grid = Grid(
            chosen, lengths or lengths_of(source, chosen, model.config.max_length), num_samples
        )
        return measure_retrieval(
            model,
            partial(batches, data, grid),
            axis=source.axis,
            values=grid.values,
            lengths=grid.lengths,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retrieval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--lengths", help="in tokens, comma-separated")
    parser.add_argument("--values", help="of the source's axis, comma-separated")
    parser.add_argument("--num-samples", type=int, default=200, metavar="N", help="per cell")
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"), metavar="DIR")
    options = parser.parse_args(arguments)
    if options.num_samples < 1:
        parser.error(f"--num-samples must be at least 1, got {options.num_samples}")
    lengths = options.lengths and [int(length) for length in options.lengths.split(",")]
    values = options.values and [float(value) for value in options.values.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    for run in options.runs:
        try:
            grid = measure(run, values, lengths, options.num_samples)
        except InputError as error:
            raise SystemExit(str(error)) from error
        # The last two parts of a run's path: recipe and name.
        name = "_".join(Path(run).resolve().parts[-2:])
        grid.write_csv(options.out / f"{name}.csv")
        grid.draw(options.out / f"{name}.png", name)
        print(f"{run}: mean accuracy {grid.accuracy.mean():.3f}, {options.out / name}.csv and .png")


if __name__ == "__main__":
    main()
