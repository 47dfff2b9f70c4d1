"""Weights of 8 and 4 bits, by torchao."""

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffmm.checks import check_choice
from diffmm.interop.family import contents_of
from diffmm.models.parameters import LAMBDA
from diffmm.models.quantized_file import QUANTIZATION_KEY, SCALE, integers, pack
from diffmm.models.weights import WEIGHTS_NAME, load_model, save_contents

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
    check_choice("quantize", kind, BITS)
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
    """Whether weights of a model are integers."""
    return any(hasattr(parameter.data, "qdata") for parameter in model.parameters())


def save_quantized(model: nn.Module, path: str | Path) -> Path:
    """Save a model that `quantize` returned, to be read by `diffmm.load` (in float32) and
    `load_quantized` (as integers). Weights of 4 bits are stored two per byte.

    Args:
        model: The model.
        path: As in `diffmm.models.weights.save_model`.

    Returns:
        The path of the file.
    """
    contents = contents_of(model)
    weights: dict[str, Tensor] = {}
    widths, bits = {}, 8
    for name, weight in contents.weights.items():
        quantized: Any = weight.data
        if not hasattr(quantized, "qdata"):
            weights[name] = weight
            continue
        bits = 8 if quantized.target_dtype == torch.int8 else 4
        weights[name] = pack(quantized.qdata, bits)
        weights[name + SCALE] = quantized.scale
        widths[name] = weight.shape[1]
    quantization = {"bits": bits, "widths": widths}
    return save_contents(contents._replace(weights=weights), path, quantization=quantization)


def load_quantized(path: str | Path) -> nn.Module:
    """Load a model that `save_quantized` wrote, with its integer weights.

    Raises:
        FileNotFoundError, ValueError: As `load_model`; or if torchao is not installed, or the file
            has no quantized weights.
    """
    tensor_class = _torchao().IntxUnpackedToInt8Tensor
    model = load_model(path)
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise ValueError(f"{path} has no quantized weights: use diffmm.load")
    with safe_open(file, framework="pt") as opened:
        settings = json.loads((opened.metadata() or {}).get(QUANTIZATION_KEY, "null"))
        if settings is None:
            raise ValueError(f"{path} has no quantized weights: use diffmm.load")
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    dtype = DTYPES[settings["bits"]]
    layers = {}
    for name, (values, scale) in integers(weights, settings).items():
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
