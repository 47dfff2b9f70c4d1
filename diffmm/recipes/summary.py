"""A text summary of a recipe: its model, its steps and their memory."""

import dataclasses
from typing import Any

from diffmm.checks import counted, reason_of
from diffmm.recipes.errors import InputError
from diffmm.recipes.memory import Memory, estimate_memory, fake_shapes
from diffmm.recipes.references import resolve
from diffmm.training.parallel import StrategyRegistry


def report(task: Any, data: Any, values: dict[str, Any]) -> dict[str, str]:
    """Describe the model and the steps of a recipe, one line per property."""
    trainer = resolve(values)[0].get("trainer") or {}
    model = getattr(task, "model", task)
    lines = {"model": f"{type(model).__name__} under {type(task).__name__}"}
    config = getattr(model, "config", None)
    backbone = getattr(getattr(config, "encoder", config), "backbone", None)
    if backbone is not None:
        lines["attention"] = (
            f"{backbone.attention}, {backbone.depth} layers of {backbone.num_heads} heads of "
            f"{backbone.resolved_head_dim}, width {backbone.dim}, feed-forward "
            f"{backbone.resolved_feed_forward_width}"
        )
    total = sum(p.numel() for p in model.parameters())
    embedding = getattr(getattr(model, "embedding", None), "weight", None)
    lines["parameters"] = f"{total:,} ({total / 1e6:,.1f} M)"
    if embedding is not None:
        lines["parameters"] += f", of which {embedding.numel():,} in the embedding"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained < total:
        lines["trained"] = f"{trained:,}"
    try:
        shapes = fake_shapes(task, data)
        if shapes is not None:
            lines["step"] = step_size(trainer, data, shapes)
            lines["memory"] = f"about {memory_text(step_memory(task, shapes, trainer))}"
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise InputError(
            f"a step of data.init_args.batch_size={data.batch_size} samples has tensors larger "
            f"than any memory: {reason_of(error)}"
        ) from error
    return lines


def step_memory(task: Any, shapes: dict[str, Any], trainer: dict[str, Any]) -> Memory:
    """Estimate the memory of a training step on batches of `shapes` with a trainer's settings."""
    return estimate_memory(
        task,
        shapes,
        precision=str(trainer.get("precision") or "32-true"),
        num_shards=num_devices(trainer) if "fsdp" in str(trainer.get("strategy")).lower() else 1,
        num_splits=tensor_parallel_size(trainer),
    )


def memory_text(memory: Memory) -> str:
    """Format a memory estimate."""
    parts = {f.name: getattr(memory, f.name) for f in dataclasses.fields(memory)}
    split = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    return f"{gib(memory.total)} per device: {split}"


def step_size(trainer: dict[str, Any], data: Any, shapes: dict[str, Any]) -> str:
    """Describe the number of samples and tokens per optimizer step."""
    accumulated, split = trainer.get("accumulate_grad_batches") or 1, tensor_parallel_size(trainer)
    known = num_devices(trainer) // split
    samples = data.batch_size * accumulated * known
    text = counted(samples, "sample")
    if "tokens" in shapes:
        text += f", {samples * shapes['tokens'][0][1]:,} tokens"
    detail = f"{data.batch_size} per batch"
    detail += f" x {accumulated} batches" if accumulated > 1 else ""
    who = "devices" if split == 1 else f"groups of {split} devices"
    detail += f" x {known} {who}" if known > 1 else ""
    devices = trainer.get("devices", "auto")
    if not isinstance(devices, int) or devices < 1:
        detail += f", per device (devices: {devices})"
    return f"{text} ({detail})"


def num_devices(trainer: dict[str, Any]) -> int:
    """Number of devices of all nodes, counting one per node if the recipe leaves it open."""
    devices = trainer.get("devices", "auto")
    known = devices if isinstance(devices, int) and devices > 0 else 1
    return known * (trainer.get("num_nodes") or 1)


def tensor_parallel_size(trainer: dict[str, Any]) -> int:
    """Number of devices that share the heads of a block and compute on the same samples."""
    strategy = trainer.get("strategy")
    settings: dict[str, Any] = {}
    if isinstance(strategy, dict):
        settings = strategy.get("init_args") or {}
    elif strategy in StrategyRegistry:
        settings = StrategyRegistry[strategy]["init_params"]
    return settings.get("tensor_parallel_size", 1)


def gib(num_bytes: int) -> str:
    """Format a number of bytes in MiB or GiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.1f} MiB"
