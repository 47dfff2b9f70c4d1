"""timm's `VisionTransformer`: ViT, DeiT (also distilled), augreg, SigLIP, DINOv2, `vit_d*`, and any
with `attn_layer="diff"` or parallel blocks.

timm's differential attention is version 1 in diffmm's order of heads; its `num_heads` counts
differential heads, of which diffmm counts both components.
"""

from typing import Any

from torch import nn

from diffmm.interop.names import SAME, Layout, Name, Table, fused
from diffmm.interop.settings import TheirSettings
from diffmm.layers import DiffAttentionV1
from diffmm.models import BackboneConfig, ImageConfig
from diffmm.models.encoder import EncoderConfig

BLOCK, OURS = "blocks.{}", "backbone.blocks.{}"

CARRIERS = {
    ("gelu", None): "vit_base_patch16_224",
    ("gelu", 1e-5): "vit_base_patch16_clip_224",
    ("swiglu", None): "vit_giant_patch14_dinov2",
}
"""Architectures of timm whose feed-forward layer, or norm with this `eps`, no argument selects."""

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}

UNBATCHED = Layout(lambda x: x.squeeze(0), lambda x: x.unsqueeze(0))
"""The layout of special tokens and latent queries, which in timm have an axis for the batch."""

SCALAR = Layout(lambda x: x.reshape(1), lambda x: x.reshape(()))


def read_model(model: Any, settings: TheirSettings) -> ImageConfig:
    """The config of a model of timm."""
    from timm.models.vision_transformer import (
        Block,
        DiffAttention,
        DiffParallelScalingBlock,
        ParallelScalingBlock,
    )

    block = model.blocks[0]
    parallel = isinstance(block, DiffParallelScalingBlock | ParallelScalingBlock)
    if not parallel and type(block) is not Block:
        settings.refuse("block_fn", type(block).__name__, "only Block and ParallelScalingBlock")
    attention = block if parallel else block.attn
    differential = isinstance(attention, DiffAttention | DiffParallelScalingBlock)
    if parallel and (block.out_proj is not None) != differential:
        settings.refuse("fuse_out_proj", True, "only False without differential attention")
    if not parallel and not isinstance(attention.norm, nn.Identity):
        settings.refuse("scale_attn_norm", True, "only False: it has no norm of all heads")
    if getattr(attention, "gate", None) is not None:
        settings.refuse("gated", True, "only False: its gate has no bias")
    head_dim = attention.head_dim
    backbone = BackboneConfig(
        dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=attention.num_heads * (2 if differential else 1),
        head_dim=head_dim,
        attention="diff_v1" if differential else "softmax",
        dual_lambda=differential and bool(attention.dual_lambda),
        **read_norms(model, settings),
        parallel=parallel,
        final_norm=not isinstance(model.norm, nn.Identity),
        **(_parallel_projections(block) if parallel else _projections(block, settings)),
        qk_norm=_qk_norm(attention.q_norm),
        layer_scale=_layer_scale(block.ls if parallel else block.ls1),
    )
    return ImageConfig(backbone=backbone, **read_encoder(model, settings))


def read_norms(model: nn.Module, settings: TheirSettings) -> dict[str, Any]:
    """The kind and `eps` that all norms of a model have, except those of differential heads."""
    from timm.layers import LayerNorm, RmsNorm

    kinds = {nn.LayerNorm: "layernorm", LayerNorm: "layernorm", RmsNorm: "rmsnorm"}
    found = {
        (kinds[type(norm)], norm.eps)
        for name, norm in model.named_modules()
        if type(norm) in kinds and not name.endswith("sub_norm")
    }
    if len(found) != 1:
        settings.refuse("norm_layer", sorted(found), "only norms of one kind and eps")
    kind, eps = found.pop()
    return {"norm": kind, "norm_eps": eps}


def read_encoder(model: Any, settings: TheirSettings) -> dict[str, Any]:
    """What is around the blocks, as fields of `ImageConfig`."""
    distilled = hasattr(model, "dist_token")
    pools = {"token": "cls_dist" if distilled else "cls", "avg": "mean", "map": "map"}
    if model.global_pool not in pools:
        settings.refuse("global_pool", model.global_pool, f"only {', '.join(pools)}")
    pool = pools[model.global_pool]
    cls_token = model.cls_token is not None
    num_reg = 0 if model.reg_token is None else model.reg_token.shape[1]
    patches = model.patch_embed
    fields: dict[str, Any] = {
        "image_size": patches.img_size,
        "patch_size": patches.patch_size,
        "in_channels": patches.proj.in_channels,
        "ignore_remainder": any(
            side % step for side, step in zip(patches.img_size, patches.patch_size, strict=True)
        ),
        "patch_bias": patches.proj.bias is not None,
        "num_classes": model.num_classes,
        "cls_token": cls_token,
        "dist_token": distilled,
        "num_reg_tokens": num_reg,
        "pool": pool,
        "head": "distilled" if distilled else "linear",
        "pool_norm": not isinstance(model.fc_norm, nn.Identity),
        "learned_positions": model.pos_embed is not None,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
    }
    if pool in ("mean", "map"):
        fields["pool_prefix_tokens"] = bool(getattr(model, "pool_include_prefix", False))
    if model.pos_embed is not None:
        fields["prefix_positions"] = not model.no_embed_class
    if pool == "map":
        fields["pool_heads"] = model.attn_pool.num_heads
        fields["pool_width"] = model.attn_pool.mlp.fc1.out_features
    return fields


