"""`diffmm fit` and `diffmm finetune`: train a recipe in its own run directory."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmm.checkpoint_folders import find_state
from diffmm.cli.options import (
    add_data_option,
    add_help_options,
    print_help,
    printed,
    recipe_values,
    wants_help,
)
from diffmm.recipes.catalog import find_recipe, header
from diffmm.recipes.errors import InputError, RunFailedError, refusing, warn
from diffmm.recipes.importing import importing
from diffmm.recipes.lengths import (
    Longer,
    cut_schedule,
    epoch_of,
    lengthened,
    outlook,
    step_of,
)
from diffmm.recipes.settings import load, override
from diffmm.recipes.trust import add_trust_option
from diffmm.runs.claims import claimed, is_first_process
from diffmm.runs.directories import (
    config_text,
    find_run,
    named_run,
    new_run,
    run_name,
    same_run,
    saved_config,
)

if TYPE_CHECKING:
    from diffmm.recipes.trainer import RecipeCLI

AUTO = "auto"

EPILOG = (
    "All other options are settings of the recipe: --vars.attention softmax, --trainer.max_steps "
    "100, --model.optimizer.weight_decay 0. Those of a recipe: --config RECIPE --help; more: "
    "--help-all, and --model.help CLASS for those of a class."
)


def run(verb: str, arguments: Sequence[str]) -> int:
    """Train, in a new run or (`--resume`) in one that was interrupted."""
    parser = make_parser(verb)
    options, overrides = parser.parse_known_args(arguments)
    if wants_help(options, overrides):
        return print_help(parser, options, overrides)
    refuse_ckpt_path(verb, overrides)
    recipe = (options.config or [None])[-1]
    if verb == "fit" and options.allow_changed_data and options.resume is None:
        raise InputError("--allow-changed-data is for resumed runs: it needs --resume")
    if verb == "fit" and options.resume not in (None, AUTO):
        if any(
            given is not None for given in (recipe, options.name, options.run_dir, options.data)
        ):
            raise InputError(
                "--resume resumes a run unchanged: it takes no recipe, data or name. To start a "
                "new run from its weights, use `diffmm finetune`"
            )
        allowed = {
            "trust": options.trust,
            "allow_changed_data": options.allow_changed_data,
        }
        return leave(resume(Path(options.resume), overrides, **allowed))
    if recipe is None:
        raise InputError(f"diffmm {verb} needs --config RECIPE (diffmm recipes lists them)")
    paths = [find_recipe(name) for name in options.config]
    if options.name is not None:
        named_run(recipe, options.name)  # so that a bad name is refused before anything is read
    values = recipe_values(
        paths,
        overrides,
        options.data,
        inputs_may_change=verb == "fit",
        aside=options.print_config is not None,
    )
    if verb == "finetune":
        if options.weights is None:
            raise InputError("diffmm finetune needs --weights CKPT to start from")
        with refusing():
            # For a run, pin the checkpoint that is the newest now.
            weights = find_state(Path(options.weights), warn=warn)
            from diffmm.recipes.architecture import with_architecture

            changed = with_architecture(values, weights, overrides)
        override(values, "model.finetune.weights", str(weights))
        if changed is not None and is_first_process():
            print(changed, file=sys.stderr if options.print_config else sys.stdout, flush=True)
    comment = header(paths[-1].read_text(encoding="utf-8"))
    if options.print_config is not None:
        print(config_text(comment, printed(values, options.print_config)), end="")
        return 0
    if verb == "fit" and options.resume == AUTO:
        run_dir = same_run(recipe, values, options.name, options.run_dir)
        if run_dir is not None:
            # The values of this run equal those of the given recipe, which is trusted.
            changed = options.allow_changed_data
            return leave(resume(run_dir, trust=True, allow_changed_data=changed))
    run_dir = new_run(recipe, options.name, options.run_dir)
    with claimed(run_dir):
        code = train(run_dir, values, comment=comment, recipe=run_name(recipe))
    return leave(code)


def leave(code: int) -> int:
    """Leave the run's process group, if there is one."""
    from diffmm.recipes.trainer import leave_processes

    leave_processes(code)
    return code


