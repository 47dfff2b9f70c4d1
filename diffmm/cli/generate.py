"""`diffmm generate`: continue a prompt with a trained text model, printed token by token."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffmm.checkpoint_folders import find_state
from diffmm.recipes.errors import refusing, warn
from diffmm.recipes.importing import importing
from diffmm.recipes.trust import add_trust_option
from diffmm.runs.directories import import_modules_of_run


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
        description="Continue a prompt with a trained text model. Only the continuation is "
        "printed, token by token.",
    )
    parser.add_argument(
        "checkpoint",
        help="a run, a checkpoint, or model.safetensors (or its folder)",
    )
    parser.add_argument(
        "prompt",
        help="the text to continue; '-' reads it from stdin; or the file of an image or a sound to "
        "describe",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="answer the prompt, with a model that was trained on conversations",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="[200, or what the model's max_length leaves]",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sampling temperature; below 1e-6 the most likely token is taken [0.8, or 0 to "
        "describe]",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most likely tokens"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most likely tokens with a total probability of P",
    )
    parser.add_argument(
        "--prompt-lookup-num-tokens",
        type=int,
        metavar="N",
        help="speculative decoding: guess up to N tokens at once where the text repeats itself; "
        "the result stays the same",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling [0]")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="tokenizer, if the weights do not name one"
    )
    add_trust_option(parser)
    return parser


def generate(options: argparse.Namespace) -> None:
    """Write the continuation.

    Raises:
        ValueError, FileNotFoundError: If a file or an option is invalid; the message names it.
    """
    with importing():
        from diffmm.hub.loading import load

    state = find_state(Path(options.checkpoint), warn=warn)
    if options.trust:
        import_modules_of_run(state)
    trained = load(state, device=options.device, tokenizer=options.tokenizer)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    pieces = trained.write(
        prompt,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        prompt_lookup_num_tokens=options.prompt_lookup_num_tokens,
    )
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
