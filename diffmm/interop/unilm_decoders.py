"""Decoders of microsoft/unilm with the authors' differential attention, version 1 or 2.

The attention modules are those of `diffmm.interop.unilm`, in the decoder of the same repository
(`YOCO/yoco/models/decoder/transformer.py`). Its settings, `params.json`, are read from
`config.json` with `"model_type": "unilm_v1"` or `"unilm_v2"` added. Rotary pairs are interleaved as
in diffmm, so that only names differ.
"""

from functools import partial
from typing import Any

from diffmm.interop import decoders
from diffmm.interop.family import Family, explicit
from diffmm.interop.names import Name, Table
from diffmm.interop.settings import TheirSettings
from diffmm.interop.unilm import NAMES
from diffmm.models import BackboneConfig, TextConfig

LAYER = "layers.{}"
OURS = "backbone.blocks.{}"

HEADS_EACH = {"v1": 2, "v2": 1}
"""diffmm counts a v1 head as the two softmax heads that it replaces."""

AROUND = (
    Name("tok_embeddings.weight", "embedding.weight"),
    Name("norm.weight", "backbone.norm.weight"),
    Name("output.weight", "head.weight"),
    Name(f"{LAYER}.attention_norm.weight", f"{OURS}.attention_norm.weight"),
    Name(f"{LAYER}.ffn_norm.weight", f"{OURS}.feed_forward_norm.weight"),
    Name(f"{LAYER}.feed_forward.w1.weight", f"{OURS}.feed_forward.gate_proj.weight"),
    Name(f"{LAYER}.feed_forward.w3.weight", f"{OURS}.feed_forward.up_proj.weight"),
    Name(f"{LAYER}.feed_forward.w2.weight", f"{OURS}.feed_forward.down_proj.weight"),
)


def read_settings(settings: TheirSettings, variant: str) -> TextConfig:
    """The config of a decoder with attention of this variant. Heads are counted as in
    `diffmm.interop.unilm.load_attention`."""
    settings.skip("max_batch_size", "model_parallel_size", "load_checkpoint")
    each = HEADS_EACH[variant]
    backbone = BackboneConfig(
        dim=settings.take("dim", int),
        depth=settings.take("n_layers", int),
        num_heads=each * settings.take("n_heads", int),
        num_kv_heads=each * settings.take("n_kv_heads", int),
        head_dim=settings.take("head_dim", int),
        attention=f"diff_{variant}",
        norm_eps=settings.take("norm_eps", float),
        feed_forward_width=settings.take("hidden_dim", int),
        rope="1d",
        rope_base=settings.take("rope_theta", float, 10000.0),
        window=settings.take("sliding_window", int, None),
    )
    return TextConfig(
        vocab_size=settings.take("vocab_size", int),
        max_length=settings.take("max_seq_len", int),
        backbone=backbone,
        tie_embeddings=False,
    )


def write_settings(config: TextConfig, variant: str) -> dict[str, Any]:
    """The settings of the nearest decoder with attention of this variant."""
    backbone = explicit(config.backbone)
    assert backbone.num_kv_heads is not None
    return {
        "model_type": f"unilm_{variant}",
        "dim": backbone.dim,
        "n_layers": backbone.depth,
        "n_heads": backbone.num_heads // HEADS_EACH[variant],
        "n_kv_heads": backbone.num_kv_heads // HEADS_EACH[variant],
        "head_dim": backbone.head_dim,
        "hidden_dim": backbone.feed_forward_width,
        "norm_eps": backbone.norm_eps,
        "rope_theta": backbone.rope_base,
        "sliding_window": backbone.window,
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_length,
    }


def table(config: TextConfig, variant: str) -> Table:
    """The tensors of a decoder with attention of this variant."""
    attention = (
        Name(f"{LAYER}.attention.{theirs}", f"{OURS}.attention.{ours}")
        for theirs, ours in NAMES[variant].items()
    )
    return Table((*AROUND, *attention), depth=config.backbone.depth)


UNILM_V1, UNILM_V2 = (
    Family(
        f"unilm_{variant}",
        (),
        partial(read_settings, variant=variant),
        partial(write_settings, variant=variant),
        partial(table, variant=variant),
        job=decoders.tokenizer_job,
    )
    for variant in ("v1", "v2")
)
