"""What the audio models of Hugging Face transformers have in common."""

from typing import Any

from diffmm.interop.family import PREPROCESSOR
from diffmm.interop.settings import TheirSettings
from diffmm.interop.source import CONFIG_NAME, PREPROCESSOR_NAME, Source
from diffmm.models import AudioConfig
from diffmm.models.job import Job

READER = "datamodules.audio.AudioReader"

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
"""Activations by transformers' names; the last name of several is the one that is written."""

MULTI_LABEL = "multi_label_classification"
"""The `problem_type` of models whose classes do not exclude each other."""

NOT_OF_SOUNDS = (
    "feature_extractor_type",
    "processor_class",
    "return_attention_mask",
    "padding_side",
    "padding_value",
)
"""Entries of `preprocessor_config.json` without an effect on a single clip of full length."""


def with_preprocessor(source: Source) -> Source:
    """Put the settings of `preprocessor_config.json` among those of `config.json`.

    Raises:
        ValueError: If there is no such file.
    """
    if source.preprocessor is None:
        raise ValueError(
            f"{source.origin} has no {PREPROCESSOR_NAME}, which says how its spectrograms are "
            f"computed: save it there with its feature extractor's save_pretrained"
        )
    return source._replace(config={**source.config, PREPROCESSOR: source.preprocessor})


def activation(settings: TheirSettings, name: str) -> str:
    """Read the activation of the feed-forward layers."""
    given = settings.take(name, str, "gelu")
    if given not in ACTIVATIONS:
        settings.refuse(name, given, f"only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[given]


def their_activation(name: str) -> str:
    """The name of an activation in transformers; GELU if it has none."""
    return {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(name, "gelu")


def labels(settings: dict[str, Any]) -> tuple[str, ...] | None:
    """The names of the classes in `id2label`, in order."""
    names = settings.get("id2label")
    if not isinstance(names, dict):
        return None
    return tuple(str(names[key]) for key in sorted(names, key=int))


def read_job(source: Source, config: AudioConfig) -> Job:
    """A clip is resampled, and cut at the end if it is too long; the model pads it."""
    assert config.clip_seconds is not None
    reader = {
        "class_path": READER,
        "init_args": {
            "sample_rate_hz": config.sample_rate_hz,
            "clip_samples": config.samples_in(config.clip_seconds),
            "crop": "start",
        },
    }
    return Job(
        reader=reader,
        class_names=labels(source.config) if config.num_classes else None,
        multi_label=source.config.get("problem_type") == MULTI_LABEL,
    )


def write_job(job: Job | None, config: AudioConfig) -> dict[str, dict[str, Any]]:
    """The names of the classes, and whether they exclude each other."""
    names = None if job is None else job.class_names
    if names is None:
        names = tuple(f"LABEL_{index}" for index in range(config.num_classes))
    values: dict[str, Any] = {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if job is not None and job.multi_label:
        values["problem_type"] = MULTI_LABEL
    return {CONFIG_NAME: values}
