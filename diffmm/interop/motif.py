"""Motif 2.6B and Motif 2 12.7B (`MotifForCausalLM`, published with code of their own).

Differential attention, version 1, with PolyNorm in the feed-forward layers. In Motif 2 several
heads share a second query (grouped differential attention, Lim et al. 2025). The initial lambda of
the first layer is `lambda_init_at(-1)`. Written from public descriptions and ports of the models,
whose own code was not run.
"""

from typing import Any

from diffmm.interop import decoders
from diffmm.interop.decoders import LAYER, OURS
from diffmm.interop.family import Family
from diffmm.interop.names import SAME, Name, Table, halves_as_pairs
from diffmm.interop.settings import TheirSettings
from diffmm.layers import DiffAttentionV1
from diffmm.models import BackboneConfig, TextConfig


def read_settings(settings: TheirSettings) -> TextConfig:
    """The config of a Motif; with `num_noise_heads`, of a Motif 2, whose `num_attention_heads`
    count all raw query heads."""
    settings.only("hidden_act", "poly_norm", "the feed-forward layer of Motif is PolyNormGLU")
    settings.only("use_sliding_window", False, "all layers have full attention")
    settings.only("k_ratio", 1, "a key group has one key per map")
    # Without `use_sliding_window` the first two have no effect, and the last names a kernel.
    settings.skip("sliding_window", "max_window_layers", "fused_rope")
    shape = decoders.read_shape(settings)
    num_noise = settings.take("num_noise_heads", int, 0)
    if num_noise:
        num_signal = shape["num_heads"] - num_noise
        if num_signal < 1 or num_signal % num_noise:
            settings.refuse("num_noise_heads", num_noise, "a divisor of the other heads")
        shape["head_dim"] = shape["head_dim"] or shape["dim"] // shape["num_heads"]
        shape |= {"num_heads": 2 * num_signal, "heads_per_noise": num_signal // num_noise}
    bias = settings.take("use_bias", bool, False)
    backbone = BackboneConfig(
        **shape,
        attention="diff_v1",
        lambda_layer_offset=-1,
        headwise_norm_eps=settings.take("attn_rms_norm_eps", float, 1e-5),
        feed_forward="polynorm_glu",
        qkv_bias=bias,
        out_bias=bias,
        feed_forward_bias=bias,
    )
    tied = settings.take("tie_word_embeddings", bool, False)
    return decoders.text_config(settings, backbone, tie_embeddings=tied)


def write_settings(config: TextConfig) -> dict[str, Any]:
    """The settings of the nearest Motif."""
    backbone = config.backbone
    values = {
        **decoders.write_shape(config, "motif", "MotifForCausalLM"),
        "hidden_act": "poly_norm",
        "attn_rms_norm_eps": backbone.headwise_norm_eps,
        "use_bias": backbone.qkv_bias,
    }
    if backbone.heads_per_noise > 1:
        num_signal = backbone.num_heads // 2
        num_noise = num_signal // backbone.heads_per_noise
        values |= {
            "num_attention_heads": num_signal + num_noise,
            "num_noise_heads": num_noise,
            "k_ratio": 1,
        }
    return values


def table(config: TextConfig) -> Table:
    """The tensors of a Motif; raw heads and values are in diffmm's order."""
    backbone = config.backbone
    rotated = halves_as_pairs(backbone.resolved_head_dim)
    kinds = ("weight", "bias") if backbone.qkv_bias else ("weight",)
    theirs, ours = f"{LAYER}.self_attn", f"{OURS}.attention"
    attention = (
        *(
            Name(f"{theirs}.{part}_proj.{kind}", f"{ours}.{name}_proj.{kind}", layout)
            for part, name, layout in (
                ("q", "q", rotated),
                ("k", "k", rotated),
                ("v", "v", SAME),
                ("o", "out", SAME),
            )
            for kind in kinds
        ),
        Name(f"{theirs}.subln.weight", f"{ours}.norm.weight"),
        *(Name(f"{theirs}.{name}", f"{ours}.{name}") for name in DiffAttentionV1.LAMBDA_NAMES),
    )
    activation = tuple(
        Name(f"{LAYER}.mlp.act_fn.{kind}", f"{OURS}.feed_forward.activation.{kind}")
        for kind in ("weight", "bias")
    )
    return decoders.table(
        config, attention, decoders.pre_norms(), decoders.feed_forward(config), activation
    )


MOTIF = Family(
    "motif",
    ("MotifForCausalLM",),
    read_settings,
    write_settings,
    table,
    job=decoders.tokenizer_job,
)
