"""Whose code a recipe may name.

A recipe names classes, and naming one imports and calls it. In a recipe or a run that somebody else
has made, only the classes of `KNOWN` packages are imported and called, until `--trust` says that
its own code may be run.
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
    """`--trust`, for the verbs that may be given somebody else's recipe or run."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="import and call also what the recipe names outside diffmm, datamodules, torch, timm "
        "and lightning",
    )


def stranger(class_path: Any) -> str | None:
    """Why a class path is not imported, in words, or `None` for one of `KNOWN` packages or of none
    that is there, and for a name without a package, which only stands for what is imported."""
    if not isinstance(class_path, str) or not CLASS_PATH.fullmatch(class_path):
        return None
    package = class_path.partition(".")[0]
    # Finding a top-level package does not import it.
    if package in KNOWN or importlib.util.find_spec(package) is None:
        return None
    return (
        f"{class_path!r} is code from outside diffmm, datamodules, torch, timm and lightning: add "
        f"--trust if you trust whoever wrote this recipe"
    )


def is_code(option: Any) -> bool:
    """Whether a type makes the recipe's parser import what a string names: a class whose instance
    is asked for, the class itself, or a function."""
    if option is type or option is callable or "Callable" in str(option):
        return True
    origin = get_origin(option)
    if origin is not None:
        return origin is type
    no_code = (*PLAIN, os.PathLike, enum.Enum)
    return inspect.isclass(option) and not issubclass(option, no_code)
