"""Qwen 2, 2.5 and 3 (Hugging Face `Qwen2ForCausalLM`, `Qwen3ForCausalLM`), without experts."""

from typing import Any

from diffmm.interop import decoders
from diffmm.interop.family import Family
from diffmm.interop.settings import TheirSettings
from diffmm.models import BackboneConfig, TextConfig

FIRST_WINDOW = 28
"""First block with a window, in files that do not set `max_window_layers`."""

HEAD_DIM = 128
"""The head dimension of files of Qwen 3 that do not set it."""


def read_qwen2(settings: TheirSettings) -> TextConfig:
    """The config of a Qwen 2: queries, keys and values have biases."""
    return _read(settings, decoders.read_shape(settings), qkv_bias=True)


def read_qwen3(settings: TheirSettings) -> TextConfig:
    """The config of a Qwen 3: queries and keys have norms; a bias is one of all projections."""
    bias = settings.take("attention_bias", bool, False)
    shape = decoders.read_shape(settings, head_dim=HEAD_DIM)
    return _read(settings, shape, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _read(settings: TheirSettings, shape: dict[str, Any], **more: Any) -> TextConfig:
    settings.only("hidden_act", "silu", "the feed-forward layer of Qwen is SwiGLU")
    settings.only("use_mrope", False, "positions are those of text")
    first = settings.take("max_window_layers", int, FIRST_WINDOW)
    kinds = [
        "sliding_attention" if index >= first else "full_attention"
        for index in range(shape["depth"])
    ]
    if not settings.take("use_sliding_window", bool, False):
        settings.skip("sliding_window", "layer_types")
        windows = {}
    else:
        windows = decoders.read_windows(settings, shape["depth"], kinds)
    backbone = BackboneConfig(**shape, **more, **windows, attention="softmax")
    tied = settings.take("tie_word_embeddings", bool, False)
    return decoders.text_config(settings, backbone, tie_embeddings=tied)


def write_qwen2(config: TextConfig) -> dict[str, Any]:
    """The settings of the nearest Qwen 2."""
    return {
        **decoders.write_shape(config, "qwen2", "Qwen2ForCausalLM"),
        **decoders.write_windows(config),
        "use_sliding_window": config.backbone.window is not None,
    }


def write_qwen3(config: TextConfig) -> dict[str, Any]:
    """The settings of the nearest Qwen 3."""
    return {
        **decoders.write_shape(config, "qwen3", "Qwen3ForCausalLM"),
        **decoders.write_windows(config),
        "use_sliding_window": config.backbone.window is not None,
        "attention_bias": config.backbone.qkv_bias,
    }


QWEN2 = Family(
    "qwen2",
    ("Qwen2ForCausalLM",),
    read_qwen2,
    write_qwen2,
    decoders.llama_table,
    job=decoders.tokenizer_job,
)
QWEN3 = Family(
    "qwen3",
    ("Qwen3ForCausalLM",),
    read_qwen3,
    write_qwen3,
    decoders.llama_table,
    job=decoders.tokenizer_job,
)
