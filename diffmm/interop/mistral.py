"""Mistral (Hugging Face `MistralForCausalLM`): all blocks have the same window, or none has one."""

from typing import Any

from diffmm.interop import decoders
from diffmm.interop.family import Family
from diffmm.interop.settings import TheirSettings
from diffmm.models import BackboneConfig, TextConfig

DEFAULT_WINDOW = 4096
"""The window of files that do not set it; null means none."""


def read_settings(settings: TheirSettings) -> TextConfig:
    """The config of a Mistral, which has no biases."""
    settings.only("hidden_act", "silu", "the feed-forward layer of Mistral is SwiGLU")
    settings.only("attention_bias", False, "Mistral has no biases")
    backbone = BackboneConfig(
        **decoders.read_shape(settings),
        attention="softmax",
        window=settings.nullable("sliding_window", int, DEFAULT_WINDOW),
    )
    tied = settings.take("tie_word_embeddings", bool, False)
    return decoders.text_config(settings, backbone, tie_embeddings=tied)


def write_settings(config: TextConfig) -> dict[str, Any]:
    """The settings of the nearest Mistral."""
    return {
        **decoders.write_shape(config, "mistral", "MistralForCausalLM"),
        "sliding_window": config.backbone.window,
    }


MISTRAL = Family(
    "mistral",
    ("MistralForCausalLM",),
    read_settings,
    write_settings,
    decoders.llama_table,
    job=decoders.tokenizer_job,
)
