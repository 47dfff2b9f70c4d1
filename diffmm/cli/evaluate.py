"""`diffmm validate`, `test` and `predict`: weights against a recipe's data. No run is written."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmm.cli.options import print_help, wants_help
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.errors import InputError, refusing
from diffmm.recipes.settings import load, merge
from diffmm.recipes.trust import add_trust_option

QUIET = {"trainer": {"logger": False, "enable_checkpointing": False}}
"""Evaluation writes nothing beside its result."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Measure or predict, and print or write the result."""
    parser = make_parser(verb)
    options, overrides = parser.parse_known_args(arguments)
    if wants_help(options, overrides):
        return print_help(parser, options, overrides)
    for name in ("config", "weights"):
        if getattr(options, name) is None:
            raise InputError(f"diffmm {verb} needs --{name} {name.upper()}")
    output = Path(options.output) if verb == "predict" else None
    if output is not None and output.exists():
        raise InputError(f"{output} exists already: choose another --output")
    if output is not None and not output.parent.is_dir():
        raise InputError(f"there is no folder {output.parent} to write {output.name} to")
    values = load([find_recipe(name) for name in options.config], overrides)
    return evaluate(verb, values, options.weights, output, trust=options.trust)


def make_parser(verb: str) -> argparse.ArgumentParser:
    """The options that are not settings of the recipe."""
    what = {
        "validate": "Print the metrics of weights on a recipe's validation data.",
        "test": "Print the metrics of weights on a recipe's test data.",
        "predict": "Write what a model predicts for a recipe's data: a dict of tensors, for "
        "torch.load.",
    }
    parser = argparse.ArgumentParser(
        prog=f"diffmm {verb}",
        add_help=False,
        allow_abbrev=False,
        description=what[verb],
        epilog="Everything else is a setting of the recipe, as in `diffmm fit`:",
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this, and all settings")
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="RECIPE",
        help="a recipe's file or name, or a run's config.yaml",
    )
    parser.add_argument(
        "--weights",
        "--ckpt_path",
        metavar="CKPT",
        help="a run, a checkpoint, or model.safetensors (or its folder)",
    )
    add_trust_option(parser)
    if verb == "predict":
        parser.add_argument(
            "--output", metavar="FILE", default="predictions.pt", help="predictions.pt by default"
        )
    return parser


def evaluate(
    verb: str, values: dict[str, Any], weights: str, output: Path | None, *, trust: bool
) -> int:
    """Run one of Lightning's evaluation loops over a recipe's data.

    Raises:
        InputError: for mistakes in the recipe, and for weights of another architecture.
    """
    from diffmm.cli.predictions import gathered, joined, save
    from diffmm.models.weights import load_weights
    from diffmm.recipes.trainer import RecipeCLI, leave_processes, refusing_before_training

    quiet = merge(values, {**QUIET, "run_dir": "runs"})
    callbacks = quiet["trainer"].get("callbacks")
    if isinstance(callbacks, list):
        quiet["trainer"]["callbacks"] = [c for c in callbacks if not saves(c)]
    cli = RecipeCLI(quiet, trust=trust)
    task: Any = cli.model
    if not hasattr(task, "model"):
        raise InputError(f"{type(task).__name__} has no model to load weights into")
    with refusing():
        load_weights(task.model, weights)
    # Lightning's own lets an evaluation go on after SIGTERM, or end it with 0.
    cli.trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    with refusing_before_training(cli):
        results = getattr(cli.trainer, verb)(task, datamodule=cli.datamodule)
    if output is not None and (batches := gathered(results)) is not None:
        save(joined(batches), output)
        print(output)
    leave_processes(0)
    return 0


def saves(callback: Any) -> bool:
    """Whether the settings of a callback are those of one that saves checkpoints."""
    class_path = callback.get("class_path") if isinstance(callback, dict) else callback
    return str(class_path).endswith(("Checkpoint", "Checkpoints"))
