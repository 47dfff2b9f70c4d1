"""What a program of a model tells its user, as plain data in the file."""

from typing import Any

from torch import nn

from diffmm import __version__
from diffmm.export.signature import Port, Signature
from diffmm.models.job import Job
from diffmm.models.text import TextModel
from diffmm.tokenizers import Tokenizer, load_tokenizer


def metadata_of(model: nn.Module, signature: Signature, job: Job) -> dict[str, Any]:
    """The metadata of a program, which JSON can hold.

    Returns:
        `diffmm`, the version that wrote it; `model`, its class; `inputs` and `outputs`, each with
        `name`, `dtype` and `shape`; `axes`, the least and the largest size of each dynamic axis by
        name; `recipe`, `class_names`, `multi_label` and `reader` (the preprocessing) of the model's
        job; for text `max_length`, `causal` and `eos_id`, for audio `sample_rate_hz`.
    """
    return {
        "diffmm": __version__,
        "model": type(model).__name__,
        "inputs": [_plain(port) for port in signature.inputs],
        "outputs": [_plain(port) for port in signature.outputs],
        "axes": {name: [axis.least, axis.most] for name, axis in signature.axes.items()},
        **job.plain(),
        **signature.facts,
        **({"eos_id": _eos_id(job)} if isinstance(model, TextModel) else {}),
    }


def _plain(port: Port) -> dict[str, Any]:
    dtype = str(port.dtype).removeprefix("torch.")
    return {"name": port.name, "dtype": dtype, "shape": list(port.shape)}


def _eos_id(job: Job) -> int | None:
    """The id that ends a text; None if there is none."""
    if job.reader is None:
        return None
    arguments = job.reader["init_args"]
    try:
        tokenizer: Tokenizer = load_tokenizer(arguments["tokenizer"], arguments.get("definition"))
        return tokenizer.eos_id
    except (ValueError, OSError):
        return None
