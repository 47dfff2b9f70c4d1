"""`diffmm predict`: predict files, or a recipe's test data, with a trained model."""

import argparse
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmm.checkpoint_folders import find_state
from diffmm.checks import did_you_mean
from diffmm.cli.evaluate import add_weights_options, evaluate, parse, recipe_values
from diffmm.cli.options import add_help_options, print_help, wants_help
from diffmm.cli.prediction_files import (
    TEXT_COLUMNS,
    WRITERS,
    check_output,
    class_columns,
    writing,
)
from diffmm.recipes.errors import InputError, message_of, refusing, warn
from diffmm.recipes.importing import importing
from diffmm.recipes.settings import merge
from diffmm.recipes.trust import add_trust_option
from diffmm.runs.directories import import_modules_of_run

if TYPE_CHECKING:
    from diffmm.hub.predictions import Caption, Prediction
    from diffmm.hub.trained import TrainedModel

TENSORS = ".pt"
FILE_OPTIONS = {
    "top_k": 5,
    "batch_size": 32,
    "num_workers": 0,
    "device": "auto",
    "skip_bad": False,
    "labels": None,
    "template": None,
}
"""Options that apply only to files, with their defaults."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Predict, and print or write the result."""
    parser = make_parser()
    options, overrides = parse(parser, arguments)
    if wants_help(options, overrides):
        return print_help(parser, options, overrides)
    paths = list(options.paths)
    weights = options.weights or (paths.pop(0) if paths else None)
    if weights is None:
        raise InputError("diffmm predict needs a RUN, and the files to predict")
    output = None if options.output is None else Path(options.output)
    if paths:
        return predict_files(options, overrides, weights, paths, output)
    if given := [name for name in FILE_OPTIONS if getattr(options, name) is not None]:
        raise InputError(f"--{given[0].replace('_', '-')} is for files: give them after the run")
    output = output or Path(f"predictions{TENSORS}")
    check_output(output, (TENSORS, *WRITERS))
    values = recipe_values(verb, options.config, weights, overrides)
    return evaluate(verb, values, weights, output, trust=options.trust)


def make_parser() -> argparse.ArgumentParser:
    """The options that are not settings of the recipe."""
    parser = argparse.ArgumentParser(
        prog="diffmm predict",
        usage="diffmm predict RUN [PATH ...] [--output FILE] [options]",
        add_help=False,
        allow_abbrev=False,
        description="Predict the classes or the texts of the images or sounds in the files and "
        "folders after the run, or, without any, of the run's own test data.",
        epilog="Without files, all other options are settings of the recipe, as in `diffmm fit`.",
    )
    add_help_options(parser)
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="RUN [PATH ...]",
        help="a run, a checkpoint, or model.safetensors (or its folder); then files, and folders "
        "to be searched for files",
    )
    add_weights_options(parser)
    add_trust_option(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="columns file, label, score, label_2, ..., or file and text, as .csv, .jsonl or "
        ".parquet; files are printed without it. Of test data also a dict of tensors "
        "[predictions.pt]",
    )
    parser.add_argument(
        "--labels",
        metavar="A,B,C",
        help="names of classes, for a model that compares images or sounds with texts",
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="a text with {} in place of a label; given several times, their embeddings are "
        "averaged ['a photo of a {}.']",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="number of classes per file [5]")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        default=None,
        help="report files that cannot be read, and skip them",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="number of files per forward pass [32]"
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="number of worker processes that read files [0]",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [auto]")
    return parser


