"""Differential models from softmax models, with the same outputs at the start.

In the differential attentions both maps start as the map of the softmax model, and lambda as 1/2,
so that

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

`dex` keeps one map and subtracts from the output `o` of every head a learned projection of it (see
`diffmm.layers.attention.HeadProjections`). `F` starts as the identity and lambda as 1/2, so that

    o - lambda F o = o / 2,

and the output projection is doubled here, too. `F` is linear, so that the output projection can
take it over after training: `merged` makes a plain softmax model of one with `dex`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.checks import check_choice
from diffmm.layers import Attention, DiffAttentionV1, SoftmaxAttention
from diffmm.layers.attention import HeadProjections
from diffmm.layers.norm import CosineNorm
from diffmm.models.backbone import BackboneConfig
from diffmm.models.description import describe, unwrap

DIFFERENTIAL = ("diff_v1", "diff_v2", "diff_grouped")
"""The differential attentions that softmax attention can become."""

TARGETS = (*DIFFERENTIAL, "dex")
"""What a softmax model can become."""

LAMBDA = 0.5
"""Lambda at the start: that of `sigmoid(0)`."""


Weights = dict[str, Tensor]


def upcycle(
    model: nn.Module, attention: str, *, signal_per_noise: int = 4, seed: int = 0
) -> nn.Module:
    """Create a differential model with the outputs of a softmax model.

    The new model has the softmax model's weights except in its attention layers (see
    `diffmm.interop.upcycle`), and more parameters: the queries of the noise maps, in `diff_v1` also
    their keys and twice as many values; with `dex`, a matrix and a number per head.

    Args:
        model: A model of `diffmm.models` with softmax attention; it is not changed.
        attention: `"diff_v1"`, `"diff_v2"`, `"diff_grouped"` or `"dex"`.
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

    def converted(name: str, layer: Attention, own: Weights) -> Weights:
        _check(name, layer, attention, signal_per_noise)
        return _LAYERS[attention](layer, own, signal_per_noise, random)

    random = torch.Generator().manual_seed(seed)
    return _rebuilt(model, converted, lambda config: _backbone(config, attention, signal_per_noise))


def merged(model: nn.Module) -> nn.Module:
    """Create a plain softmax model with the outputs of one with `dex`: the output projection of
    each layer takes over the projections of its heads.

    Args:
        model: A model of `diffmm.models` whose softmax attention has `dex`; it is not changed.

    Returns:
        The softmax model, in evaluation mode, with the same job.

    Raises:
        ValueError: If a layer has no `dex`, or gates the elements of the projected heads.

    >>> model = diffmm.create_model("text/stdlib_tiny", attention="softmax").eval()
    >>> again = diffmm.interop.upcycle.merged(diffmm.interop.upcycle.upcycle(model, "dex"))
    >>> all(torch.equal(one, model.get_parameter(name)) for name, one in again.named_parameters())
    True
    """
    return _rebuilt(model, _merged_layer, lambda config: dataclasses.replace(config, dex=False))


def _rebuilt(
    model: nn.Module,
    converted: Callable[[str, Attention, Weights], Weights],
    backbone: Callable[[BackboneConfig], BackboneConfig],
) -> nn.Module:
    """A model whose attention layers and backbone configs are converted; all else is the same."""
    model = unwrap(model)
    describe(model)  # checks its class
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, Attention):
            prefix = f"{name}."
            names = [each for each in state if each.startswith(prefix)]
            own = {each.removeprefix(prefix): state.pop(each) for each in names}
            new = converted(name, layer, own)
            dtype = layer.q_proj.weight.dtype
            state |= {f"{prefix}{each}": tensor.to(dtype) for each, tensor in new.items()}
    config: Any = model.config
    twin: nn.Module = type(model)(_converted(config, backbone))
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
    if layer.head_projections is not None:
        raise ValueError(
            f"{name} already has dex: make it plain softmax first, with --to softmax or "
            f"diffmm.interop.upcycle.merged"
        )
    for setting, is_set, targets in (
        ("cosine_logits", isinstance(layer.q_norm, CosineNorm), DIFFERENTIAL),
        ("attention_softcap", layer.softcap is not None, DIFFERENTIAL),
        ("exclusive", layer.exclusive, ("diff_v1",)),
        ("output_gate", layer.gate_proj is not None and signal_per_noise > 1, ("diff_grouped",)),
    ):
        if is_set and attention in targets:
            raise ValueError(
                f"{name} has {setting}, with which {attention} cannot have the same outputs: "
                f"upcycle to {'dex' if targets == DIFFERENTIAL else 'another attention'}, or a "
                f"model without it"
            )
    per_group = layer.num_heads // layer.num_kv_heads
    if attention == "diff_grouped" and (signal_per_noise < 1 or per_group % signal_per_noise):
        raise ValueError(
            f"signal_per_noise must divide the {per_group} query head(s) per key head of {name}, "
            f"because a noise head and its signal heads read the same values; got "
            f"{signal_per_noise}: set another signal_per_noise, or upcycle to diff_v2"
        )


def _converted(config: Any, backbone: Callable[[BackboneConfig], BackboneConfig]) -> Any:
    """A model's config with every backbone converted."""
    if isinstance(config, BackboneConfig):
        return backbone(config)
    changes = {
        field.name: _converted(value, backbone)
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(value := getattr(config, field.name))
    }
    return dataclasses.replace(config, **changes)


def _backbone(config: BackboneConfig, attention: str, signal_per_noise: int) -> BackboneConfig:
    """The config of the upcycled backbone; its feed-forward layers keep their width."""
    kept: dict[str, Any] = {
        "head_dim": config.resolved_head_dim,
        "feed_forward_width": config.resolved_feed_forward_width,
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
        "dex": {"attention": "softmax", "dex": True},
    }
    return dataclasses.replace(config, **{"attention": attention, **kept, **changes[attention]})


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


def _dex(layer: Attention, own: Weights, signal_per_noise: int, random: torch.Generator) -> Weights:
    """The weights with `dex`: those of softmax, and projections that halve every head."""
    projections = HeadProjections(layer.num_heads, layer.head_dim).to(own["out_proj.weight"].device)
    new = {f"head_projections.{name}": tensor for name, tensor in projections.state_dict().items()}
    return own | new | {"out_proj.weight": own["out_proj.weight"] / (1.0 - LAMBDA)}


def _merged_layer(name: str, layer: Attention, own: Weights) -> Weights:
    """The weights of softmax attention whose output projection includes those of `dex`."""
    projections = getattr(layer, "head_projections", None)
    if projections is None:
        raise ValueError(f"{name} has no dex that its output projection could take over")
    if layer.gate_width > 1:
        raise ValueError(
            f"{name} has output_gate='element', which follows the projections of dex: its "
            f"output projection cannot take them over"
        )
    columns = own["out_proj.weight"].unflatten(1, (-1, layer.head_dim))
    new = {each: tensor for each, tensor in own.items() if not each.startswith("head_projections.")}
    matrices = projections.matrices().detach()
    product = torch.einsum("dhf,hfe->dhe", columns.double(), matrices.double())
    return new | {"out_proj.weight": product.flatten(1)}


_LAYERS: dict[str, Callable[[Attention, Weights, int, torch.Generator], Weights]] = {
    "diff_v1": _v1,
    "diff_v2": _v2,
    "diff_grouped": _grouped,
    "dex": _dex,
}
