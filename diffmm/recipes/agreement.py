"""Checks that the model, the data and the trainer of a recipe agree."""

from typing import Any


def disagreements(model: Any, data: Any, precision: object) -> list[str]:
    """Return the settings in which the model and the data of a recipe disagree, and those that do
    not fit the trainer's `precision`."""
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
    if precision == "16-true" and optimizer is not None:
        import torch

        from diffmm.training.optimizer import check_eps

        try:
            check_eps(optimizer.eps, torch.float16)
        except ValueError as error:
            found.append(f"model.init_args.optimizer.eps: {error}")
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
