"""`diffmm generate`: continue a prompt with a trained text model, written as it comes."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffmm.checkpoint_folders import find_state
from diffmm.recipes.errors import InputError, refusing, warn

MAX_NEW_TOKENS = 200


def run(verb: str, arguments: Sequence[str]) -> int:
    """Load the model and its tokenizer, and write the prompt's continuation to stdout."""
    options = make_parser().parse_args(arguments)
    with refusing():
        generate(options)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="diffmm generate",
        description="Continue a prompt with a trained text model; only the continuation is "
        "printed, as it comes.",
    )
    parser.add_argument(
        "checkpoint",
        help="a run, a checkpoint, or model.safetensors (or its folder)",
    )
    parser.add_argument("prompt", help="the text to continue; '-' reads it from stdin")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"[{MAX_NEW_TOKENS}, or what the model's max_length leaves]",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0 takes the likeliest; so does anything below 1e-6 [0.8]",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="among the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="among the likeliest of together P probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same [0]")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="where the weights' file does not name one"
    )
    return parser


def generate(options: argparse.Namespace) -> None:
    """Write the continuation.

    Raises:
        ValueError, FileNotFoundError, InputError: naming the file or the option at fault.
    """
    import torch

    from diffmm.models import TextModel
    from diffmm.models.generation import stream
    from diffmm.models.weights import load_model
    from diffmm.tokenizers import StreamDecoder, load_tokenizer

    path = find_state(Path(options.checkpoint), warn=warn)
    model = load_model(path)
    if not isinstance(model, TextModel):
        raise InputError(f"{path} holds a {type(model).__name__}: only a text model writes text")
    tokenizer = load_tokenizer(options.tokenizer or tokenizer_name(path))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model of {path} "
            f"knows {model.config.vocab_size}: give the one it was trained with (--tokenizer)"
        )
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("the prompt is empty: give it a character at least")
    if not -(2**63) <= options.seed < 2**64:
        raise InputError(f"seed must be a number of 64 bits, got {options.seed}")
    max_new_tokens = options.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = max(1, min(MAX_NEW_TOKENS, model.config.max_length - len(ids)))
    device = find_device(options.device)
    model = model.to(device)
    steps = stream(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens=max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_ids=[tokenizer.eos_id],
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    decoder = StreamDecoder(tokenizer)
    for new in steps:
        sys.stdout.write(decoder.feed(new.tolist()))
        sys.stdout.flush()
    sys.stdout.write(f"{decoder.flush()}\n")


def tokenizer_name(path: Path) -> str:
    """The tokenizer that a checkpoint names.

    Raises:
        InputError: if it names none.
    """
    import torch

    name = None
    if path.suffix == ".ckpt":
        name = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("tokenizer")
    if name is None:
        raise InputError(f"{path} names no tokenizer: give it (--tokenizer bytes)")
    return name


def find_device(name: str) -> str:
    """The device that is asked for; `auto` is the accelerator where there is one.

    Raises:
        InputError: for one that is not there.
    """
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return str(accelerator) if accelerator is not None else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {name!r}: {str(error).splitlines()[0]}") from error
    return name
