"""Checks that the model, the data and the trainer of a recipe agree."""

from collections.abc import Mapping
from typing import Any

MEDIA = {"image": ("image_size", "images"), "audio": ("sample_rate_hz", "sounds")}
"""For each tower of media, a setting of the readers of its inputs, and what these are."""


def disagreements(model: Any, data: Any, trainer: Mapping[str, Any]) -> list[str]:
    """Return the settings in which the model and the data of a recipe disagree, and those that do
    not fit the settings of the trainer."""
    config: Any = getattr(getattr(model, "model", None), "config", None)
    if not hasattr(config, "towers"):
        config = getattr(config, "encoder", config)
    found = []
    length, longest = getattr(data, "sequence_length", None), getattr(config, "max_length", None)
    if length and longest and length > longest:
        found.append(
            f"data.init_args.sequence_length={length} is longer than the model's positions allow: "
            f"max_length={longest}"
        )
    for tower in getattr(config, "towers", {"": config}).values():
        found += _of_media(tower, data)
    if "text" in getattr(config, "towers", ()):
        found += _of_towers(model, data)
    accumulated = trainer.get("accumulate_grad_batches") or 1
    if accumulated != 1 and hasattr(model, "why_no_accumulation"):
        found.append(f"trainer.accumulate_grad_batches={accumulated} {model.why_no_accumulation}")
    names = getattr(model, "tokenizer", None), getattr(data, "tokenizer_name", None)
    if None not in names and names[0] != names[1]:
        found.append(f"the model's tokenizer is {names[0]!r}, but the data's is {names[1]!r}")
    causal, objective = getattr(config, "causal", None), getattr(data, "objective", None)
    if causal is not None and objective is not None and causal != (objective == "causal"):
        found.append(f"data.init_args.objective={objective!r}, but the model's causal is {causal}")
    optimizer = getattr(model, "optimizer_config", None)
    if optimizer is not None and hasattr(model, "model"):
        from diffmm.training.optimizer import parameter_groups

        try:
            parameter_groups(model.model, optimizer)
        except ValueError as error:
            found.append(f"model.init_args.optimizer: {error}")
    if trainer.get("precision") == "16-true" and optimizer is not None:
        import torch

        from diffmm.training.optimizer import check_eps

        try:
            check_eps(optimizer.eps, torch.float16)
        except ValueError as error:
            found.append(f"model.init_args.optimizer.eps: {error}")
    return found


def _of_towers(model: Any, data: Any) -> list[str]:
    """Media of the data for which a contrastive model has no tower, and towers that would be
    trained without any."""
    found, reader = [], getattr(data, "reader", None)
    if reader is None:
        return []
    towers = model.model.towers
    for name, (setting, media) in MEDIA.items():
        has_media = hasattr(reader, setting)
        if has_media and name not in towers:
            found.append(
                f"{type(data).__name__} has {media}, but the model has no {name} tower: set "
                f"model.init_args.model.init_args.config.{name}, or use other data"
            )
            continue
        tower = towers.get(name)
        if has_media or tower is None or not any(p.requires_grad for p in tower.parameters()):
            continue
        found.append(
            f"the model has an {name} tower, but {type(data).__name__} has no {media} to train "
            f"it: use datamodules.ImageAudioTextData, leave out the tower, or freeze it "
            f"(--model.{name}.freeze all)"
        )
    return found


def _of_media(config: Any, data: Any) -> list[str]:
    """The disagreements of data with the config of a model of images or sounds, or of the texts
    that describe them."""
    found, reader = [], getattr(data, "reader", None)

    def of_data(name: str) -> Any:
        return getattr(data, name, getattr(reader, name, None))

    for name in ("sample_rate_hz", "image_size"):
        theirs, ours = of_data(name), getattr(config, name, None)
        if theirs is not None and ours is not None and _pair(theirs) != _pair(ours):
            found.append(f"data.init_args.{name}={theirs}, but the model's {name} is {ours}")
    seconds, samples = getattr(config, "clip_seconds", None), of_data("clip_samples")
    if seconds and samples and samples > config.samples_in(seconds):
        found.append(
            f"data.init_args.clip_seconds={samples / of_data('sample_rate_hz'):g} is longer than "
            f"the model's clip_seconds={seconds:g}"
        )
    length = of_data("max_tokens")
    longest = getattr(config, "max_length", None)
    if length and longest and length > longest:
        found.append(
            f"data.init_args.max_tokens={length} is longer than the positions of the model's text "
            f"tower allow: max_length={longest}"
        )
    return found


def _pair(size: Any) -> Any:
    """Expand a single number to height and width."""
    return (size, size) if isinstance(size, int) else tuple(size)
