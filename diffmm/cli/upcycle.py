"""`diffmm upcycle`: a differential model from a trained softmax model."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmm.checkpoint_folders import find_state
from diffmm.recipes.errors import InputError, refusing, warn
from diffmm.recipes.importing import importing
from diffmm.recipes.trust import add_trust_option
from diffmm.runs.directories import import_modules_of_run

if TYPE_CHECKING:
    from torch import Tensor, nn

DESCRIPTION = """Write a differential model that computes the same outputs as a trained softmax
model, to be trained further: both maps of a head start as the softmax map, lambda as 1/2. With dex,
softmax attention keeps its one map and subtracts a learned projection of every head from it; --to
softmax makes a plain softmax model of such a model again. The outputs of both models on random
inputs are compared before the file is written."""

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output."""

BATCH = 2


def run(verb: str, arguments: Sequence[str]) -> int:
    """Convert a model."""
    options = make_parser().parse_args(arguments)
    with refusing():
        upcycle(options)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="diffmm upcycle", allow_abbrev=False, description=DESCRIPTION
    )
    parser.add_argument(
        "source", help="a run, a checkpoint, or model.safetensors (or its folder), with softmax"
    )
    parser.add_argument(
        "target", help="a folder to write model.safetensors to, or a file ending in .safetensors"
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("diff_v1", "diff_v2", "diff_grouped", "dex", "softmax"),
        help="the attention of the new model",
    )
    parser.add_argument(
        "--signal-per-noise",
        type=int,
        default=4,
        metavar="R",
        help="signal heads per noise head of diff_grouped; it must divide the query heads per key "
        "head [4]",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the new weights [0]")
    add_trust_option(parser)
    return parser


def upcycle(options: argparse.Namespace) -> None:
    """Write the differential model.

    Raises:
        ValueError, InputError, OSError: If the source cannot be read or converted, or the target
            exists.
    """
    with importing():
        from diffmm.hub.loading import load
        from diffmm.interop import upcycle as upcycling
        from diffmm.models.contents import weights_file
        from diffmm.models.weights import save_model

    target = Path(options.target)
    file = weights_file(target)
    if file.exists():
        raise InputError(f"{file} exists: give another target, or remove it")
    state = find_state(Path(options.source), warn=warn)
    if options.trust:
        import_modules_of_run(state)
    model = load(state).model
    if options.to == "softmax":
        twin = upcycling.merged(model)
    else:
        twin = upcycling.upcycle(
            model, options.to, signal_per_noise=options.signal_per_noise, seed=options.seed
        )
    difference = largest_difference(model, twin)
    if not difference <= TOLERANCE:  # also for NaN
        raise InputError(
            f"the outputs of {options.source} and of its {options.to} twin differ by "
            f"{difference:.1e} of the largest one, more than {TOLERANCE:.0e}: nothing was written"
        )
    old, new = (sum(p.numel() for p in each.parameters()) for each in (model, twin))
    saved = save_model(twin, target)
    print(f"{saved}: {options.to}, {new:,} parameters ({new / old - 1:+.1%})")
    print(f"largest difference of the outputs on random inputs: {difference:.1e} of the largest")


def largest_difference(model: "nn.Module", twin: "nn.Module") -> float:
    """The largest difference of the outputs of two models on random inputs, relative to the largest
    output."""
    import torch

    with torch.inference_mode():
        ours, theirs = (_outputs(each) for each in (twin, model))
        return max(
            float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
            for one, other in zip(ours, theirs, strict=True)
        )


def _outputs(model: Any) -> "list[Tensor]":
    """The outputs of a model on random inputs, the same for both models."""
    import torch

    random = torch.Generator().manual_seed(0)
    config: Any = getattr(model, "encoder", model).config
    text: Any = getattr(config, "text", config)

    def inputs_of(name: str) -> Any:
        shape, dtype = config.input_shapes(BATCH)[name]
        if dtype.is_floating_point:
            return torch.randn(shape, generator=random).to(dtype)
        return torch.randint(text.vocab_size, shape, generator=random)

    first = next(iter(config.input_shapes(BATCH)))
    arguments = [inputs_of(first)]
    if hasattr(config, "towers"):
        arguments += [None, inputs_of("images" if config.image is not None else "waveforms")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # masked autoencoders hide random patches
        outputs = model(*arguments)
    outputs = [x for x in outputs if x is not None] if isinstance(outputs, tuple) else [outputs]
    return [x for x in outputs if x.is_floating_point()]
