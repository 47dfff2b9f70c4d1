"""The command line: `diffmm VERB ...`.

Only the verb that is called is imported, so that help and the small verbs answer at once.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from diffmm import __version__
from diffmm.checks import did_you_mean
from diffmm.cli.errors import BadInput, RunFailed


class Verb(NamedTuple):
    module: str
    """Where its `run(verb, arguments)` is."""
    help: str


VERBS = {
    "fit": Verb("fit", "train a recipe, or go on with a run (--resume)"),
    "finetune": Verb("fit", "train a recipe from the weights of another run"),
    "validate": Verb("evaluate", "measure weights on a recipe's validation data"),
    "test": Verb("evaluate", "measure weights on a recipe's test data"),
    "predict": Verb("evaluate", "write a model's predictions for a recipe's data"),
    "generate": Verb("generate", "continue a prompt with a trained text model"),
    "replay": Verb("replay", "make the step again that a run stopped at for its bad numbers"),
    "check": Verb("check", "size and memory of a recipe, and every mistake in it"),
    "recipes": Verb("recipes", "list, show and copy the recipes that come along"),
    "demo": Verb("demo", "train the three attentions on text, images and sound; write a report"),
    "doctor": Verb("doctor", "whether the installed packages and the GPU work together"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for a failed run or `doctor`, 2 for bad input,
    130 after Ctrl-C, 143 if another signal stopped a run.

    Args:
        arguments: what follows `diffmm`; the process's own by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"diffmm {__version__}")
        return 0
    verb, *rest = arguments
    try:
        if verb not in VERBS:
            raise BadInput(
                f"there is no command {verb!r}{did_you_mean(verb, VERBS)} (diffmm --help)"
            )
        return importlib.import_module(f"diffmm.cli.{VERBS[verb].module}").run(verb, rest)
    except BadInput as error:
        for line in error.lines:
            print(f"diffmm: error: {line}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"diffmm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def usage() -> str:
    """What `diffmm --help` prints."""
    width = max(map(len, VERBS))
    listed = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return (
        "usage: diffmm COMMAND ...\n\n"
        "Differential attention for text, images and sound.\n\n"
        f"{listed}\n\n"
        "Start with:      diffmm fit --config text/stdlib_tiny\n"
        "Compare with:    diffmm fit --config text/stdlib_tiny --vars.attention softmax\n"
        "More on each:    diffmm COMMAND --help"
    )
