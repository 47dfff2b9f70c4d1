"""Gemma 2 (Hugging Face `Gemma2ForCausalLM`): post-norms, softcaps and windows in every second
block."""

import math
from typing import Any

from diffmm.interop import decoders
from diffmm.interop.decoders import LAYER, OURS
from diffmm.interop.family import Family
from diffmm.interop.names import Name, Table
from diffmm.interop.settings import TheirSettings
from diffmm.models import BackboneConfig, TextConfig

GELU_TANH = "gelu_pytorch_tanh"

NORMS = (
    Name(f"{LAYER}.input_layernorm.weight", f"{OURS}.attention_norm.weight"),
    Name(f"{LAYER}.post_attention_layernorm.weight", f"{OURS}.attention_branch.norm.weight"),
    Name(f"{LAYER}.pre_feedforward_layernorm.weight", f"{OURS}.feed_forward_norm.weight"),
    Name(f"{LAYER}.post_feedforward_layernorm.weight", f"{OURS}.feed_forward_branch.norm.weight"),
)


def read_settings(settings: TheirSettings) -> TextConfig:
    """The config of a Gemma 2. The embeddings are multiplied by the square root of the width."""
    settings.only("hidden_activation", GELU_TANH, "the feed-forward layer of Gemma 2 is GEGLU")
    settings.skip("hidden_act")  # only read by Gemma 1
    settings.only("use_bidirectional_attention", False, "a decoder has a causal mask")
    shape = decoders.read_shape(settings, head_dim=256)
    bias = settings.take("attention_bias", bool, False)
    kinds = [
        "full_attention" if index % 2 else "sliding_attention" for index in range(shape["depth"])
    ]
    backbone = BackboneConfig(
        **shape,
        **decoders.read_windows(settings, shape["depth"], kinds),
        attention="softmax",
        norm="zero_centered_rmsnorm",
        post_norm=True,
        feed_forward="geglu_tanh",
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=settings.take("query_pre_attn_scalar", float, 256.0) ** -0.5,
        attention_softcap=settings.nullable("attn_logit_softcapping", float, 50.0),
    )
    return decoders.text_config(
        settings,
        backbone,
        tie_embeddings=settings.take("tie_word_embeddings", bool, True),
        embedding_scale=math.sqrt(backbone.dim),
        logit_softcap=settings.nullable("final_logit_softcapping", float, 30.0),
    )


def write_settings(config: TextConfig) -> dict[str, Any]:
    """The settings of the nearest Gemma 2."""
    backbone = config.backbone
    scale = backbone.attention_scale or backbone.resolved_head_dim**-0.5
    return {
        **decoders.write_shape(config, "gemma2", "Gemma2ForCausalLM"),
        **decoders.write_windows(config),
        "hidden_act": GELU_TANH,
        "hidden_activation": GELU_TANH,
        "attention_bias": backbone.qkv_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": backbone.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def table(config: TextConfig) -> Table:
    """The tensors of a Gemma 2."""
    return decoders.table(config, decoders.attention(config), NORMS, decoders.feed_forward(config))


GEMMA2 = Family(
    "gemma2",
    ("Gemma2ForCausalLM",),
    read_settings,
    write_settings,
    table,
    job=decoders.tokenizer_job,
)
