"""The command line: `diffmm VERB ...`.

Only the verb that is called is imported, so that `--help` and the small verbs respond quickly.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from diffmm import __version__
from diffmm.checks import did_you_mean
from diffmm.cli.endings import (
    TerminatedError,
    flush_output,
    is_of_closed_output,
    terminable,
)
from diffmm.recipes.errors import InputError, RunFailedError, message_of


class Verb(NamedTuple):
    """A command of `diffmm`."""

    module: str
    """Module in `diffmm.cli` that defines `run(verb, arguments)`."""
    help: str


VERBS = {
    "fit": Verb("fit", "train a recipe, or resume a run (--resume)"),
    "finetune": Verb("fit", "train a recipe from the weights of another run"),
    "validate": Verb("evaluate", "evaluate a run on its validation data, per class"),
    "test": Verb("evaluate", "evaluate a run on its test data, per class"),
    "predict": Verb("predict", "predict the classes of files and folders, or of a run's test data"),
    "generate": Verb("generate", "continue a prompt with a trained text model"),
    "convert": Verb("convert", "convert weights from and to other implementations"),
    "export": Verb("export", "write a model for other programs: ONNX, torch.export, quantized"),
    "replay": Verb(
        "replay", "repeat the step at which a run stopped because of non-finite numbers"
    ),
    "compare": Verb("compare", "compare runs, as a table or a page"),
    "analyze": Verb("analyze", "measure a run's attention, outliers, quantization and lambda"),
    "probe": Verb("probe", "measure the frozen features of an image or audio encoder"),
    "upcycle": Verb("upcycle", "turn a trained softmax model into a differential one"),
    "sweep": Verb("sweep", "train a recipe with all combinations of some settings"),
    "check": Verb("check", "report the size and memory of a recipe and every mistake in it"),
    "recipes": Verb("recipes", "list, show and copy the shipped recipes"),
    "demo": Verb("demo", "train three attentions on text, images and sound, and write a report"),
    "doctor": Verb("doctor", "check that the installed packages and the GPU work together"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for a failed run or `doctor`, 2 for bad input
    and for a file that cannot be read or written, 130 after Ctrl-C, 143 if another signal stopped
    it, 141 if its output is no longer read.

    Args:
        arguments: Arguments after `diffmm`; those of the process by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with terminable():
            code = _run(arguments)
            flush_output()
            return code
    except (InputError, RunFailedError, OSError, SystemExit) as error:
        return 141 if is_of_closed_output(error) else _reported(error)
    except KeyboardInterrupt:
        return 130


def _reported(error: InputError | RunFailedError | OSError | SystemExit) -> int:
    """Print an error, and return its exit code.

    Raises:
        SystemExit: If the command ended by it, such as `--help` of argparse.
    """
    if isinstance(error, SystemExit):
        if isinstance(error, TerminatedError):
            return 143
        # Lightning raises SystemExit after Ctrl-C.
        if isinstance(error.__context__, KeyboardInterrupt):
            return 130
        raise error
    if isinstance(error, RunFailedError):
        print(f"diffmm: error: {error}", file=sys.stderr)
        return 1
    lines = error.lines if isinstance(error, InputError) else [message_of(error)]
    for line in lines:
        print(f"diffmm: error: {line}", file=sys.stderr)
    return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"diffmm {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        raise InputError(f"there is no command {verb!r}{did_you_mean(verb, VERBS)} (diffmm --help)")
    return importlib.import_module(f"diffmm.cli.{VERBS[verb].module}").run(verb, rest)


def usage() -> str:
    """Return the text of `diffmm --help`."""
    width = max(map(len, VERBS))
    listed = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return (
        "usage: diffmm COMMAND ...\n\n"
        "Differential attention for text, images and audio.\n\n"
        f"{listed}\n\n"
        "Start with:      diffmm fit --config text/stdlib_tiny\n"
        "Compare with:    diffmm fit --config text/stdlib_tiny --vars.attention softmax\n"
        "Details:         diffmm COMMAND --help"
    )