def read_feed_forward(mlp: Any, settings: TheirSettings) -> dict[str, Any]:
    """The feed-forward layer, as fields of `BackboneConfig`."""
    from timm.layers import GluMlp, Mlp, SwiGLU

    if not isinstance(mlp.norm, nn.Identity):
        settings.refuse("scale_mlp_norm", True, "only False: it has no norm of the hidden width")
    if type(mlp) is Mlp:
        kind, width, bias = activation(mlp.act), mlp.fc1.out_features, mlp.fc1.bias is not None
    elif type(mlp) in (GluMlp, SwiGLU) and isinstance(mlp.act, nn.SiLU):
        first = mlp.fc1_g if type(mlp) is SwiGLU else mlp.fc1
        kind, width, bias = "swiglu", mlp.fc2.in_features, first.bias is not None
    else:
        kind, width, bias = None, 0, False
    if kind is None:
        settings.refuse(
            "mlp_layer",
            f"{type(mlp).__name__} with {type(mlp.act).__name__}",
            f"only Mlp with {', '.join(ACTIVATIONS)}, and SwiGLU",
        )
    return {"feed_forward": kind, "feed_forward_width": width, "feed_forward_bias": bias}


def activation(module: nn.Module) -> str | None:
    """The name of an activation of timm, or None if diffmm does not have it."""
    from timm.layers.activations import GELU, GELUTanh, QuickGELU

    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}.get(type(module))


def _projections(block: Any, settings: TheirSettings) -> dict[str, Any]:
    return {
        "qkv_bias": block.attn.qkv.bias is not None,
        "out_bias": block.attn.proj.bias is not None,
        **read_feed_forward(block.mlp, settings),
    }


def _parallel_projections(block: Any) -> dict[str, Any]:
    """The projections of a parallel block. If those of the output are fused, their one bias is that
    of the feed-forward layer."""
    is_fused = block.out_proj is not None
    out = block.out_proj if is_fused else block.attn_out_proj
    return {
        "qkv_bias": block.in_proj.bias is not None,
        "out_bias": out.bias is not None and not is_fused,
        "feed_forward": activation(block.mlp_act),
        "feed_forward_width": block.in_split[0],
        "feed_forward_bias": out.bias is not None,
    }


def _qk_norm(norm: nn.Module) -> Any:
    if isinstance(norm, nn.Identity):
        return False
    return "layernorm" if isinstance(norm, nn.LayerNorm) else True


def _layer_scale(module: Any) -> float | None:
    return None if isinstance(module, nn.Identity) else float(module.init_values)


def write_arguments(config: ImageConfig) -> dict[str, Any]:
    """The settings of the nearest model of timm.

    Raises:
        ValueError: If it has lambda of two numbers, which no setting of timm's selects.
    """
    backbone = config.backbone
    if backbone.dual_lambda:
        raise ValueError(
            "timm has no setting for dual_lambda=True: its folders cannot say that a model has it"
        )
    differential = backbone.attention == "diff_v1"
    activation_layer = ACTIVATIONS.get(backbone.feed_forward, "gelu")
    arguments: dict[str, Any] = {
        **write_encoder(config),
        "num_heads": backbone.num_heads // (2 if differential else 1),
        "mlp_ratio": mlp_ratio(backbone),
        "qkv_bias": backbone.qkv_bias,
        "qk_norm": bool(backbone.qk_norm),
        "proj_bias": backbone.feed_forward_bias,
        "init_values": backbone.layer_scale or 0.0,
        "reg_tokens": config.num_reg_tokens,
        "pre_norm": config.pre_norm,
        "final_norm": backbone.final_norm or config.pool_norm,
        "fc_norm": config.pool_norm,
    }
    if config.pool in ("mean", "map"):
        arguments["pool_include_prefix"] = config.pools_prefix_tokens
    if backbone.norm == "rmsnorm":
        arguments["norm_layer"] = "rmsnorm"
    if backbone.parallel:
        name = f"vit_{'dpwee' if differential else 'pwee'}_patch16_reg1_gap_256"
    elif config.head == "distilled":
        name = "deit_base_distilled_patch16_224"
        for unknown in ("reg_tokens", "pre_norm", "fc_norm", "final_norm"):
            del arguments[unknown]
    else:
        gated = backbone.feed_forward == "swiglu"
        eps = 1e-5 if backbone.norm == "layernorm" and backbone.norm_eps == 1e-5 else None
        kind = "swiglu" if gated else "gelu"
        name = CARRIERS.get((kind, eps), CARRIERS[kind, None])
        arguments["attn_layer"] = "diff" if differential else "attn"
        if gated:
            arguments["mlp_ratio"] *= 2
    if backbone.feed_forward != "swiglu":
        arguments["act_layer"] = activation_layer
    return {"architecture": name, "num_classes": config.num_classes, "model_args": arguments}


