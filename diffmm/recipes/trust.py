"""Restrictions on the code that an untrusted recipe may run.

The classes that a recipe names are imported and called. For a recipe or run from another author,
only classes of `KNOWN` packages are imported and called unless `--trust` is given.
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
"""Packages whose classes are always trusted."""

PLAIN = (int, float, bool, str, bytes, complex, dict, list, tuple, set, type(None))
"""Types whose values a recipe holds directly."""

CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add `--trust` to a command that may be given a recipe or run from another author."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="also import and call classes that the recipe names outside diffmm, datamodules, "
        "torch, timm and lightning",
    )


def why_untrusted(class_path: Any) -> str | None:
    """Return why a class path must not be imported; `None` if it belongs to a `KNOWN` package or to
    one that is not installed, or is a name without a package."""
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
    """Whether the parser imports the class or function that a string of this type names."""
    if option is type or option is callable or "Callable" in str(option):
        return True
    origin = get_origin(option)
    if origin is not None:
        return origin is type
    no_code = (*PLAIN, os.PathLike, enum.Enum)
    return inspect.isclass(option) and not issubclass(option, no_code)
