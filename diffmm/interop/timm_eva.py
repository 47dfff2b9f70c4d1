"""timm's `Eva` with the rotary positions of DINOv3.

timm rotates the dimensions `(j, j + D/2)`; its keys have no bias.
"""

from typing import Any

from torch import nn

from diffmm.interop import timm_vit
from diffmm.interop.names import SAME, Name, Table, fused, halves_as_pairs
from diffmm.interop.settings import TheirSettings
from diffmm.interop.timm_vit import BLOCK, OURS, both
from diffmm.models import BackboneConfig, ImageConfig


def read_model(model: Any, settings: TheirSettings) -> ImageConfig:
    """The config of a model of timm."""
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
    from timm.models.eva import EvaAttention, EvaBlock

    block, rope = model.blocks[0], model.rope
    if type(rope) is not RotaryEmbeddingDinoV3:
        settings.refuse("rope_type", None, "only 'dinov3' in models of timm's class Eva")
    if rope.grid_indexing != "ij":
        settings.refuse("rope_grid_indexing", rope.grid_indexing, "only 'ij', rows first")
    if type(block) is not EvaBlock or type(block.attn) is not EvaAttention:
        settings.refuse("attn_type", type(block.attn).__name__, "only EvaAttention with pre-norms")
    attention = block.attn
    for name, given, known in (
        ("use_abs_pos_emb", model.pos_embed is not None, False),
        ("rope_rotate_half", attention.rotate_half, True),
        ("qkv_fused", attention.qkv is not None, True),
        ("scale_attn_inner", not isinstance(attention.norm, nn.Identity), False),
        ("gated_attn", attention.gate is not None, False),
        ("swiglu_align_to=0", hasattr(block.mlp, "gate_last"), False),
        ("attn_pool", model.attn_pool is not None, False),
    ):
        if given != known:
            settings.refuse(name, given, f"only {known} with the rotary positions of DINOv3")
    backbone = BackboneConfig(
        dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        attention="softmax",
        **timm_vit.read_norms(model, settings),
        final_norm=not isinstance(model.norm, nn.Identity),
        rope="2d",
        rope_base=rope.temperature,
        qkv_bias=False if attention.q_bias is None else "qv",
        out_bias=attention.proj.bias is not None,
        **timm_vit.read_feed_forward(block.mlp, settings),
        layer_scale=None if block.gamma_1 is None else float(block.init_values),
    )
    return ImageConfig(
        backbone=backbone,
        rope_coordinates="normalized",
        **timm_vit.read_encoder(model, settings),
    )


def write_arguments(config: ImageConfig) -> dict[str, Any]:
    """The settings of the nearest model of timm."""
    backbone = config.backbone
    gated = backbone.feed_forward == "swiglu"
    arguments = {
        **timm_vit.write_encoder(config),
        "num_heads": backbone.num_heads,
        "mlp_ratio": timm_vit.mlp_ratio(backbone),
        "qkv_bias": backbone.qkv_bias == "qv",
        "init_values": backbone.layer_scale,
        "num_reg_tokens": config.num_reg_tokens,
        "rope_temperature": backbone.rope_base,
        "use_pre_transformer_norm": config.pre_norm,
        "use_post_transformer_norm": backbone.final_norm,
        "use_fc_norm": config.pool_norm,
        "swiglu_mlp": gated,
        "swiglu_align_to": 1 if gated else 0,
    }
    return {
        "architecture": "vit_small_patch16_dinov3",
        "num_classes": config.num_classes,
        "model_args": arguments,
    }


def table(config: ImageConfig) -> Table:
    """The tensors of a model."""
    backbone = config.backbone
    width, norms = backbone.num_heads * backbone.resolved_head_dim, timm_vit.norm_kinds(backbone)
    rotated = halves_as_pairs(backbone.resolved_head_dim)
    attention, feed_forward = f"{OURS}.attention", f"{OURS}.feed_forward"
    names = [
        *timm_vit.around_blocks(config),
        *both(f"{BLOCK}.norm1", f"{OURS}.attention_norm", norms),
        *both(f"{BLOCK}.norm2", f"{OURS}.feed_forward_norm", norms),
        Name(
            f"{BLOCK}.attn.qkv.weight",
            tuple(f"{attention}.{part}_proj.weight" for part in "qkv"),
            fused([width] * 3, [rotated, rotated, SAME]),
        ),
        *both(f"{BLOCK}.attn.proj", f"{attention}.out_proj"),
    ]
    if backbone.qkv_bias:
        names.append(Name(f"{BLOCK}.attn.q_bias", f"{attention}.q_proj.bias", rotated))
        names.append(Name(f"{BLOCK}.attn.v_bias", f"{attention}.v_proj.bias"))
    parts = {"gate": "fc1_g", "up": "fc1_x", "down": "fc2"}
    if backbone.feed_forward != "swiglu":
        parts = {"up": "fc1", "down": "fc2"}
    for ours, theirs in parts.items():
        names += both(f"{BLOCK}.mlp.{theirs}", f"{feed_forward}.{ours}_proj")
    if backbone.layer_scale is not None:
        names.append(Name(f"{BLOCK}.gamma_1", f"{OURS}.attention_branch.scale"))
        names.append(Name(f"{BLOCK}.gamma_2", f"{OURS}.feed_forward_branch.scale"))
    return Table(tuple(names), depth=backbone.depth)
