"""Differential models from softmax models, with the same outputs at the start.

Both maps start as the map of the softmax model, and lambda as 1/2, so that

    (A - lambda A) V = A V / 2,

and the output projection, doubled, gives the output of the softmax model. The gradients of the two
maps differ in sign and size, so that training separates them at once, and lambda has a gradient
from the start. No output depends on a new parameter being zero, and none needs to be annealed.

`diff_v2` needs nothing else. In `diff_grouped`, the noise head of each group starts as its first
signal head; the outputs of the other signal heads then lack half of the first one's attention,
which the output projection restores, because all heads of the group read the same values:

    o_1 = A_1 V / 2,   o_i = A_i V - A_1 V / 2   =>   sum_i W_i A_i V = (2 W_1 + sum_{i>1} W_i) o_1
                                                                         + sum_{i>1} W_i o_i.

A head of `diff_v1` has values of twice the width, which a softmax head does not have. Every softmax
head therefore becomes one differential head, with the values `[V + E, V - E]` for random `E`, whose
halves add up to `2 V` in the output projection. Its headwise norm would change the outputs, so that
the differential model has none.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.checks import check_choice
from diffmm.layers import Attention, DiffAttentionV1, SoftmaxAttention
from diffmm.layers.norm import CosineNorm
from diffmm.models.backbone import BackboneConfig
from diffmm.models.description import describe, unwrap

TARGETS = ("diff_v1", "diff_v2", "diff_grouped")
"""The attentions that a softmax model can become."""

LAMBDA = 0.5
"""Lambda at the start: that of `sigmoid(0)`."""


def upcycle(
    model: nn.Module, attention: str, *, signal_per_noise: int = 4, seed: int = 0
) -> nn.Module:
    """Create a differential model with the outputs of a softmax model.

    The new model has the softmax model's weights except in its attention layers (see
    `diffmm.interop.upcycle`), and more parameters: the queries of the noise maps, and in `diff_v1`
    also their keys and twice as many values.

    Args:
        model: A model of `diffmm.models` with softmax attention; it is not changed.
        attention: `"diff_v1"`, `"diff_v2"` or `"diff_grouped"`.
        signal_per_noise: Number of signal heads per noise head, for `diff_grouped`.
        seed: Seed of the new random numbers, which `diff_v1` needs.

    Returns:
        The differential model, in evaluation mode, with the softmax model's job.

    Raises:
        ValueError: If the model has another attention, or settings with which the outputs cannot be
            the same; the message names them.

    >>> model = diffmm.create_model("text/stdlib_tiny", attention="softmax").eval()
    >>> tokens = torch.tensor([list(b"def main(")])
    >>> twin = diffmm.interop.upcycle.upcycle(model, "diff_v2")
    >>> torch.allclose(twin(tokens), model(tokens), atol=1e-4)
    True
    """
    check_choice("attention", attention, TARGETS)
    model = unwrap(model)
    describe(model)  # checks its class
    layers = {n: part for n, part in model.named_modules() if isinstance(part, Attention)}
    for name, layer in layers.items():
        _check(name, layer, attention, signal_per_noise)
    random = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, layer in layers.items():
        prefix = f"{name}."
        own = {n.removeprefix(prefix): state.pop(n) for n in list(state) if n.startswith(prefix)}
        new = _LAYERS[attention](layer, own, signal_per_noise, random)
        state |= {f"{prefix}{n}": tensor.to(layer.q_proj.weight.dtype) for n, tensor in new.items()}
    config: Any = model.config
    twin: nn.Module = type(model)(_converted(config, attention, signal_per_noise))
    twin.load_state_dict(state)
    twin.job = getattr(model, "job", None)  # type: ignore[assignment]
    return twin.eval()


def _check(name: str, layer: Attention, attention: str, signal_per_noise: int) -> None:
    """Check that a layer can be converted."""
    if type(layer) is not SoftmaxAttention:
        raise ValueError(
            f"{name} is {type(layer).__name__}: only models with softmax attention can become "
            f"differential"
        )
    for setting, is_set, targets in (
        ("cosine_logits", isinstance(layer.q_norm, CosineNorm), TARGETS),
        ("attention_softcap", layer.softcap is not None, TARGETS),
        ("exclusive", layer.exclusive, ("diff_v1",)),
        ("output_gate", layer.gate_proj is not None and signal_per_noise > 1, ("diff_grouped",)),
    ):
        if is_set and attention in targets:
            raise ValueError(
                f"{name} has {setting}, with which {attention} cannot have the same outputs: "
                f"upcycle {'' if targets == TARGETS else 'to another attention, or '}"
                f"a model without it"
            )
    per_group = layer.num_heads // layer.num_kv_heads
    if attention == "diff_grouped" and (signal_per_noise < 1 or per_group % signal_per_noise):
        raise ValueError(
            f"signal_per_noise must divide the {per_group} query head(s) per key head of {name}, "
            f"because a noise head and its signal heads read the same values; got "
            f"{signal_per_noise}: set another signal_per_noise, or upcycle to diff_v2"
        )


def _converted(config: Any, attention: str, signal_per_noise: int) -> Any:
    """A model's config with every backbone converted."""
    if isinstance(config, BackboneConfig):
        return _converted_backbone(config, attention, signal_per_noise)
    changes = {
        field.name: _converted(value, attention, signal_per_noise)
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(value := getattr(config, field.name))
    }
    return dataclasses.replace(config, **changes)


