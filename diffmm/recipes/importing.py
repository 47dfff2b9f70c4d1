"""Imports of large packages, when a command needs them."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import without garbage collections, and exempt what was imported from later ones.

    What is imported stays until the process ends, and Lightning is most of a million objects: to
    look for garbage among them takes a third of the time of importing them and ending the process.
    Nothing is exempted if nothing was imported.
    """
    was_enabled = gc.isenabled()
    before = len(sys.modules)
    gc.disable()
    try:
        yield
        if len(sys.modules) > before:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
