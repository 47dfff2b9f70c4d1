"""Creation of the readers that a model's job names.

This module does not import `datamodules`: a file names the class, as a recipe does. Only readers of
`datamodules` are allowed, so that opening a file of weights cannot import or call anything else.
"""

import inspect
import re
from importlib import import_module
from typing import Any

from diffmm.models.job import Job

ALLOWED = re.compile(r"datamodules(\.[a-z][a-z0-9_]*)+\.[A-Z][A-Za-z0-9]*")
BASE = "datamodules.shared.reader"


def make_reader(job: Job, origin: str) -> Any:
    """Create the reader that a job names, a `datamodules.shared.reader.Reader`.

    Args:
        job: A job with a reader.
        origin: The file of the job, for messages.

    Raises:
        ValueError: If the class is not a reader of `datamodules` (which is then not imported), or
            the reader does not accept the arguments.
    """
    assert job.reader is not None
    class_path, arguments = job.reader["class_path"], job.reader["init_args"]
    if not ALLOWED.fullmatch(class_path):
        raise ValueError(
            f"{origin} names the reader {class_path!r:.200}, but a file of weights may only name "
            f"readers of datamodules"
        )
    module, _, name = class_path.rpartition(".")
    try:
        base = import_module(BASE).Reader
        reader_class = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ValueError(
            f"the reader {class_path} of {origin} cannot be imported: {error}"
        ) from error
    if not inspect.isclass(reader_class) or not issubclass(reader_class, base):
        raise ValueError(f"{origin} names the reader {class_path}, which is not a reader")
    try:
        return reader_class(**arguments)
    except (TypeError, ValueError) as error:
        reason = str(error).replace(f"{reader_class.__name__}.__init__() ", "")
        raise ValueError(
            f"the reader {class_path} of {origin} cannot be created: {reason}"
        ) from error


def check_inputs(reader: Any, model: Any, origin: str) -> None:
    """Check that a reader's output matches the model's input.

    Raises:
        ValueError: If it does not; the message names the difference.
    """
    config: Any = getattr(model, "config", None)
    for tower in getattr(config, "towers", {"": config}).values():
        for ours, theirs in (
            ("image_size", "image_size"),
            ("channels", "in_channels"),
            ("sample_rate_hz", "sample_rate_hz"),
        ):
            prepared, wanted = getattr(reader, ours, None), getattr(tower, theirs, None)
            if prepared is not None and wanted is not None and _pair(prepared) != _pair(wanted):
                raise ValueError(
                    f"the reader of {origin} has {ours}={prepared}, but its model has "
                    f"{theirs}={wanted}: use another reader"
                )
        max_tokens, longest = getattr(reader, "max_tokens", None), getattr(tower, "max_length", 0)
        if max_tokens and longest and max_tokens > longest:
            raise ValueError(
                f"the reader of {origin} has max_tokens={max_tokens}, but the texts of its model "
                f"have at most max_length={longest}: use another reader"
            )


def _pair(size: Any) -> tuple[Any, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)
