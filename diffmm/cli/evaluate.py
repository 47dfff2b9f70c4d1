"""`diffmm validate` and `test`: evaluate weights on a recipe's data, without writing a run."""

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmm.checkpoint_folders import why_no_weights, write_text
from diffmm.cli.evaluate_weights import evaluate_weights
from diffmm.cli.options import add_help_options, print_help, wants_help
from diffmm.cli.prediction_files import check_output
from diffmm.cli.zero_shot import is_zero_shot, validate_zero_shot
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.errors import InputError, refusing, warn
from diffmm.recipes.importing import importing
from diffmm.recipes.settings import load, merge
from diffmm.recipes.trust import add_trust_option
from diffmm.runs.directories import CONFIG_NAME, config_around, near_run

QUIET = {"trainer": {"logger": False, "enable_checkpointing": False}}
"""Settings with which an evaluation writes nothing except its result."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Evaluate, and print or write the result."""
    parser = make_parser(verb)
    options, overrides = parse(parser, arguments)
    if wants_help(options, overrides):
        return print_help(parser, options, overrides)
    weights = options.weights or options.run
    if weights is None:
        raise InputError(f"diffmm {verb} needs a RUN, or --config RECIPE and --weights WEIGHTS")
    if options.weights is not None and options.run is not None:
        raise InputError(f"{options.run} and --weights {options.weights}: give one of them")
    output = None if options.output is None else Path(options.output)
    if output is not None:
        check_output(output, (".json", ".csv"))
    split = "test" if verb == "test" else "val"
    reads_texts = any(each.startswith("--data.source.") for each in overrides)
    if options.data is not None and not reads_texts and is_zero_shot(weights, options.data, split):
        if overrides:
            raise InputError(
                f"{overrides[0]} is a setting of a recipe: classifying {options.data} by the names "
                f"of its folders takes none"
            )
        return validate_zero_shot(weights, options.data, split, options.template, output)
    if options.template is not None:
        raise InputError(
            "--template is for a model that compares images or sounds with texts, and --data with "
            "one folder per class"
        )
    if options.data is not None and not options.config and config_around(Path(weights)) is None:
        if overrides:
            raise InputError(
                f"{overrides[0]} is a setting of a recipe, but {weights} is in no run: give its "
                f"recipe (--config RECIPE)"
            )
        return evaluate_weights(
            verb, weights, options.data, output, sorted_classes=options.sorted_classes
        )
    if options.sorted_classes:
        raise InputError(
            "--sorted-classes is for a classifier that is in no run, and needs --data FOLDER"
        )
    values = recipe_values(verb, options.config, weights, overrides)
    return evaluate(verb, values, weights, output, trust=options.trust, other_data=options.data)


