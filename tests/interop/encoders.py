"""Comparison of encoders with those of other libraries, at random weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hugging_face import assert_same
from safetensors.torch import load_file
from torch import Tensor, nn

from diffmm.interop.conversion import FAMILIES


def randomize(model: nn.Module) -> nn.Module:
    """Make every parameter random, so that none is at a special value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def compare_gradients(
    theirs: nn.Module,
    ours: nn.Module,
    run: Callable[[nn.Module, torch.dtype], Tensor],
    family: str,
    renamed: Mapping[str, str] | None = None,
) -> float:
    """Compare the output of both models, and the gradients of all parameters; returns the largest
    magnitude of a gradient.

    The output is compared in float32, and the gradients in float64: those of a bias of keys are
    sums that cancel, as are those of lambda. Gradients that are 0 in exact arithmetic are compared
    to 1e-9 of the largest of all. `renamed` gives the names in files of parameters that have
    another name in memory.
    """
    assert_same(run(ours, torch.float32), run(theirs, torch.float32), "output")
    outputs = [run(model.double(), torch.float64) for model in (theirs, ours)]
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    found = {name: p.grad for name, p in ours.named_parameters()}
    gradients = FAMILIES[family].table(ours.config).to_theirs(found)
    names = renamed or {}
    parameters = {names.get(name, name): p for name, p in theirs.named_parameters()}
    assert parameters.keys() == gradients.keys()
    largest = max(p.grad.abs().max() for p in parameters.values())
    for name, parameter in parameters.items():
        assert gradients[name].shape == parameter.shape, name
        error = (gradients[name] - parameter.grad).abs().max()
        assert error < 1e-6 * parameter.grad.abs().max() + 1e-9 * largest, f"{name}: {error:.1e}"
    return float(largest)


def assert_same_files(first: Path, second: Path, file: str = "model.safetensors") -> None:
    """Check that two folders have the same tensors, bit by bit."""
    tensors: list[dict[str, Any]] = [load_file(each / file) for each in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