def predict_files(
    options: argparse.Namespace,
    overrides: Sequence[str],
    weights: str,
    paths: Sequence[str],
    output: Path | None,
) -> int:
    """Predict files and the files in folders, batch by batch.

    Raises:
        InputError: If the output or a path is invalid, before any file is read, or if a file cannot
            be read, unless such files are skipped.
    """
    if output is not None:
        check_output(output, tuple(WRITERS))
    if overrides and not options.config:
        key = overrides[0].partition("=")[0]
        near = did_you_mean(key, [f"--{name.replace('_', '-')}" for name in FILE_OPTIONS])
        raise InputError(f"{key} is a setting of a recipe: predicting files takes none{near}")
    for path in paths:
        if not Path(path).exists():
            remote = ": only local files are read, download it first" if "://" in path else ""
            raise InputError(f"{path} does not exist{remote}")
    settings: dict[str, Any] = {
        name: default if getattr(options, name) is None else getattr(options, name)
        for name, default in FILE_OPTIONS.items()
    }
    for name, least in (("top_k", 1), ("batch_size", 1), ("num_workers", 0)):
        if settings[name] < least:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} must be at least {least}, got {settings[name]}")
    if settings["template"] is not None and settings["labels"] is None:
        raise InputError("--template is for the labels of --labels a,b,c: give them, too")
    with refusing():
        trained = loaded(options, overrides, weights, settings["device"])
        if settings["labels"] is not None:
            names = [name.strip() for name in settings["labels"].split(",")]
            given = {} if settings["template"] is None else {"templates": settings["template"]}
            trained = trained.zero_shot_classifier(names, **given)
        if options.top_k is not None and writes_texts(trained):
            raise InputError("--top-k is for classes, but this model gives one text per file")
        unreadable = Unreadable(skip=settings["skip_bad"])
        predictions = trained.stream(
            paths,
            top_k=settings["top_k"],
            batch_size=settings["batch_size"],
            num_workers=settings["num_workers"],
            on_error=unreadable,
        )
        count = written(predictions, columns_of(trained, settings["top_k"]), output, unreadable)
    if output is not None:
        print(f"{output}: {count:,} predictions")
    if unreadable.count:
        warn(f"{unreadable.count:,} files could not be read and were skipped")
    report_skipped(trained, paths)
    return 0


def report_skipped(trained: "TrainedModel", paths: Sequence[str]) -> None:
    """Warn of files in the folders that are left out because of their extension."""
    reader: Any = trained.reader
    for path in paths:
        if Path(path).is_dir() and (skipped := reader.skipped(path)):
            warn(f"{path} has {skipped}: only {', '.join(reader.extensions)} are read")


class Unreadable:
    """Handles files that cannot be read.

    Args:
        skip: Whether to report, count and skip such files, instead of raising an error.
    """

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.count = 0

    def __call__(self, item: Any, error: Exception) -> None:
        """Handle a file that cannot be read, given the error, whose message names it.

        Raises:
            InputError: If unreadable files are not skipped.
        """
        if not self.skip:
            raise InputError(f"{message_of(error)}; to skip it, add --skip-bad") from error
        self.count += 1
        warn(f"{message_of(error)}; it is skipped")


def loaded(
    options: argparse.Namespace, overrides: Sequence[str], weights: str, device: str
) -> "TrainedModel":
    """Load the model, with its purpose as stored in its file or, with `--config`, as described by
    the data."""
    with importing():
        from diffmm.hub.loading import load

    state = find_state(Path(weights), warn=warn)
    if options.trust:
        import_modules_of_run(state)
    trained = load(state, device=device)
    if not options.config:
        return trained
    from diffmm.recipes.trainer import RecipeCLI

    values = recipe_values("predict", options.config, weights, overrides)
    quiet = {"trainer": {"logger": False, "callbacks": None}, "run_dir": "runs"}
    cli = RecipeCLI(merge(values, quiet), trust=options.trust)
    data: Any = cli.datamodule
    if not hasattr(data, "describe_inputs"):
        raise InputError(f"{type(data).__name__} does not describe how it prepares its inputs")
    data.prepare_data()
    data.setup("predict")
    inputs = data.describe_inputs()
    multi_label = getattr(cli.model, "multi_label", False)
    return load(
        state,
        device=device,
        reader=inputs["reader"],
        class_names=inputs.get("class_names"),
        multi_label=multi_label,
    )


def writes_texts(trained: "TrainedModel") -> bool:
    """Whether the predictions of a model are texts and not classes."""
    from diffmm.models.captioning import CaptioningModel
    from diffmm.models.ctc import CTCModel

    return isinstance(trained.model, CaptioningModel | CTCModel)


def columns_of(trained: "TrainedModel", top_k: int) -> Sequence[str]:
    """The columns of a file of a model's predictions."""
    if writes_texts(trained):
        return TEXT_COLUMNS
    return class_columns(min(top_k, len(trained.class_names)))


def written(
    predictions: "Iterable[Prediction | Caption]",
    columns: Sequence[str],
    output: Path | None,
    unreadable: "Unreadable",
) -> int:
    """Print predictions or write them to a file, and return their number.

    Raises:
        InputError: If no file could be read.
        RunFailedError: If the output cannot be written.
    """
    count = 0
    with writing(output, columns) if output is not None else nullcontext() as writer:
        for prediction in predictions:
            count += 1
            if writer is None:
                # A file name may not be valid text.
                print(str(prediction).encode(errors="backslashreplace").decode(), flush=True)
            else:
                writer.write(prediction)
        if not count:
            raise InputError(f"none of the {unreadable.count:,} files could be read")
    return count
