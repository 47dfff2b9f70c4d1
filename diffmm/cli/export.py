"""`diffmm export`: a trained model as a file for other programs."""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmm.checkpoint_folders import find_state
from diffmm.recipes.errors import InputError, refusing, warn
from diffmm.recipes.importing import importing
from diffmm.recipes.trust import add_trust_option
from diffmm.runs.directories import import_modules_of_run

if TYPE_CHECKING:
    from torch import nn

    from diffmm.hub.trained import TrainedModel

NUM_BATCHES = 20


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
    parser.add_argument(
        "--quantize",
        metavar="KIND",
        help="integer weights of linear layers: int8 or int4; the loss and accuracy before and "
        "after on the run's validation data are printed (--to safetensors)",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="other data for --quantize: labeled images or sounds as in `diffmm validate`, or a "
        "text file or a folder of them; for weights that are in no run",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"number of validation batches for --quantize; 0 measures nothing [{NUM_BATCHES}]",
    )
    parser.add_argument(
        "--device",
        help="the device that a program runs on (--to pt2 and aoti) [cpu], or that --quantize "
        "measures on [auto]: cpu, cuda, cuda:1, mps",
    )
    add_trust_option(parser)
    return parser


def export(options: argparse.Namespace) -> None:
    """Write the file, and print what it is.

    Raises:
        ValueError, OSError: If the run cannot be read, or the format cannot hold the model.
    """
    with importing():
        from diffmm.export import formats, quantized
        from diffmm.export.signature import is_decoder
        from diffmm.hub.loading import load

    check_options(options)
    formats.path_of(Path(options.target), options.to)
    kind = options.quantize
    limit = NUM_BATCHES if options.limit is None else options.limit
    state = find_state(Path(options.run), warn=warn)
    if options.trust:
        import_modules_of_run(state)
    trained = load(state, device=options.device or ("cpu" if kind is None else "auto"))
    model = trained.model
    if options.no_cache and not is_decoder(model):
        raise InputError("--no-cache is for text decoders, and the model is another: leave it out")
    if kind is not None:
        model = quantized.quantize(model, kind)
        if limit:
            print(effect_of(trained, model, state, limit, path=options.data, trust=options.trust))
    path, line = formats.export(model, options.target, options.to, cache=not options.no_cache)
    print(f"{path}: {options.to}, {line}")


def check_options(options: argparse.Namespace) -> None:
    """Check that the options fit together.

    Raises:
        ValueError, InputError: If they do not.
    """
    from diffmm.checks import check_choice
    from diffmm.export.formats import FORMATS
    from diffmm.export.quantized import BITS

    to, kind, limit = options.to, options.quantize, options.limit
    check_choice("--to", to, FORMATS)
    if options.no_cache and not FORMATS[to].has_cache:
        raise InputError(
            f"--no-cache is for programs, and --to {to} has weights only: leave it out"
        )
    if kind is not None and not FORMATS[to].can_quantize:
        able = ", ".join(f"--to {name}" for name, form in FORMATS.items() if form.can_quantize)
        raise InputError(f"--to {to} cannot hold quantized weights: use {able}")
    if options.device is not None and kind is None and not FORMATS[to].has_device:
        able = ", ".join(f"--to {name}" for name, form in FORMATS.items() if form.has_device)
        raise InputError(f"--device {options.device} is for {able} and --quantize: leave it out")
    if kind is not None:
        check_choice("--quantize", kind, BITS)
    elif limit is not None:
        raise InputError(f"--limit {limit} is for --quantize: leave it out")
    if options.data is not None and (kind is None or limit == 0):
        raise InputError(
            f"--data {options.data} is for what --quantize measures, and nothing is measured: "
            f"leave it out"
        )
    if limit is not None and limit < 0:
        raise InputError(f"--limit must be at least 0, got {limit}")


def effect_of(
    trained: "TrainedModel",
    quantized: "nn.Module",
    state: Path,
    limit: int,
    *,
    path: str | None,
    trust: bool,
) -> str:
    """A line with the metrics of a model and of its quantized copy, on batches of the validation
    data of its run or of the shipped recipe that trained it, or of the data at `path`.

    Raises:
        InputError, ValueError, OSError: If there are no such data.
    """
    from torch import Tensor

    from diffmm.analysis.batches import evaluate
    from diffmm.cli.weights_data import validation_batches

    found, _ = validation_batches(trained, state, path, trust=trust, way_out=", or --limit 0")
    device = next(trained.model.parameters()).device
    batches: list[Any] = [
        {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        for batch in islice(found, limit)
    ]
    before, after = (evaluate(each, batches) for each in (trained.model, quantized))
    changes = ", ".join(f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in before)
    return f"on {len(batches)} batches of the validation data: {changes}"
