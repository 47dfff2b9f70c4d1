"""LightningCLI for one recipe, whose overrides have already been merged.

An override affects every setting that refers to it, because references are resolved last (parser
mode `omegaconf+`). Checkpoints never change the settings of a recipe.
"""

import atexit
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from diffmm.checks import DataError
from diffmm.recipes.agreement import disagreements
from diffmm.recipes.errors import InputError, RunFailedError, message_of
from diffmm.recipes.imports import import_modules
from diffmm.recipes.mistakes import find_mistakes
from diffmm.recipes.numbers import wrong_numbers
from diffmm.recipes.references import resolve, unused_variables

REFUSALS = (
    ValueError,
    OSError,
    ArgumentError,
    OmegaConfBaseException,
    MisconfigurationException,
)
"""Errors of the library, the parser, Lightning and the system that report invalid input."""


NOISE = (
    # Lightning uses deprecated names of jsonargparse and of torch's pytrees.
    r"\s*(By default only one Jsonargparse|``instantiate_classes``)",
    ".*LeafSpec",
    # This is expected for a resumed run; a new run gets a new directory.
    "Checkpoint directory .* exists and is not empty",
    # `Task` raises an error in the case that this warns of.
    "You're using the WeightAveraging callback with a model that overrides",
    # Steps are counted over all epochs, so that a short epoch is logged, too.
    "The number of training batches .* is smaller than the logging interval",
)
"""Warnings of the libraries that a user cannot act on."""

NOISY_LINES = ("litlogger", "litmodels", "TPU available", "was configured so 100% of the batches")
"""Parts of lines of Lightning that say nothing about a run: advertisements, and defaults."""


class SettingsCLI(LightningCLI):
    """Lightning's settings, and the additional keys of a recipe."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--vars", type=dict, default={}, help="Variables that settings refer to: ${vars.name}."
        )
        parser.add_argument(
            "--imports",
            type=str | list[str],
            default=[],
            help="Modules to import first, which register layers of your own.",
        )
        parser.add_argument("--run_dir", type=str, default=None, help="Directory of the run.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)


class RecipeCLI(SettingsCLI):
    """The model, the data and the trainer of a recipe.

    Args:
        values: Values of the recipe (see `diffmm.recipes.settings.load`), with its `run_dir`.
        build: Whether to create the objects; otherwise, the values are only parsed.
        trust: Whether to import and call classes outside `diffmm.recipes.trust.KNOWN`; otherwise,
            they are rejected before anything is imported.

    Raises:
        InputError: If the values have mistakes; the message lists all of them.
    """

    def __init__(self, values: dict[str, Any], *, build: bool = True, trust: bool = True) -> None:
        self.values = values
        self.build = build
        silence_noise()
        if not trust and (found := find_mistakes(values, trust=False).mistakes):
            raise InputError(*found)
        mistakes = import_modules(resolve(values)[0], trust=trust)
        mistakes += unused_variables(values) + wrong_numbers(values, resolve(values)[0])[0]
        # Lightning would continue without data.
        mistakes += [f"{part} is missing" for part in ("model", "data") if not values.get(part)]
        try:
            if not mistakes:
                super().__init__(**parser_settings(), args=[])
                if build:
                    names = ("precision", "accumulate_grad_batches")
                    trainer = {name: getattr(self.trainer, name) for name in names}
                    mistakes = disagreements(self.model, self.datamodule, trainer)
        except REFUSALS as error:
            raise InputError(*(find_mistakes(values).mistakes or [message_of(error)])) from error
        except (AttributeError, KeyError, TypeError) as error:
            # Raised by a class that does not check its arguments, or by a bug in a class.
            if found := find_mistakes(values).mistakes:
                raise InputError(*found) from error
            raise
        if mistakes:
            raise InputError(*(find_mistakes(values).mistakes or mistakes))

    def instantiate_classes(self) -> None:
        if self.build:
            super().instantiate_classes()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        text = yaml.safe_dump(self.values, sort_keys=False)
        # Classes have their defaults themselves: for the parser to add and check those takes longer
        # than all else that it does.
        self.config = parser.parse_string(text, defaults=False)
        if not self.build:
            self.config["seed_everything"] = False  # Lightning then seeds nothing

    def instantiate_trainer(self, **changes: Any) -> Trainer:
        """Keep a recipe's `limit_val_batches: 1` (one batch) an integer, add `callbacks`, which
        Lightning warns about if they are missing, and leave out its summary of the model unless the
        recipe asks for one (see `ProgressLines`).

        The parser tries the types of `Optional[Union[int, float]]` in order and may convert the
        value to `1.0` (all batches), because Python caches unions and returns the types in the
        order of the first use.
        """
        values = resolve(self.values)[0].get("trainer") or {}
        whole = {
            key: value
            for key, value in values.items()
            if type(value) is int and type(self.config_init.trainer.get(key)) is float
        }
        more: dict[str, Any] = {} if "callbacks" in values else {"callbacks": None}
        if "ModelSummary" not in str(values.get("callbacks")):  # of several forms
            more["enable_model_summary"] = values.get("enable_model_summary", False)
        return super().instantiate_trainer(**{**more, **whole, **changes})


def print_settings(arguments: Sequence[str], prog: str) -> None:
    """Print all settings that a recipe can have (`--help`), or those of a class
    (`--model.help diffmm.training.CausalLM`), for the command `prog`."""
    settings = parser_settings()
    settings["parser_kwargs"]["prog"] = prog
    try:
        with suppress(SystemExit):
            SettingsCLI(**settings, args=list(arguments))
    except ArgumentError as error:
        raise InputError(message_of(error)) from error


class _TrainingWatcher(Callback):
    """Remembers whether training on a batch has begun and ended."""

    has_begun = False
    has_made_a_batch = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.has_begun = True

    def on_train_batch_end(self, *args: Any) -> None:
        self.has_made_a_batch = True


def parser_settings() -> dict[str, Any]:
    """Arguments of `LightningCLI`."""
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return {
        "model_class": LightningModule,
        "datamodule_class": LightningDataModule,
        "subclass_mode_model": True,
        "subclass_mode_data": True,
        "run": False,
        "parser_kwargs": {"parser_mode": "omegaconf+", "exit_on_error": False},
        # A run saves its recipe unresolved (see `diffmm.runs.directories`).
        "save_config_callback": None,
        "load_from_checkpoint_support": False,
        "auto_configure_optimizers": False,
    }


def silence_noise() -> None:
    """Suppress `NOISE` and `NOISY_LINES`."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in NOISY_LINES)


def leave_processes(code: int) -> None:
    """Destroy the process group and end this process, if there is one.

    A normal exit would also destroy C++ objects of the process group, whose threads sometimes abort
    a process that has finished.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def refusing_before_training(cli: RecipeCLI, checkpoint: Path | None = None) -> Iterator[None]:
    """Turn `REFUSALS` before the first batch into `InputError`; later errors are not changed.

    If a run was resumed from `checkpoint`, an error before the end of its first batch names it.
    """
    training = _TrainingWatcher()
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, training)
    try:
        yield
    except REFUSALS as error:
        if training.has_begun and isinstance(error, DataError | OSError):
            raise RunFailedError(message_of(error)) from error
        if training.has_begun:
            raise
        raise InputError(message_of(error)) from error
    except Exception as error:
        if checkpoint is not None and not training.has_made_a_batch:
            error.add_note(
                f"raised when the run was resumed from {checkpoint}: if that checkpoint is "
                f"damaged, remove its folder, and the previous one is used"
            )
        raise