def write_encoder(config: ImageConfig) -> dict[str, Any]:
    """The arguments that all of timm's vision transformers have."""
    pools = {"cls": "token", "cls_dist": "token", "mean": "avg", "map": "map"}
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": config.backbone.dim,
        "depth": config.backbone.depth,
        "global_pool": pools[config.pool],
        "class_token": config.cls_token,
        "no_embed_class": not config.prefix_positions,
    }


def mlp_ratio(backbone: BackboneConfig) -> float:
    """The ratio of widths that gives the width of the feed-forward layer, as timm rounds it."""
    width, dim = backbone.resolved_feed_forward_width, backbone.dim
    return width / dim if int(dim * (width / dim)) == width else (width + 0.5) / dim


def table(config: ImageConfig) -> Table:
    """The tensors of a model."""
    backbone = config.backbone
    block = parallel_block(backbone) if backbone.parallel else serial_block(backbone)
    return Table((*around_blocks(config), *block), depth=backbone.depth)


def norm_kinds(backbone: BackboneConfig) -> tuple[str, ...]:
    """The tensors of a norm."""
    return ("weight", "bias") if backbone.norm == "layernorm" else ("weight",)


def both(theirs: str, ours: str, kinds: tuple[str, ...] = ("weight", "bias")) -> list[Name]:
    """The tensors of a layer that both implementations arrange in the same way."""
    return [Name(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in kinds]


def biased(bias: object) -> tuple[str, ...]:
    """The tensors of a projection."""
    return ("weight", "bias") if bias else ("weight",)


def around_blocks(config: ImageConfig) -> list[Name]:
    """The tensors outside the blocks."""
    norms = norm_kinds(config.backbone)
    names = both("patch_embed.proj", "patch_embedding.proj", biased(config.patch_bias))
    for token, present in (
        ("cls_token", config.cls_token),
        ("dist_token", config.dist_token),
        ("reg_token", config.num_reg_tokens),
    ):
        if present:
            names.append(Name(token, token, UNBATCHED))
    if config.learned_positions:
        names.append(positions("pos_embed", config, config.grid))
    for theirs, ours, present in (
        ("norm_pre", "pre_norm", config.pre_norm),
        ("norm", "backbone.norm", config.backbone.final_norm),
        ("fc_norm", "pool_norm", config.pool_norm),
    ):
        if present:
            names += both(theirs, ours, norms)
    if config.pool == "map":
        names.append(Name("attn_pool.latent", "pooling.latent"))
        for layer in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2"):
            names += both(f"attn_pool.{layer}", f"pooling.{layer}")
    if config.num_classes and config.head == "distilled":
        names += [*both("head", "head.cls"), *both("head_dist", "head.dist")]
    elif config.num_classes:
        names += both("head", "head")
    return names


def positions(theirs: str, config: EncoderConfig, grid: tuple[int, ...]) -> Name:
    """Learned positions, `[1, P + N, dim]` with those of `P` special tokens first."""
    num_prefix = config.num_prefix_tokens
    if not (num_prefix and config.prefix_positions):
        alone = Layout(lambda x: x[0].unflatten(0, grid), lambda x: x.flatten(0, -2).unsqueeze(0))
        return Name(theirs, "positions.grid", alone)

    def split(x: Any) -> tuple[Any, Any]:
        return x[0, :num_prefix], x[0, num_prefix:].unflatten(0, grid)

    def join(prefix: Any, on_grid: Any) -> Any:
        from torch import cat

        return cat([prefix, on_grid.flatten(0, -2)]).unsqueeze(0)

    return Name(theirs, ("positions.prefix", "positions.grid"), Layout(split, join))


def serial_block(backbone: BackboneConfig) -> list[Name]:
    """The tensors of a `Block`."""
    norms, attention, feed_forward = norm_kinds(backbone), f"{OURS}.attention", "feed_forward"
    width = backbone.num_heads * backbone.resolved_head_dim
    names = [
        *both(f"{BLOCK}.norm1", f"{OURS}.attention_norm", norms),
        *both(f"{BLOCK}.norm2", f"{OURS}.feed_forward_norm", norms),
        *_attention_vectors(backbone, f"{BLOCK}.attn"),
        *both(f"{BLOCK}.attn.proj", f"{attention}.out_proj", biased(backbone.out_bias)),
        *both(
            f"{BLOCK}.mlp.fc2",
            f"{OURS}.{feed_forward}.down_proj",
            biased(backbone.feed_forward_bias),
        ),
    ]
    for kind in biased(backbone.qkv_bias):
        ours = tuple(f"{attention}.{part}_proj.{kind}" for part in "qkv")
        names.append(Name(f"{BLOCK}.attn.qkv.{kind}", ours, fused([width] * 3)))
    parts = ("gate", "up") if backbone.feed_forward == "swiglu" else ("up",)
    for kind in biased(backbone.feed_forward_bias):
        ours = tuple(f"{OURS}.{feed_forward}.{part}_proj.{kind}" for part in parts)
        sizes = [backbone.resolved_feed_forward_width] * len(parts)
        names.append(Name(f"{BLOCK}.mlp.fc1.{kind}", ours, fused(sizes)))
    if backbone.layer_scale is not None:
        names.append(Name(f"{BLOCK}.ls1.gamma", f"{OURS}.attention_branch.scale"))
        names.append(Name(f"{BLOCK}.ls2.gamma", f"{OURS}.feed_forward_branch.scale"))
    return names


def parallel_block(backbone: BackboneConfig) -> list[Name]:
    """The tensors of a parallel block, whose projections are fused."""
    width = backbone.num_heads * backbone.resolved_head_dim
    hidden = backbone.resolved_feed_forward_width
    attention, feed_forward = f"{OURS}.attention", f"{OURS}.feed_forward"
    names = [
        *both(f"{BLOCK}.in_norm", f"{OURS}.attention_norm", norm_kinds(backbone)),
        *_attention_vectors(backbone, BLOCK),
    ]
    if backbone.attention == "diff_v1":
        outputs = (f"{attention}.out_proj.weight", f"{feed_forward}.down_proj.weight")
        layout = transposed(fused([width, hidden]))
        names.append(Name(f"{BLOCK}.out_proj.weight", outputs, layout))
        if backbone.feed_forward_bias:
            names.append(Name(f"{BLOCK}.out_proj.bias", f"{feed_forward}.down_proj.bias"))
    else:
        bias = biased(backbone.feed_forward_bias)
        names += both(f"{BLOCK}.attn_out_proj", f"{attention}.out_proj", bias)
        names += both(f"{BLOCK}.mlp_out_proj", f"{feed_forward}.down_proj", bias)
    for kind in biased(backbone.qkv_bias):
        ours = (
            f"{feed_forward}.up_proj.{kind}",
            *(f"{attention}.{p}_proj.{kind}" for p in "qkv"),
        )
        names.append(Name(f"{BLOCK}.in_proj.{kind}", ours, fused([hidden, *[width] * 3])))
    if not backbone.qkv_bias:
        names.append(Name(f"{BLOCK}.mlp_bias", f"{feed_forward}.up_proj.bias"))
    if backbone.layer_scale is not None:
        names.append(Name(f"{BLOCK}.ls.gamma", f"{OURS}.attention_branch.scale"))
    return names


def transposed(layout: Layout) -> Layout:
    """The layout of the transposed matrices."""
    return Layout(
        lambda x: tuple(part.T for part in layout.to_ours(x.T)),
        lambda *parts: layout.to_theirs(*(part.T for part in parts)).T,
    )


def _attention_vectors(backbone: BackboneConfig, theirs: str) -> list[Name]:
    """The norms of queries, keys and heads, and lambda."""
    ours = f"{OURS}.attention"
    names = []
    if backbone.qk_norm:
        for part in "qk":
            names += both(f"{theirs}.{part}_norm", f"{ours}.{part}_norm", norm_kinds(backbone))
    if backbone.attention != "diff_v1":
        return names
    names.append(Name(f"{theirs}.sub_norm.weight", f"{ours}.norm.weight"))
    lambdas = (
        (DiffAttentionV1.DUAL_LAMBDA_NAMES, SCALAR)
        if backbone.dual_lambda
        else (DiffAttentionV1.LAMBDA_NAMES, SAME)
    )
    return names + [Name(f"{theirs}.{name}", f"{ours}.{name}", lambdas[1]) for name in lambdas[0]]
