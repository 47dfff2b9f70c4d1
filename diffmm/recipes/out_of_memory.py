"""Advice for a run that is out of memory: settings, and the memory of a step with each of them."""

import shlex
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffmm.checkpoint_folders import find_whole
from diffmm.recipes.errors import warn
from diffmm.recipes.memory import Memory, fake_shapes
from diffmm.recipes.mistakes import find_mistakes
from diffmm.recipes.references import REFERENCE, resolve
from diffmm.recipes.settings import override
from diffmm.recipes.summary import gib, memory_text, num_devices, step_memory

SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Messages of a plain `RuntimeError` by which torch reports a lack of memory."""

MANY_DEVICES = 8
"""Number of devices for which sharding is estimated if the run has one device."""


class Remedy(NamedTuple):
    """Settings under which a step takes less memory."""

    what: str
    settings: dict[str, Any]

    @property
    def flags(self) -> str:
        """The settings as command-line options."""
        return " ".join(
            f"--{key} {shlex.quote(str(value).lower() if value is True else str(value))}"
            for key, value in self.settings.items()
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a step failed because the device or the host is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def advice(error: BaseException, values: dict[str, Any], run_dir: Path, step: int) -> str:
    """Return the message for a run that ended because it was out of memory.

    Args:
        error: Error that ended the run.
        values: Values of the recipe.
        run_dir: Directory of the run.
        step: Number of completed steps.
    """
    words = " ".join(str(error).split()).partition(" If reserved but")[0] or type(error).__name__
    lines = [f"out of memory after {step} steps: {words}"]
    values = {**values, "run_dir": str(run_dir)}
    if (memory := estimate(values)) is not None:
        lines += [f"a step takes about {memory_text(memory)}", *_helpful(values, memory)]
    with suppress(ValueError):  # raised if no checkpoint is complete
        checkpoint = find_whole(run_dir / "checkpoints", warn=warn)
        if checkpoint is not None:
            lines.append(
                f"the last checkpoint is complete: {checkpoint}. To start from its weights with "
                f"other settings: diffmm finetune --config {run_dir}/config.yaml "
                f"--weights {run_dir} ..."
            )
    return "\n".join(lines)


def _helpful(values: dict[str, Any], memory: Memory) -> Iterator[str]:
    """Yield a line for each remedy that takes less than `memory`, and one for all of them."""
    together: dict[str, Any] = {}
    found = []
    for remedy in remedies(values):
        less = estimate(_with(values, remedy.settings))
        if less is not None and less.total < memory.total:
            found.append(f"  {gib(less.total):>10}  {remedy.flags}  ({remedy.what})")
            together |= remedy.settings
    if found:
        yield "it would take about"
        yield from found
    if len(found) > 1 and (least := estimate(_with(values, together))) is not None:
        yield f"  {gib(least.total):>10}  with all of them"


def estimate(values: dict[str, Any]) -> Memory | None:
    """Estimate the memory of a step, as `diffmm check` does; `None` if that is not possible."""
    found = find_mistakes(values)
    shapes = None if found.mistakes else fake_shapes(found.model, found.data)
    if shapes is None:
        return None
    return step_memory(found.model, shapes, resolve(values)[0].get("trainer") or {})


def remedies(values: dict[str, Any]) -> Iterator[Remedy]:
    """Yield remedies in the order to try them, first those that only change the speed."""
    resolved = resolve(values)[0]
    trainer, data, model = (resolved.get(name) or {} for name in ("trainer", "data", "model"))
    batch_size = _arguments(data).get("batch_size")
    accumulated = trainer.get("accumulate_grad_batches") or 1
    if isinstance(batch_size, int) and batch_size > 1:
        parts = next(n for n in range(2, batch_size + 1) if batch_size % n == 0)
        yield Remedy(
            f"the same step in {parts * accumulated} micro-batches",
            {
                setting_key(values, "data.batch_size"): batch_size // parts,
                "trainer.accumulate_grad_batches": parts * accumulated,
            },
        )
    if not _arguments(model).get("activation_checkpointing"):
        yield Remedy(
            "blocks are recomputed in the backward pass: about a third slower",
            {setting_key(values, "model.activation_checkpointing"): True},
        )
    if str(trainer.get("precision") or "32-true") in ("32", "32-true"):
        yield Remedy(
            "activations in half precision",
            {setting_key(values, "trainer.precision"): "bf16-mixed"},
        )
    if "fsdp" in str(trainer.get("strategy")).lower() or trainer.get("accelerator") == "cpu":
        return
    if num_devices(trainer) > 1:
        yield Remedy(
            "weights, gradients and moments sharded over the devices",
            {setting_key(values, "trainer.strategy"): "fsdp2"},
        )
    else:
        devices = max(torch.cuda.device_count(), 1)
        devices = devices if devices > 1 else MANY_DEVICES
        yield Remedy(
            f"on {devices} devices, with sharded weights, gradients and moments; also divide the "
            f"batch size to keep the step the same",
            {
                setting_key(values, "trainer.strategy"): "fsdp2",
                setting_key(values, "trainer.devices"): devices,
            },
        )


def _with(values: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    changed = deepcopy(values)
    for key, value in settings.items():
        override(changed, key, value)
    return changed


def _arguments(node: dict[str, Any]) -> dict[str, Any]:
    return node.get("init_args") or {}


def setting_key(values: dict[str, Any], key: str) -> str:
    """Return the key to set: `key`, or the variable that its value refers to."""
    node: Any = values
    for part in key.split("."):
        node = (node.get("init_args") or {}) if "class_path" in node else node
        node = node.get(part)
        if not isinstance(node, dict):
            break
    reference = REFERENCE.fullmatch(node) if isinstance(node, str) else None
    return reference[1] if reference else key
