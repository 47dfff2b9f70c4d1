"""DiffLlama (Hugging Face `DiffLlamaForCausalLM`): Llama with differential attention, version 1.

Its raw heads are in two halves, one per component (`c * h + i`), where diffmm interleaves them
(`2i + c`); the value of a pair consists of the raw values `g` and `g + K / 2`. Its headwise norm
has no weight: diffmm's is 1 when it is read, and multiplied into the output projection when it is
written, which is exact up to the rounding of that product.
"""

from typing import Any

import torch
from torch import Tensor

from diffmm.interop import decoders
from diffmm.interop.decoders import LAYER, OURS
from diffmm.interop.family import Family
from diffmm.interop.names import Layout, Name, Table, halves_as_pairs
from diffmm.interop.settings import TheirSettings
from diffmm.layers import DiffAttentionV1
from diffmm.models import BackboneConfig, TextConfig


def read_settings(settings: TheirSettings) -> TextConfig:
    """The config of a DiffLlama. A bias of attention is one of all four projections."""
    settings.only("hidden_act", "silu", "the feed-forward layer of DiffLlama is SwiGLU")
    settings.only("mlp_bias", False, "only the projections of attention may have biases")
    settings.skip("lambda_std_dev")  # of initial weights
    shape = decoders.read_shape(settings, rms_norm_eps=1e-5)
    bias = settings.take("attention_bias", bool, False)
    backbone = BackboneConfig(
        **shape,
        attention="diff_v1",
        headwise_norm_eps=shape["norm_eps"],
        qkv_bias=bias,
        out_bias=bias,
    )
    tied = settings.take("tie_word_embeddings", bool, False)
    return decoders.text_config(settings, backbone, tie_embeddings=tied)


def write_settings(config: TextConfig) -> dict[str, Any]:
    """The settings of the nearest DiffLlama."""
    return {
        **decoders.write_shape(config, "diffllama", "DiffLlamaForCausalLM"),
        "attention_bias": config.backbone.qkv_bias,
    }


def halves_as_components(head_dim: int) -> Layout:
    """The layout of raw heads, `[2 * h * D, ...]`: in two halves there, interleaved here."""
    return Layout(
        lambda x: x.unflatten(0, (2, -1, head_dim)).transpose(0, 1).flatten(0, 2),
        lambda x: x.unflatten(0, (-1, 2, head_dim)).transpose(0, 1).flatten(0, 2),
    )


def chained(first: Layout, second: Layout) -> Layout:
    """The layout that applies `first` and then `second` to their tensor."""
    return Layout(
        lambda x: second.to_ours(first.to_ours(x)),
        lambda x: first.to_theirs(second.to_theirs(x)),
    )


def folded_norm(width: int) -> Layout:
    """The layout of the output projection, `[dim, h * width]`, of which each head's columns are
    multiplied by the weight of the headwise norm, `[width]`."""

    def fold(weight: Tensor, norm: Tensor) -> Tensor:
        exact = weight.double() * norm.double().repeat(weight.shape[1] // width)
        return exact.to(weight.dtype)

    return Layout(lambda x: (x, torch.ones(width, dtype=x.dtype, device=x.device)), fold)


def attention(config: TextConfig) -> tuple[Name, ...]:
    """The tensors of differential attention."""
    backbone = config.backbone
    head_dim = backbone.resolved_head_dim
    values = halves_as_components(head_dim)
    rotated = chained(values, halves_as_pairs(head_dim))
    theirs, ours = f"{LAYER}.self_attn", f"{OURS}.attention"
    kinds = ("weight", "bias") if backbone.qkv_bias else ("weight",)
    bias = (Name(f"{theirs}.o_proj.bias", f"{ours}.out_proj.bias"),) if backbone.out_bias else ()
    return (
        *(
            Name(f"{theirs}.{part}_proj.{kind}", f"{ours}.{part}_proj.{kind}", layout)
            for part, layout in (("q", rotated), ("k", rotated), ("v", values))
            for kind in kinds
        ),
        Name(
            f"{theirs}.o_proj.weight",
            (f"{ours}.out_proj.weight", f"{ours}.norm.weight"),
            folded_norm(2 * head_dim),
        ),
        *bias,
        *(Name(f"{theirs}.{name}", f"{ours}.{name}") for name in DiffAttentionV1.LAMBDA_NAMES),
    )


def table(config: TextConfig) -> Table:
    """The tensors of a DiffLlama."""
    return decoders.table(
        config, attention(config), decoders.pre_norms(), decoders.feed_forward(config)
    )


DIFFLLAMA = Family(
    "diffllama",
    ("DiffLlamaForCausalLM",),
    read_settings,
    write_settings,
    table,
    job=decoders.tokenizer_job,
)
