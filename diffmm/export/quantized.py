"""Weights of 8 and 4 bits, by torchao."""

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.checks import check_choice
from diffmm.interop.family import contents_of
from diffmm.models.contents import find_weights, save_contents
from diffmm.models.parameters import LAMBDA
from diffmm.models.quantized_file import QUANTIZATION_KEY, SCALE, integers, pack
from diffmm.models.safetensors_files import is_safetensors, read_tensors
from diffmm.models.weights import load_model
from diffmm.renamed import weights_with_new_names

BITS = {"int8": 8, "int4": 4}
"""Number of bits of each kind of weights."""

DTYPES = {8: torch.int8, 4: torch.int4}  # type: ignore[attr-defined]
"""torch's name of integers with this number of bits."""

GROUP, SMALLEST_GROUP = 32, 8
"""Number of weights of 4 bits that share a scale: as near to the first as the width of the layer
allows, and at least the second."""


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """A copy of a model whose linear layers have integer weights, with computation in the model's
    own dtype:

        weight ≈ scale * round(weight / scale),   scale = max|weight| / (2^(bits - 1) - 1/2)

    with one scale per output (`"int8"`), or per group of inputs of an output (`"int4"`), whose size
    is the divisor of the layer's width that is nearest to 32, by ratio. An embedding that is tied
    to the head is quantized with it and stays tied. Other embeddings, norms, convolutions and
    `lambda_proj` stay as they are.

    Args:
        model: A model of `diffmm.models`.
        kind: `"int8"` or `"int4"`.

    Raises:
        ValueError: If torchao is not installed, or the kind is unknown.
    """
    check_choice("kind", kind, BITS)
    tools = _torchao()
    widths = {
        name: model.get_parameter(f"{name}.weight").shape[1] for name in quantized_layers(model)
    }
    groups = {name: group_size(width, BITS[kind]) for name, width in widths.items()}
    model = deepcopy(model)
    dtype = DTYPES[BITS[kind]]
    for size in sorted(set(groups.values())):
        tools.quantize_(
            model,
            tools.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=tools.PerGroup(size)),
            filter_fn=lambda module, name, size=size: groups.get(name) == size,
        )
    _tie(model, groups)
    return model


def quantized_layers(model: nn.Module) -> Iterator[str]:
    """Names of the layers whose weights are quantized."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and LAMBDA not in name:
            yield name


def group_size(width: int, bits: int) -> int:
    """Number of inputs of a layer of this width that share a scale."""
    if bits == 8:
        return width
    sizes = [n for n in range(min(width, SMALLEST_GROUP), width + 1) if width % n == 0]
    return min(sizes, key=lambda size: abs(math.log(size / GROUP)))


def is_quantized(model: nn.Module) -> bool:
    """Whether weights of a model are tensors of another class than torch's own, as integers are."""
    return any(type(parameter.data) is not Tensor for parameter in model.parameters())


def save_quantized(model: nn.Module, path: str | Path) -> Path:
    """Save a model that `quantize` returned, to be read by `diffmm.load` (in float32) and
    `load_quantized` (as integers). Weights of 4 bits are stored two per byte.

    Args:
        model: The model.
        path: As in `diffmm.models.weights.save_model`.

    Returns:
        The path of the file.

    Raises:
        ValueError: If the model was quantized in another way, which the file cannot hold; or as
            `save_model`.
    """
    contents = contents_of(model)
    found: dict[str, Any] = {
        name: weight.data
        for name, weight in contents.weights.items()
        if type(weight.data) is not Tensor
    }
    for name, weight in found.items():
        if fault := _fault(weight):
            raise ValueError(
                f"{name} {fault}: only models that diffmm.export.quantized.quantize returned can "
                f"be saved with integer weights"
            )
    dtypes = {weight.target_dtype for weight in found.values()}
    if len(dtypes) != 1:
        kinds = " and ".join(sorted(map(str, dtypes))) or "none"
        raise ValueError(f"all integer weights must have the same number of bits, got {kinds}")
    (bits,) = (bits for bits, dtype in DTYPES.items() if dtype in dtypes)
    weights = dict(contents.weights)
    for name, weight in found.items():
        weights |= {name: pack(weight.qdata, bits), name + SCALE: weight.scale}
    widths = {name: weight.shape[1] for name, weight in found.items()}
    quantization = {"bits": bits, "widths": widths}
    return save_contents(contents._replace(weights=weights), path, quantization=quantization)


def _fault(weight: Any) -> str | None:
    """What a weight has that `quantize` never gives; None if there is nothing."""
    if not isinstance(weight, _torchao().IntxUnpackedToInt8Tensor):
        return f"is a tensor of class {type(weight).__name__}"
    if weight.target_dtype not in DTYPES.values():
        return f"has integers of type {weight.target_dtype}"
    if weight.zero_point.any():
        return "has a zero point other than 0"
    if weight.activation_quantization is not None:
        return f"has quantized inputs ({weight.activation_quantization})"
    if weight.ndim != 2 or weight.block_size[0] != 1:
        return f"has a scale per block of {tuple(weight.block_size)} weights"
    return None


def load_quantized(path: str | Path) -> nn.Module:
    """Load a model that `save_quantized` wrote, with its integer weights.

    Raises:
        FileNotFoundError, ValueError: As `load_model`; or if torchao is not installed, or the file
            has no quantized weights.
    """
    tensor_class = _torchao().IntxUnpackedToInt8Tensor
    file = find_weights(path)
    model = load_model(file)  # with all checks
    weights, metadata = read_tensors(file) if is_safetensors(file) else ({}, {})
    if QUANTIZATION_KEY not in metadata:
        raise ValueError(f"{path} has no quantized weights: use diffmm.load")
    settings = json.loads(metadata[QUANTIZATION_KEY])
    dtype = DTYPES[settings["bits"]]
    layers = {}
    for name, (values, scale) in weights_with_new_names(integers(weights, settings)).items():
        layer = name.removesuffix(".weight")
        block = (1, values.shape[1] // scale.shape[1])
        zero = torch.zeros_like(scale, dtype=torch.int8)
        weight = tensor_class(values, scale, zero, dtype, block, torch.float32, None)
        owner: Any = model.get_submodule(layer)
        owner.weight = nn.Parameter(weight, requires_grad=False)
        layers[layer] = block[1]
    _tie(model, layers)
    return model


def _tie(model: nn.Module, layers: dict[str, int]) -> None:
    """Tie the head of a text model and its embedding again, whichever was replaced."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_embeddings", False):
        whole: Any = model
        owner = whole.embedding if "embedding" in layers else whole.head
        whole.head.weight = whole.embedding.weight = owner.weight


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise ValueError(
            f"quantized weights need torchao ({error}): install diffmm[torchao]"
        ) from None
    return torchao.quantization
