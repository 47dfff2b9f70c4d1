"""Llama (Hugging Face `LlamaForCausalLM`): versions 1 to 3.3, TinyLlama, SmolLM, Yi and others."""

from typing import Any

from diffmm.interop import decoders
from diffmm.interop.family import Family
from diffmm.interop.settings import TheirSettings
from diffmm.models import BackboneConfig, TextConfig


def read_settings(settings: TheirSettings) -> TextConfig:
    """The config of a Llama. A bias of attention is one of all four projections."""
    settings.only("hidden_act", "silu", "the feed-forward layer of Llama is SwiGLU")
    settings.only("rope_interleaved", False, "queries and keys are rotated in halves")
    bias = settings.take("attention_bias", bool, False)
    backbone = BackboneConfig(
        **decoders.read_shape(settings),
        attention="softmax",
        qkv_bias=bias,
        out_bias=bias,
        feed_forward_bias=settings.take("mlp_bias", bool, False),
    )
    tied = settings.take("tie_word_embeddings", bool, False)
    return decoders.text_config(settings, backbone, tie_embeddings=tied)


def write_settings(config: TextConfig) -> dict[str, Any]:
    """The settings of the nearest Llama."""
    return {
        **decoders.write_shape(config, "llama", "LlamaForCausalLM"),
        "attention_bias": config.backbone.qkv_bias,
        "mlp_bias": config.backbone.feed_forward_bias,
    }


LLAMA = Family(
    "llama",
    ("LlamaForCausalLM",),
    read_settings,
    write_settings,
    decoders.llama_table,
    job=decoders.tokenizer_job,
)
