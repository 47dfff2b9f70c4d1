"""The model card of a folder for the hub: its `README.md`."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffmm.layers.attention import ATTENTIONS
from diffmm.models.audio import AudioModel
from diffmm.models.backbone_config import BackboneConfig
from diffmm.models.captioning import CaptioningModel
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.ctc import CTCModel
from diffmm.models.encoder import Encoder
from diffmm.models.image import ImageModel
from diffmm.models.job import Job
from diffmm.models.text import TextModel

PIPELINES = {ImageModel: "image-classification", AudioModel: "audio-classification"}
"""The hub's names of the tasks of classifiers."""

TRANSFORMERS = """
Or with transformers, version 5 or later:

```python
import diffmm.interop.transformers_models
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""


def model_card(model: nn.Module, name: str, metrics: Mapping[str, float]) -> str:
    """Write the card: attention, sizes, metrics and how to load the model.

    Args:
        model: A model of `diffmm.models`.
        name: What `diffmm.load` takes: a name on the hub, or that of a folder.
        metrics: Values by the names of metrics, such as `{"val/accuracy": 0.9}`; may be empty.

    Raises:
        ValueError: If one of them is not a number; the message names it.
    """
    config: Any = model.config
    backbone: BackboneConfig = _first_tower(config).backbone
    attention = ATTENTIONS[backbone.attention]
    job: Any = getattr(model, "job", None)
    pipeline = pipeline_of(model)
    head = ["library_name: diffmm"]
    head += [f"pipeline_tag: {pipeline}"] if pipeline else []
    head += ["tags:", "- diffmm", f"- {backbone.attention}"]
    head += ["- differential-attention"] if attention.is_differential else []
    count = sum(parameter.numel() for parameter in model.parameters())
    rows = {
        "model": type(model).__name__,
        "attention": attention.label,
        "parameters": f"{count:,}",
        "width": backbone.dim,
        "blocks": backbone.depth,
        "heads": f"{backbone.num_heads} of {backbone.resolved_head_dim}",
        **_inputs(config),
        **_outputs(model, job),
    }
    lines = ["---", *head, "---", "", f"# {name}", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    if metrics:
        lines += ["", "## Metrics", "", "| metric | value |", "|---|---|"]
        lines += [f"| {metric} | {_number(metric, value)} |" for metric, value in metrics.items()]
    lines += ["", "## Use", "", "```python", "import diffmm", ""]
    lines += [f'trained = diffmm.load("{name}")', _call(model, job), "```"]
    text = "\n".join(lines) + "\n"
    if isinstance(model, TextModel) and model.config.causal:
        text += TRANSFORMERS.format(name=name)
    return text


def pipeline_of(model: nn.Module) -> str | None:
    """The hub's name of a model's task; None if it has none."""
    if isinstance(model, TextModel):
        return "text-generation" if model.config.causal else "fill-mask"
    if isinstance(model, Encoder) and model.num_classes:
        return next((name for kind, name in PIPELINES.items() if isinstance(model, kind)), None)
    return None


def _number(metric: str, value: Any) -> str:
    try:
        return f"{value:.4g}"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the metric {metric!r} must be a number, got {value!r}: leave it out, or give one"
        ) from error


def _first_tower(config: Any) -> Any:
    """The config of the model's encoder, or of the first one of several towers."""
    towers = getattr(config, "towers", None)
    return next(iter(towers.values())) if towers else getattr(config, "encoder", config)


def _inputs(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tower in getattr(config, "towers", {"": getattr(config, "encoder", config)}).values():
        found |= _inputs_of(tower)
    return found


def _inputs_of(config: Any) -> dict[str, Any]:
    names = {
        "vocab_size": "vocabulary",
        "max_length": "maximum length in tokens",
        "image_size": "image size",
        "patch_size": "patch size",
        "sample_rate_hz": "sample rate in Hz",
    }
    return {label: getattr(config, name) for name, label in names.items() if hasattr(config, name)}


def _outputs(model: nn.Module, job: Job | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if getattr(model, "num_classes", 0):
        found["classes"] = model.num_classes
    if job is not None and job.recipe is not None:
        found["recipe"] = f"`{job.recipe}`"
    return found


def _call(model: nn.Module, job: Job | None) -> str:
    """A line of Python that uses the loaded model."""
    if job is not None and job.reader is not None:
        if isinstance(model, TextModel) and model.config.causal:
            return 'print(trained.generate("Once upon a time"))'
        if getattr(model, "num_classes", 0):
            return 'print(trained.predict("a_file"))'
        if isinstance(model, CaptioningModel | CTCModel):
            return 'print(trained.predict("a_file").text)'
        if isinstance(model, ContrastiveModel):
            return 'print(trained.similarity("a_file", ["a text", "another text"]))'
    return "model = trained.model  # a torch.nn.Module"