def make_parser(verb: str) -> argparse.ArgumentParser:
    """Create the parser of all options that are not settings of the recipe."""
    parser = argparse.ArgumentParser(
        prog=f"diffmm {verb}",
        add_help=False,
        allow_abbrev=False,
        description="Train a recipe. A run is kept in runs/RECIPE/TIME, with its config, "
        "checkpoints and logs.",
        epilog=EPILOG,
    )
    add_help_options(parser)
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="RECIPE",
        help="file or name of a recipe; later ones override earlier ones",
    )
    add_data_option(parser)
    if verb == "fit":
        parser.add_argument(
            "--resume",
            metavar="RUN",
            help="resume the run in this directory from its newest complete checkpoint (for "
            "longer, add --trainer.max_steps N or --trainer.max_epochs N); 'auto': resume the run "
            "with these settings (the latest, or that of --name or --run_dir), or start it",
        )
    else:
        parser.add_argument(
            "--weights",
            metavar="CKPT",
            help="weights to start from: a run, a checkpoint, or model.safetensors (or its folder)",
        )
    if verb == "fit":
        parser.add_argument(
            "--allow-changed-data",
            action="store_true",
            help="with --resume: resume although the data have changed since the run began",
        )
        add_trust_option(parser)
    parser.add_argument(
        "--print_config",
        nargs="?",
        const="written",
        choices=("written", "resolved"),
        help="print the complete recipe, with overrides and data, and do not train: as a run "
        "saves it, or 'resolved', with references replaced by their values",
    )
    parser.add_argument("--name", help="name of the run, instead of the time")
    parser.add_argument(
        "--run_dir", metavar="DIR", help="directory to use instead of runs/RECIPE/NAME"
    )
    return parser


def refuse_ckpt_path(verb: str, overrides: Sequence[str]) -> None:
    """Reject Lightning's own option, which would start a run that is neither new nor resumed.

    Raises:
        InputError: If the option is given; the message names the alternatives.
    """
    if any(argument.partition("=")[0] == "--ckpt_path" for argument in overrides):
        raise InputError(
            f"diffmm {verb} takes no --ckpt_path: resume a run with `diffmm fit --resume RUN`, "
            f"or start a new one from weights with `diffmm finetune --weights CKPT`"
        )


def resume(
    run_dir: Path, overrides: Sequence[str] = (), *, trust: bool, allow_changed_data: bool
) -> int:
    """Resume a run from its newest complete checkpoint, with its own config and possibly another
    length. Without `trust`, classes outside `diffmm.recipes.trust.KNOWN` are rejected, and without
    `allow_changed_data`, changed data are."""
    saved_config(run_dir)
    with claimed(run_dir):
        config, checkpoint = find_run(str(run_dir))
        if checkpoint is None:
            warn(f"{run_dir} has no checkpoint yet: it starts from the beginning")
        longer = lengthened(config, overrides)
        if longer is None:
            values, comment = load([config]), ""
        else:
            values, comment = longer.values, header(config.read_text(encoding="utf-8"))
        return train(
            run_dir,
            values,
            comment=comment,
            checkpoint=checkpoint,
            is_new=False,
            longer=longer,
            trust=trust,
            allow_changed_data=allow_changed_data,
        )


