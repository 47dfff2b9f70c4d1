"""The readers that a model's job names, made again at run time.

Nothing here imports `datamodules`: a file names the class, as a recipe does. It can name readers of
`datamodules` only, so that opening somebody's weights imports and calls nothing else.
"""

import inspect
import re
from importlib import import_module
from typing import Any

from diffmm.models.job import Job

ALLOWED = re.compile(r"datamodules(\.[a-z][a-z0-9_]*)+\.[A-Z][A-Za-z0-9]*")
BASE = "datamodules.shared.reader"


def make_reader(job: Job, origin: str) -> Any:
    """The reader that a job names, a `datamodules.shared.reader.Reader`.

    Args:
        job: with a reader.
        origin: the file that it is of, for messages.

    Raises:
        ValueError: in one line, for a class path that is no reader of `datamodules` (which is not
            imported), or arguments that the reader does not take.
    """
    assert job.reader is not None
    class_path, arguments = job.reader["class_path"], job.reader["init_args"]
    if not ALLOWED.fullmatch(class_path):
        raise ValueError(
            f"{origin} says that {class_path!r:.200} prepares its inputs: only readers of "
            f"datamodules are imported for a file of weights"
        )
    module, _, name = class_path.rpartition(".")
    try:
        base = import_module(BASE).Reader
        reader_class = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"the reader {class_path} of {origin} is not there: {error}") from error
    if not inspect.isclass(reader_class) or not issubclass(reader_class, base):
        raise ValueError(f"{origin} says that {class_path} prepares its inputs, which is no reader")
    try:
        return reader_class(**arguments)
    except (TypeError, ValueError) as error:
        told = str(error).replace(f"{reader_class.__name__}.__init__() ", "")
        raise ValueError(f"the reader {class_path} of {origin} cannot be made: {told}") from error


def check_inputs(reader: Any, model: Any, origin: str) -> None:
    """Refuse a reader whose inputs the model does not take.

    Raises:
        ValueError: naming what differs.
    """
    config = getattr(model, "config", None)
    for ours, theirs in (
        ("image_size", "image_size"),
        ("channels", "in_channels"),
        ("sample_rate_hz", "sample_rate_hz"),
    ):
        prepared, wanted = getattr(reader, ours, None), getattr(config, theirs, None)
        if prepared is not None and wanted is not None and _pair(prepared) != _pair(wanted):
            raise ValueError(
                f"{origin} prepares inputs of {ours}={prepared}, and its model's {theirs} is "
                f"{wanted}: give another reader"
            )


def _pair(size: Any) -> tuple[Any, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)
