"""`diffmm check`: what a recipe is, and what is wrong with it, before anything is spent."""

import argparse
from collections.abc import Sequence

from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.errors import InputError
from diffmm.recipes.settings import load
from diffmm.recipes.trust import add_trust_option

DESCRIPTION = """Build a recipe's model without memory or data, print its size, and tell every
mistake in the recipe. Exits with 2 if there is one."""

EPILOG = """Memory is what a training step takes on each device: weights, gradients and AdamW's
moments are exact; activations are what autograd keeps in an eager step, and the largest gradient.
On an H100 the sum was right to 7 %; compiled steps took 16 to 26 % less."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Report on a recipe."""
    parser = argparse.ArgumentParser(
        prog="diffmm check", allow_abbrev=False, description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("recipe", help="a recipe's file or name")
    add_trust_option(parser)
    options, overrides = parser.parse_known_args(arguments)
    values = {**load([find_recipe(options.recipe)], overrides), "run_dir": "runs"}

    from diffmm.recipes.mistakes import find_mistakes
    from diffmm.recipes.summary import report
    from diffmm.recipes.trainer import RecipeCLI

    findings = find_mistakes(values, trust=options.trust)
    if findings.mistakes:
        raise InputError(*findings.mistakes)
    # The recipe's own parser may be stricter.
    RecipeCLI(values, build=False, trust=options.trust)
    for name, text in report(findings.model, findings.data, values).items():
        print(f"{name:<12} {text}")
    return 0