def train(
    run_dir: Path,
    values: dict[str, Any],
    *,
    comment: str = "",
    checkpoint: Path | None = None,
    is_new: bool = True,
    longer: Longer | None = None,
    trust: bool = True,
    allow_changed_data: bool = False,
    recipe: str | None = None,
) -> int:
    """Fit a recipe in its run directory.

    Args:
        run_dir: Directory of the run, which may be new.
        values: Values of the recipe, unresolved.
        comment: Comment at the top of the saved config.
        checkpoint: Checkpoint to resume from; None starts from the beginning.
        is_new: Whether the config is still to be saved.
        longer: The new length of a resumed run, if it was given one.
        trust: Also run code that the values name outside `diffmm.recipes.trust.KNOWN`, as for
            a recipe of the user's own.
        allow_changed_data: Resume even if the data differ from those of the checkpoint.
        recipe: Name of the recipe, stored with the weights; None keeps that of a resumed run.

    Returns:
        The exit code: 0, or 130 or 143 if a signal stopped the run.

    Raises:
        InputError: If the run is rejected before the first step; nothing is left behind.
        RunFailedError: If there were too many non-finite steps or bad samples, non-finite weights,
            failed saves, or not enough memory.
    """
    with importing():
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        from diffmm.recipes.out_of_memory import advice, is_out_of_memory
        from diffmm.recipes.trainer import RecipeCLI, refusing_before_training
        from diffmm.runs.saving import ConfigSaver
        from diffmm.training.last_validation import LastValidation
        from diffmm.training.progress import show_progress
        from diffmm.training.resilience.checkpoints import NonFiniteWeightsError, SaveFailedError
        from diffmm.training.resilience.non_finite import TooManyNonFiniteStepsError

    cli = RecipeCLI({**values, "run_dir": str(run_dir)}, trust=trust)
    task: Any = cli.model
    task.recipe = recipe
    if checkpoint is not None:
        forget_first_weights(cli)
    if allow_changed_data:
        cli.datamodule.allow_changed_data = True
    trainer: Any = cli.trainer
    show_progress(trainer, is_terminal=sys.stdout.isatty())
    if is_new or longer is not None:
        trainer.callbacks.insert(0, ConfigSaver(run_dir, comment, values))
    trainer.callbacks.insert(0, LastValidation())
    first_step = step_of(checkpoint)
    epoch = epoch_of(checkpoint)
    line = longer and outlook(cli.model, trainer, longer.schedule, first_step, epoch=epoch)
    if is_new and trainer.is_global_zero and (doubt := cut_schedule(task, trainer.max_steps)):
        warn(doubt)
    code, message = 0, ""
    try:
        with (
            command_for_processes(run_dir, is_new=is_new),
            refusing_before_training(cli, checkpoint),
        ):
            check_weights(cli, checkpoint)
            if line is not None and trainer.is_global_zero:
                print(f"{run_dir} {line}")
            cli.trainer.fit(
                cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True
            )
        message = ending(trainer, run_dir, is_resumed=checkpoint is not None, since=first_step)
    except SIGTERMException as stop:
        code, message = int(stop.code or 0), f"stopped: resume with `diffmm fit --resume {run_dir}`"
    except (TooManyNonFiniteStepsError, NonFiniteWeightsError, SaveFailedError) as error:
        raise RunFailedError(str(error)) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailedError(advice(error, values, run_dir, cli.trainer.global_step)) from error
    if cli.trainer.is_global_zero:
        print(message)
    return code


def ending(trainer: Any, run_dir: Path, *, is_resumed: bool, since: int) -> str:
    """Return the last message of a run that was not stopped by a signal."""
    from diffmm.training.resilience.checkpoints.exact import is_out_of_time
    from diffmm.training.resilience.checkpoints.progress import is_complete

    step = trainer.global_step
    if is_out_of_time(trainer) and not is_complete(trainer):
        return f"max_time is up after step {step}: resume with `diffmm fit --resume {run_dir}`"
    if not is_resumed or step > since:
        return f"run: {run_dir}"
    if trainer.should_stop:
        return f"run: {run_dir}, which a callback ended after step {step}: it cannot be resumed"
    return (
        f"run: {run_dir}, which is finished after step {step}: to train for longer, add "
        f"--trainer.max_steps N (or --trainer.max_epochs N)"
    )


def forget_first_weights(cli: "RecipeCLI") -> None:
    """Drop the weights that a resumed run was started from, because they may no longer exist."""
    task: Any = cli.model
    if hasattr(task, "forget_first_weights"):
        task.forget_first_weights()


def check_weights(cli: "RecipeCLI", checkpoint: Path | None) -> None:
    """Check that the checkpoint fits the model, before anything is written.

    Raises:
        InputError: If it does not; the message names the keys and shapes that differ.
    """
    from diffmm.models.weights import load_weights

    task: Any = cli.model
    with refusing():
        if checkpoint is not None and hasattr(task, "model"):
            load_weights(task.model, checkpoint)
        elif checkpoint is None and hasattr(task, "load_first_weights"):
            task.load_first_weights()


@contextmanager
def command_for_processes(run_dir: Path, *, is_new: bool) -> Iterator[None]:
    """Pass the run directory to the processes that Lightning starts with this command line, so that
    they do not create their own."""
    before = list(sys.argv)
    if is_new and "--run_dir" not in before:
        sys.argv += ["--run_dir", str(run_dir)]
    try:
        yield
    finally:
        sys.argv = before
