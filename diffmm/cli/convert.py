"""`diffmm convert`: weights of other implementations to diffmm's, and back."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffmm.checkpoint_folders import find_state
from diffmm.recipes.errors import refusing, warn
from diffmm.recipes.importing import importing

OURS = "diffmm"
"""The name of diffmm's own format."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Convert the weights, and print what was written."""
    options = make_parser().parse_args(arguments)
    with refusing():
        print(convert(options.source, Path(options.target), options.to, options.family))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="diffmm convert",
        description="Convert weights of other implementations to diffmm's, and back. Nothing is "
        "written unless the other side can hold every tensor and every setting exactly.",
    )
    parser.add_argument(
        "source",
        help="a folder with config.json and safetensors, such a file, a name on the Hugging Face "
        "hub, or a run, checkpoint or model.safetensors of diffmm",
    )
    parser.add_argument(
        "target",
        help="the folder to write, or for diffmm's format a file that ends in .safetensors; it "
        "must not exist",
    )
    parser.add_argument(
        "--to",
        metavar="FAMILY",
        default=OURS,
        help="what to convert to: llama, mistral, ...; an unknown name lists all [diffmm]",
    )
    parser.add_argument(
        "--from",
        dest="family",
        metavar="FAMILY",
        help="what to read the source as, of a model with several towers: open_clip_text, "
        "diffclip_text; by default what its settings say",
    )
    return parser


def convert(source: str, target: Path, to: str, family: str | None = None) -> str:
    """Convert weights and return a line that says what was written.

    Raises:
        ValueError, FileNotFoundError: If a file or an option is invalid, or the weights cannot be
            held exactly; the message names the tensor or the setting.
    """
    with importing():
        from diffmm.checks import check_choice
        from diffmm.interop import conversion
        from diffmm.interop.source import is_of_others
        from diffmm.models import weights

    check_choice("--to", to, (OURS, *conversion.FAMILIES))
    conversion.check_free(target)
    if is_of_others(source):
        contents = conversion.read_contents(source, family)
    elif family is not None:
        raise ValueError(f"--from {family} is for models of others, but {source} is of diffmm")
    else:
        contents = weights.read_contents(find_state(Path(source), warn=warn))
    if to == OURS:
        written = weights.save_contents(contents, target)
    else:
        written = conversion.write_contents(contents, target, to)
    count = sum(tensor.numel() for tensor in contents.weights.values())
    return f"{written}: {to}, {count:,} parameters"
