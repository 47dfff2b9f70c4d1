"""The models that `diffmm analyze` measures, with their data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmm.analysis.attention_scores import Spans
from diffmm.analysis.batches import Batch
from diffmm.analysis.lambdas import lambda_curves
from diffmm.analysis.measurements import Measurements, measure, spans_of
from diffmm.analysis.sections import Analyzed
from diffmm.analysis.text_spans import tokens_of_span
from diffmm.batch import MEDIA, samples_of, size_of
from diffmm.checkpoint_folders import find_state
from diffmm.checks import article
from diffmm.cli.weights_data import text_batch, validation_batches
from diffmm.hub.devices import find_device
from diffmm.hub.loading import load
from diffmm.hub.trained import TrainedModel
from diffmm.layers.attention import ATTENTIONS, Attention
from diffmm.models.text import TextModel
from diffmm.recipes.errors import InputError, message_of, refusing, warn
from diffmm.runs.directories import CONFIG_NAME, import_modules_of_run, near_run
from diffmm.runs.metrics import read_curves
from diffmm.runs.summaries import find_runs, short_names


@dataclass(frozen=True)
class Request:
    """What models are measured on.

    Attributes:
        num_samples: Number of samples of the data.
        data: Path of other data than a run's own; None for its own.
        text: A text to use instead of data.
        span: First character of the answer in the text, and the one after its last.
        device: Name of the device.
        tokenizer: Name of the tokenizer of weights that do not name one.
        trust: Whether to import and call classes that a run's recipe names outside the library.
    """

    num_samples: int
    data: str | None = None
    text: str | None = None
    span: tuple[int, int] | None = None
    device: str = "auto"
    tokenizer: str | None = None
    trust: bool = False

    @property
    def description(self) -> str:
        """What models are measured on, as a sentence."""
        if self.text is not None:
            return "Measured on a given text."
        source = "the validation data of each run" if self.data is None else self.data
        return f"Measured on up to {self.num_samples} samples of {source}."


@dataclass
class Subject:
    """A model and its measurements.

    Attributes:
        analyzed: Its name and measurements.
        is_run: Whether it is a run.
        attention: Labels of its attention layers.
        num_parameters: Number of parameters; None if the model could not be loaded.
        num_samples: Number of samples that it was measured on.
        metrics: Its loss and other metrics on them.
        problem: Why it could not be loaded, or has no data; may be empty.
    """

    analyzed: Analyzed
    is_run: bool
    attention: str = "-"
    num_parameters: int | None = None
    num_samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str = ""


def find_subjects(paths: Sequence[str], request: Request) -> list[Subject]:
    """Load and measure models. One without a checkpoint or data has its problem in the result.

    Raises:
        InputError: If a path does not exist, or the device is not available.
    """
    with refusing():
        find_device(request.device)
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"there is no run or file of weights at {path}{near_run(path)}")
        has_runs = path.is_dir() and any(path.glob(f"*/{CONFIG_NAME}"))
        is_run = (path / CONFIG_NAME).is_file()
        found.update(dict.fromkeys(find_runs([str(path)]) if is_run or has_runs else [path]))
    names = short_names([str(path) for path in found])
    return [_subject(path, name, request) for path, name in zip(found, names, strict=True)]


def _subject(path: Path, name: str, request: Request) -> Subject:
    is_run = (path / CONFIG_NAME).is_file()
    curves = lambda_curves(read_curves(path)) if is_run else {}
    why_no_curves = "none are logged" if is_run else "it is not a run"
    if request.trust:
        import_modules_of_run(path)
    subject = Subject(Analyzed(name, Measurements(), curves, why_no_curves), is_run)
    try:
        if path.is_dir() and not any(path.iterdir()):
            raise InputError("the folder is empty: it has no run and no file of weights")
        state = find_state(path, warn=warn)
        trained = load(state, device=request.device, tokenizer=request.tokenizer)
        layers = [part for part in trained.model.modules() if isinstance(part, Attention)]
        subject.attention = ", ".join(dict.fromkeys(map(label_of, layers))) or "none"
        subject.num_parameters = sum(p.numel() for p in trained.model.parameters())
        batches, spans = _batches(trained, path, request)
    except (ValueError, OSError, InputError) as error:
        subject.problem = f"{name}: {message_of(error).rstrip('.')}"
        return subject
    subject.num_samples = sum(map(size_of, batches))
    measured = measure(trained.model, batches, spans=spans)
    subject.analyzed = Analyzed(name, measured, curves, why_no_curves)
    if measured.effects:
        subject.metrics = dict(measured.effects[0].metrics)
    return subject


def _batches(
    trained: TrainedModel, path: Path, request: Request
) -> tuple[list[Batch], Callable[[Batch], Spans | None]]:
    """Batches on the model's device, and what gives the answers and queries of one."""
    device = next(trained.model.parameters()).device
    if request.text is not None:
        if not isinstance(trained.model, TextModel):
            name = article(type(trained.model).__name__)
            raise InputError(f"it is {name}: --text needs a text model")
        ids = trained.tokenizer.encode(request.text)
        batch = text_batch(ids, trained.model)
        return [_moved(batch, device)], _spans_of_text(trained, ids, request, device)
    batches, special = validation_batches(
        trained,
        path,
        request.data,
        trust=request.trust,
        way_out=", or a text with --text TEXT" * isinstance(trained.model, TextModel),
    )
    found: list[Batch] = []
    # Of images and sounds, each has that many samples.
    media = [field for field in MEDIA if field in getattr(trained.model, "input_fields", ())]
    left = dict.fromkeys((media[1:] and media) or [""], request.num_samples)
    for batch in batches:
        if not isinstance(batch, dict):
            raise InputError(f"the batches of {path} must be dicts, got {type(batch).__name__}")
        medium = next((field for field in left if field in batch), "")
        if left[medium] > 0:
            found.append(_moved(samples_of(batch, slice(left[medium])), device))
            left[medium] -= size_of(found[-1])
        if max(left.values()) <= 0:
            break
    if not found:
        raise InputError(f"the data of {path} have no samples")
    return found, lambda batch: spans_of(batch, special)


def _spans_of_text(
    trained: TrainedModel, ids: Sequence[int], request: Request, device: torch.device
) -> Callable[[Batch], Spans | None]:
    def spans(batch: Batch) -> Spans | None:
        if request.span is None or request.text is None:
            return None
        assert isinstance(trained.model, TextModel)
        if not trained.model.config.causal:
            raise ValueError(
                "the scores of a text are those of its last token, which predicts what follows: "
                "they need a causal model"
            )
        tokens = tokens_of_span(trained.tokenizer, request.text, ids, *request.span)
        queries = torch.zeros_like(tokens)
        queries[-1] = True
        return Spans(tokens[None].to(device), queries[None].to(device))

    return spans


def _moved(batch: dict[str, Any], device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def label_of(layer: Attention) -> str:
    """The name of an attention, with what is added to its heads."""
    names = [name for name, kind in ATTENTIONS.items() if kind is type(layer)]
    added = ["exclusive"] if layer.exclusive else []
    if getattr(layer, "head_projections", None) is not None:
        added.append("dex")
    if layer.gate_proj is not None:
        added.append("gate per head" if layer.gate_width == 1 else "gate per element")
    name = names[0] if names else type(layer).__name__
    return f"{name} ({' and '.join(added)})" if added else name