def make_parser(verb: str) -> argparse.ArgumentParser:
    """Create the parser of all options that are not settings of the recipe."""
    data = "validation" if verb == "validate" else "test"
    parser = argparse.ArgumentParser(
        prog=f"diffmm {verb}",
        add_help=False,
        allow_abbrev=False,
        description=f"Print the metrics of a run on its {data} data, and for a classifier those of "
        "each class and a confusion matrix.",
        epilog="All other options are settings of the recipe, as in `diffmm fit`.",
    )
    add_help_options(parser)
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="a run, a checkpoint, or model.safetensors (or its folder)",
    )
    add_weights_options(parser)
    add_trust_option(parser)
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="evaluate on this instead of the run's own data: a folder with one folder per class, "
        "or a CSV file of files and labels; labels are matched with the run's classes by name. A "
        "model of images or sounds with texts classifies by the names of the folders",
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="for such a model: a text with {} in place of a class, as in `diffmm predict`",
    )
    parser.add_argument(
        "--sorted-classes",
        action="store_true",
        help="for weights in no run: the folders of --data, sorted by name, are the model's "
        "classes in order (as ImageNet's are), whatever their names",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="also write the results here: all of them as .json, or the classes as .csv",
    )
    return parser


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--weights`."""
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="RECIPE",
        help="file or name of a recipe, instead of the run's own config.yaml",
    )
    parser.add_argument("--weights", "--ckpt_path", metavar="CKPT", help="the same as RUN")


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The options of a verb that has positional arguments, and the settings of a recipe among them
    (`--key value`, `--key=value`)."""
    own, overrides = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, _ = argument.partition("=")
        if not key.startswith("--") or key in parser._option_string_actions:
            own.append(argument)
            continue
        overrides.append(argument)
        if not equals and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return parser.parse_args(own), overrides


def recipe_values(
    verb: str, config: Sequence[str] | None, weights: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the values of the given recipe or, without one, of the run's recipe.

    Raises:
        InputError: If no recipe is given and the weights are not in a run.
    """
    if config:
        return load([find_recipe(name) for name in config], overrides)
    path = Path(weights)
    if (saved := config_around(path)) is not None:
        return load([saved], overrides)
    if not path.exists():
        raise InputError(f"there is no file of weights at {weights}{near_run(path)}")
    if (why := why_no_weights(path)) is not None:
        raise InputError(why)
    raise InputError(
        f"{weights} is not in a run, because there is no {CONFIG_NAME}: diffmm {verb} needs its "
        f"recipe (--config RECIPE), or labeled data if it is a classifier (--data FOLDER)"
    )


def evaluate(
    verb: str,
    values: dict[str, Any],
    weights: str,
    output: Path | None,
    *,
    trust: bool,
    other_data: str | None = None,
) -> int:
    """Run one of Lightning's evaluation loops over a recipe's data, or over other labeled data.

    Raises:
        InputError: If the recipe has mistakes, or the weights have another architecture.
    """
    with importing():
        from diffmm.cli.predictions import gathered, written_predictions
        from diffmm.models.weights import load_weights
        from diffmm.recipes.trainer import RecipeCLI, leave_processes, refusing_before_training
        from diffmm.training.lightning_internals import leave_signals_alone

    quiet = merge(values, {**QUIET, "run_dir": "runs"})
    callbacks = quiet["trainer"].get("callbacks")
    if isinstance(callbacks, list):
        quiet["trainer"]["callbacks"] = [c for c in callbacks if not saves(c)]
    cli = RecipeCLI(quiet, trust=trust)
    task: Any = cli.model
    if not hasattr(task, "model"):
        raise InputError(f"{type(task).__name__} has no model to load weights into")
    if verb == "predict":
        check_predictable(task, cli.datamodule, output)
    with refusing():
        load_weights(task.model, weights)
    if other_data is not None:
        summary = use_other_data(cli.datamodule, other_data, weights, verb)
        if cli.trainer.is_global_zero:
            print(f"data: {summary}", flush=True)
    if verb != "predict" and hasattr(task, "measure_classes"):
        task.measure_classes()
    # Lightning's own handlers let an evaluation continue after SIGTERM, or end it with 0.
    leave_signals_alone(cli.trainer)
    with refusing_before_training(cli):
        results = getattr(cli.trainer, verb)(task, datamodule=cli.datamodule)
    if verb != "predict":
        if cli.trainer.is_global_zero:
            report(results, task, output)
            if not results:
                warn(f"no {'test' if verb == 'test' else 'validation'} split: nothing is measured")
            elif verb == "test" and other_data is None:
                warn_without_test_split(cli.datamodule)
    elif output is not None and (batches := gathered(results)) is not None:
        written_predictions(batches, cli.datamodule, task, output)
    leave_processes(0)
    return 0


def warn_without_test_split(data: Any) -> None:
    """Warn if the test samples of a run's datamodule are its validation samples."""
    if not getattr(data, "has_test_split", True):
        warn(
            "no test split: the validation samples are used, among which the best checkpoint was "
            "chosen"
        )


def use_other_data(data: Any, path: str, weights: str, verb: str) -> str:
    """Let the datamodule of a run evaluate on the labeled data or pairs at `path`.

    Returns:
        A one-line summary.

    Raises:
        InputError: If the data class does not support it, the weights do not say what the classes
            of their model are, or the data at `path` do not fit.
    """
    from diffmm.models.weights import load_job

    split = "val" if verb == "validate" else "test"
    if hasattr(data, "evaluate_on_pairs"):
        with refusing():
            return str(data.evaluate_on_pairs(path, split=split))
    if not hasattr(data, "evaluate_on"):
        raise InputError(
            f"--data {path}: {type(data).__name__} cannot evaluate other data by a path; give its "
            f"settings (--data.source ...)"
        )
    with refusing():
        job = load_job(weights)
        if job is None or job.class_names is None:
            raise InputError(
                f"--data {path}: {weights} does not name the classes of its model, with which the "
                f"labels of other data are matched"
            )
        return str(data.evaluate_on(path, job.class_names, split=split))


def check_predictable(task: Any, data: Any, output: Path | None) -> None:
    """Check that `diffmm predict` can write its result, before anything is read.

    Raises:
        InputError: If there are no data to predict, or rows are requested for a task that does not
            predict classes.
    """
    from lightning.pytorch import LightningDataModule

    if type(data).predict_dataloader is LightningDataModule.predict_dataloader:
        raise InputError(f"{type(data).__name__} has no data to predict")
    has_rows = hasattr(task, "num_classes") or hasattr(task, "texts")
    if output is not None and output.suffix.lower() != ".pt" and not has_rows:
        raise InputError(
            f"{type(task).__name__} predicts no classes, so there are no rows of them: --output "
            f"must end in .pt"
        )


def report(results: Any, task: Any, output: Path | None) -> None:
    """Print the metrics of each class, and write them with all other metrics."""
    from diffmm.analysis.class_report import ClassReport

    names = task.job.class_names if getattr(task, "job", None) is not None else None
    details = getattr(task, "details", {})
    classes = None
    if (matrix := details.get("confusion_matrix")) is not None:
        classes = ClassReport.of_confusion(matrix, names or list(map(str, range(len(matrix)))))
    elif (table := details.get("average_precision")) is not None:
        numbers = list(map(str, range(table.shape[1])))
        classes = ClassReport.of_average_precision(table, names or numbers)
    if classes is not None:
        print(f"\n{classes.text()}")
    if output is None:
        return
    metrics = {name: value for result in results for name, value in result.items()}
    if output.suffix.lower() == ".json":
        found = {"metrics": metrics, **(classes.data() if classes is not None else {})}
        text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    else:
        table = classes.table() if classes is not None else [["metric", "value"], *metrics.items()]
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(table)
        text = lines.getvalue()
    with refusing():
        write_text(output, text)
    print(output)


def saves(callback: Any) -> bool:
    """Whether a callback, given by its settings, saves checkpoints."""
    class_path = callback.get("class_path") if isinstance(callback, dict) else callback
    return str(class_path).endswith(("Checkpoint", "Checkpoints"))
