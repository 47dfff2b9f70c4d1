"""Gradients of compiled decoders in bfloat16 compared with uncompiled float32, per parameter."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffmm.models import BackboneConfig, TextConfig, TextModel


def make_decoder(
    attention: str,
    *,
    head_dim: int,
    causal: bool = True,
    grouped: bool = False,
    backend: str = "auto",
    dim: int = 512,
    depth: int = 3,
    length: int = 1024,
) -> TextModel:
    """A decoder with non-uniform attention maps.

    Queries and keys are initialized three times larger than for training: with the usual
    initialization, all maps are nearly uniform, their difference is rounding error, and the
    gradient of lambda is only noise.
    """
    num_heads = dim // head_dim
    backbone = BackboneConfig(
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2 if grouped else None,
        attention=attention,
        rope="1d",
        backend=backend,
    )
    torch.manual_seed(0)
    model = TextModel(
        TextConfig(vocab_size=512, max_length=length, causal=causal, backbone=backbone)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(3.0)
    return model


def gradients(
    model: TextModel, forward: Callable[[Tensor], Tensor], tokens: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The gradient of every parameter for one next-token loss, computed in `dtype` by autocast."""
    model.zero_grad()
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        logits = forward(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """`|found - truth| / |truth|` per parameter; NaN for a missing gradient.

    Errors of lambda's parameters are relative to the largest gradient among them: the gradient of
    one number per layer is a sum over all tokens and heads, whose own norm may be close to zero.
    """
    largest = max([g.norm() for name, g in truth.items() if "lambda" in name], default=None)

    def error(name: str) -> float:
        if name not in found:
            return torch.nan
        size = largest if largest is not None and "lambda" in name else truth[name].norm()
        return ((found[name] - truth[name]).norm() / size).item()

    return {name: error(name) for name in truth}


def worst(errors: dict[str, float], *, lambdas: bool) -> float:
    """The largest error among the lambda parameters, or among all others; NaN if one is NaN."""
    chosen = [error for name, error in errors.items() if ("lambda" in name) == lambdas]
    return torch.tensor([0.0, *chosen]).max().item()
