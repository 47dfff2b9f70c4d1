"""Which code a recipe may name.

A recipe names classes, and naming one imports and calls it. In a recipe or run from
someone else, only the classes of `KNOWN` packages are imported and called, until `--trust` says
that its own code may be run.
"""

import argparse
import enum
import importlib.util
import inspect
import os
import re
from typing import Any, get_origin

KNOWN = (
    "diffmm",
    "datamodules",
    "torch",
    "torchaudio",
    "torchvision",
    "torchmetrics",
    "lightning",
    "pytorch_lightning",
    "timm",
)
"""Packages whose classes any recipe may name."""

PLAIN = (int, float, bool, str, bytes, complex, dict, list, tuple, set, type(None))
"""Types whose values a recipe holds as they are."""

CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """`--trust`, for the verbs that may be given the recipe or run of someone else."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="also import and call classes that the recipe names outside diffmm, datamodules, "
        "torch, timm and lightning",
    )


def stranger(class_path: Any) -> str | None:
    """Why a class path must not be imported, in words; None if it belongs to one of the `KNOWN`
    packages or to no installed one, or is a name without a package."""
    if not isinstance(class_path, str) or not CLASS_PATH.fullmatch(class_path):
        return None
    package = class_path.partition(".")[0]
    # Finding a top-level package does not import it.
    if package in KNOWN or importlib.util.find_spec(package) is None:
        return None
    return (
        f"{class_path!r} is outside diffmm, datamodules, torch, timm and lightning: add --trust "
        f"if you trust the author of this recipe"
    )


def is_code(option: Any) -> bool:
    """Whether a type makes the parser import what a string names: an instance of a class, the class
    itself, or a function."""
    if option is type or option is callable or "Callable" in str(option):
        return True
    origin = get_origin(option)
    if origin is not None:
        return origin is type
    no_code = (*PLAIN, os.PathLike, enum.Enum)
    return inspect.isclass(option) and not issubclass(option, no_code)
