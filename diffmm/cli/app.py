"""`diffmm app`: a local page to try a trained model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffmm.checkpoint_folders import find_state
from diffmm.recipes.errors import refusing, warn
from diffmm.recipes.importing import importing
from diffmm.recipes.trust import add_trust_option
from diffmm.runs.directories import import_modules_of_run

DESCRIPTION = """Open a page on this machine to try a trained model: drop an image or a sound, or
type a text, and see the answer and the attention maps. The page can be reached from this machine
only, and it loads nothing from the network. It needs Gradio: pip install diffmm[app]. Ctrl-C ends
it."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Serve the page until Ctrl-C."""
    options = make_parser().parse_args(arguments)
    with importing():
        from diffmm.app.server import serve
        from diffmm.hub.loading import load

    with refusing():
        state = find_state(Path(options.run), warn=warn)
        if options.trust:
            import_modules_of_run(state)
        trained = load(state, device=options.device)
        serve(
            trained,
            options.port,
            ready=lambda address: print(f"{address} (Ctrl-C ends it)", flush=True),
        )
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="diffmm app", allow_abbrev=False, description=DESCRIPTION)
    parser.add_argument("run", help="a run, a checkpoint, or model.safetensors (or its folder)")
    parser.add_argument(
        "--port",
        type=int,
        metavar="P",
        help="port on this machine, 0 for any free one [7860, or the next free one]",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps [auto]")
    add_trust_option(parser)
    return parser
