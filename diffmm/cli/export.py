"""`diffmm export`: a trained model as a file for other programs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffmm.checkpoint_folders import find_state
from diffmm.recipes.errors import refusing, warn
from diffmm.recipes.trust import add_trust_option
from diffmm.runs.directories import import_modules_of_run


def run(verb: str, arguments: Sequence[str]) -> int:
    """Export a model."""
    options = make_parser().parse_args(arguments)
    with refusing():
        export(options)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="diffmm export",
        allow_abbrev=False,
        description="Write a trained model as a file for other programs. A program's outputs are "
        "compared with the model's before the file appears.",
    )
    parser.add_argument("run", help="a run, a checkpoint, or model.safetensors (or its folder)")
    parser.add_argument(
        "target", help="a file with the ending of the format, or a folder; it must not exist"
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="onnx, pt2 (torch.export), aoti (machine code), safetensors, or hf (transformers)",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="a decoder's program takes whole texts, without keys and values of earlier tokens",
    )
    add_trust_option(parser)
    return parser


def export(options: argparse.Namespace) -> None:
    """Write the file, and print what it is.

    Raises:
        ValueError, OSError: If the run cannot be read, or the format cannot hold the model.
    """
    from diffmm.checks import check_choice
    from diffmm.export import formats
    from diffmm.hub.trained import load

    check_choice("--to", options.to, formats.FORMATS)
    formats.path_of(Path(options.target), options.to)
    state = find_state(Path(options.run), warn=warn)
    if options.trust:
        import_modules_of_run(state)
    model = load(state).model
    path, line = formats.export(model, options.target, options.to, cache=not options.no_cache)
    print(f"{path}: {options.to}, {line}")
