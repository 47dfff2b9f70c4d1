"""What a program of a model tells its user, as plain data in the file."""

from dataclasses import replace
from typing import Any

from torch import nn

from diffmm import __version__
from diffmm.export.signature import Port, Signature
from diffmm.models.captioning import CaptioningModel
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.ctc import CTCModel
from diffmm.models.job import Job
from diffmm.models.text import TextModel
from diffmm.models.text_tower import TextTower
from diffmm.tokenizers import Tokenizer, load_tokenizer

WITH_TEXTS = (TextModel, TextTower, CaptioningModel, ContrastiveModel, CTCModel)
"""Models whose programs have a tokenizer in their metadata."""

WITH_ENDS = (TextModel, CaptioningModel, ContrastiveModel)
"""Models whose texts have an end."""


def metadata_of(model: nn.Module, signature: Signature, job: Job) -> dict[str, Any]:
    """The metadata of a program, which JSON can hold.

    Returns:
        `diffmm`, the version that wrote it; `model`, its class; `inputs` and `outputs`, each with
        `name`, `dtype` and `shape`; `axes`, the least and the largest size of each dynamic axis by
        name; `recipe`, `class_names`, `multi_label` and `reader` (the preprocessing) of the model's
        job; for audio `sample_rate_hz`; for text `max_length`, `causal`, `eos_id`, the id that ends
        a text (None if there is none), and `stop_ids`, the ids that end a generated text: those of
        the reader (such as the end of an answer), or else the former. The reader of texts contains
        the definition of its tokenizer. Of a model of several programs, `part` is the name of this
        one; of a contrastive one, `scale` and `bias` compare embeddings; of a CTC model, `blank_id`
        is the id of the blank.

    Raises:
        ValueError: If the tokenizer of the model's job cannot be loaded; the message names it.
    """
    tokenizer = _tokenizer(job) if isinstance(model, WITH_TEXTS) else None
    return {
        "diffmm": __version__,
        "model": type(model).__name__,
        "inputs": [_plain(port) for port in signature.inputs],
        "outputs": [_plain(port) for port in signature.outputs],
        "axes": {name: [axis.least, axis.most] for name, axis in signature.axes.items()},
        **_with_definition(job, tokenizer).plain(),
        **signature.facts,
        **(_ends(job, tokenizer) if isinstance(model, WITH_ENDS) else {}),
    }


def _plain(port: Port) -> dict[str, Any]:
    dtype = str(port.dtype).removeprefix("torch.")
    return {"name": port.name, "dtype": dtype, "shape": list(port.shape)}


def _arguments(job: Job) -> dict[str, Any]:
    return {} if job.reader is None else job.reader["init_args"]


def _tokenizer(job: Job) -> Tokenizer | None:
    """The tokenizer of a job; None if the job names none."""
    arguments = _arguments(job)
    if "tokenizer" not in arguments:
        return None
    name = arguments["tokenizer"]
    try:
        return load_tokenizer(name, arguments.get("definition"))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the file is to contain the model's tokenizer {name!r}, which cannot be loaded "
            f"({error}): restore it, or set model.job = None to export without it"
        ) from error


def _with_definition(job: Job, tokenizer: Tokenizer | None) -> Job:
    """The job, whose reader can do without the file or the hub that a tokenizer came from."""
    if job.reader is None or tokenizer is None or _arguments(job).get("definition") is not None:
        return job
    arguments = {**_arguments(job), "definition": tokenizer.definition}
    return replace(job, reader={**job.reader, "init_args": arguments})


def _ends(job: Job, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids that end texts."""
    try:
        eos_id = None if tokenizer is None else tokenizer.eos_id
    except ValueError:  # it has no such token
        eos_id = None
    stop_ids = _arguments(job).get("stop_ids") or ([] if eos_id is None else [eos_id])
    return {"eos_id": eos_id, "stop_ids": list(stop_ids)}