def _converted_backbone(
    config: BackboneConfig, attention: str, signal_per_noise: int
) -> BackboneConfig:
    """The config of the differential backbone; its feed-forward layers keep their width."""
    kept: dict[str, Any] = {
        "attention": attention,
        "head_dim": config.resolved_head_dim,
        "feed_forward_width": config.resolved_feed_forward_width,
        "cosine_logits": False,
    }
    num_kv_heads = config.num_kv_heads or config.num_heads
    changes: dict[str, dict[str, Any]] = {
        "diff_v1": {
            "num_heads": 2 * config.num_heads,
            "num_kv_heads": 2 * num_kv_heads,
            "lambda_init": LAMBDA,
            "headwise_norm": False,
        },
        "diff_v2": {},
        "diff_grouped": {"signal_per_noise": signal_per_noise},
    }
    return dataclasses.replace(config, **kept, **changes[attention])


Weights = dict[str, Tensor]


def _v1(layer: Attention, own: Weights, signal_per_noise: int, random: torch.Generator) -> Weights:
    """The weights of `diff_v1`: every query and key twice, values `[V + E, V - E]`."""
    new = dict(own)
    for part in ("weight", "bias"):
        for name in ("q_proj", "k_proj"):
            if (key := f"{name}.{part}") in own:
                heads = own[key].unflatten(0, (-1, 1, layer.head_dim))
                new[key] = heads.repeat_interleave(2, dim=1).flatten(0, 2)
        if (key := f"v_proj.{part}") in own:
            values = own[key].unflatten(0, (-1, layer.head_dim))
            size = values.square().mean().sqrt()
            noise = size.cpu() * torch.randn(values.shape, generator=random)
            noise = noise.to(values)
            new[key] = torch.cat([values + noise, values - noise], dim=1).flatten(0, 1)
    # (1 - lambda) (A V + A E) + (1 - lambda) (A V - A E) = A V, since lambda is 1/2.
    columns = own["out_proj.weight"].unflatten(1, (-1, layer.head_dim))
    new["out_proj.weight"] = torch.cat([columns, columns], dim=2).flatten(1)
    if layer.gate_width > 1:  # a gate per element of a head
        gates = own["gate_proj.weight"].unflatten(0, (-1, layer.gate_width))
        new["gate_proj.weight"] = torch.cat([gates, gates], dim=1).flatten(0, 1)
    first, second = (0.1 * torch.randn(layer.head_dim, generator=random) for _ in range(2))
    # Equal products: lambda is lambda_init, and each vector has a gradient.
    pairs = (first, second, first, second)
    new |= {n: x.clone() for n, x in zip(DiffAttentionV1.LAMBDA_NAMES, pairs, strict=True)}
    return new


def _grouped(
    layer: Attention, own: Weights, signal_per_noise: int, random: torch.Generator
) -> Weights:
    """The weights of `diff_grouped`: the noise query of a group is its first signal query."""
    new = dict(own)
    for part in ("weight", "bias"):
        if (key := f"q_proj.{part}") in own:
            heads = own[key].unflatten(0, (-1, signal_per_noise, layer.head_dim))
            new[key] = torch.cat([heads, heads[:, :1]], dim=1).flatten(0, 2)
    columns = own["out_proj.weight"].unflatten(1, (-1, signal_per_noise, layer.head_dim))
    first = columns.sum(dim=2) + columns[:, :, 0]
    new["out_proj.weight"] = torch.cat([first.unsqueeze(2), columns[:, :, 1:]], dim=2).flatten(1)
    dim = own["q_proj.weight"].shape[1]
    new["lambda_proj.weight"] = own["q_proj.weight"].new_zeros(layer.num_heads, dim)
    return new


def _v2(layer: Attention, own: Weights, signal_per_noise: int, random: torch.Generator) -> Weights:
    """The weights of `diff_v2`, which is `diff_grouped` with one signal head per noise head."""
    return _grouped(layer, own, 1, random)


_LAYERS: dict[str, Callable[[Attention, Weights, int, torch.Generator], Weights]] = {
    "diff_v1": _v1,
    "diff_v2": _v2,
    "diff_grouped": _grouped,
}
