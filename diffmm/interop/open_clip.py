"""The image tower of open_clip's `CLIP`, with its projection as a head without bias: the output is
an embedding, not scores of classes. The tensors of the text tower are left out
(`diffmm.interop.open_clip_text` reads it). Towers of timm's models and ResNets are refused.
"""

from typing import Any

from diffmm.interop.family import Family
from diffmm.interop.names import Layout, Name, Table, fused
from diffmm.interop.settings import TheirSettings
from diffmm.interop.source import Source
from diffmm.interop.timm_models import READER
from diffmm.interop.timm_vit import both
from diffmm.models import BackboneConfig, ImageConfig, ImageModel
from diffmm.models.job import Job

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
"""Statistics of the images of OpenAI's CLIP, open_clip's default."""

CROPS = {"shortest": "center", "squash": "squash"}
"""Ways of resizing, by open_clip's and by timm's names."""

TOWER = "visual."
OF_TRAINING = ("patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "output_tokens")
OF_TEXT = (
    "text_cfg",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
    "cast_dtype",
    "output_dict",
    "multimodal_cfg",
)
THEIRS, OURS = f"{TOWER}transformer.resblocks.{{}}", "backbone.blocks.{}"

FIRST = Layout(lambda x: x.unsqueeze(0), lambda x: x.squeeze(0))
TURNED = Layout(lambda x: x.T, lambda x: x.T)


def image_tower(source: Source) -> Source:
    """Keep the image tower alone."""
    kept = {name: x for name, x in source.tensors.items() if name.startswith(TOWER)}
    return source._replace(tensors=kept)


def read_settings(settings: TheirSettings) -> ImageConfig:
    """The config of an image tower."""
    settings.skip("preprocess_cfg")
    model = settings.section("model_cfg")
    model.skip(*OF_TEXT)
    quick = model.take("quick_gelu", bool, False)
    num_outputs = model.take("embed_dim", int)
    tower = model.section("vision_cfg")
    model.finish()
    tower.skip(*OF_TRAINING)
    for name, value in (("timm_model_name", None), ("attentional_pool", False)):
        tower.only(name, value, "the tower is open_clip's plain vision transformer")
    tower.skip(*(f"timm_{name}" for name in ("model_pretrained", "pool", "proj", "proj_bias")))
    tower.skip("timm_drop", "timm_drop_path", "pos_embed_type")  # fixed positions are in the file
    width = tower.take("width", int, 768)
    pool, after = (
        tower.take("pool_type", str, "tok"),
        tower.take("final_ln_after_pool", bool, False),
    )
    pools: dict[str, Any] = {"tok": "cls", "avg": "mean"}
    if pool not in pools:
        tower.refuse("pool_type", pool, f"only {', '.join(pools)}")
    size = tower.peek("image_size")
    tower.skip("image_size")
    backbone = read_blocks(
        tower,
        width=width,
        num_heads=width // tower.take("head_width", int, 64),
        quick_gelu=quick,
        final_norm=not after,
    )
    config = ImageConfig(
        backbone=backbone,
        image_size=tuple(size) if isinstance(size, list) else size or 224,
        patch_size=tower.take("patch_size", int, 16),
        patch_bias=False,
        num_classes=num_outputs,
        head_bias=False,
        pool=pools[pool],
        pool_norm=after,
        learned_positions=True,
        pre_norm=not tower.take("no_ln_pre", bool, False),
    )
    tower.finish()
    return config


def read_blocks(
    tower: TheirSettings, *, width: int, num_heads: int, quick_gelu: bool, final_norm: bool = True
) -> BackboneConfig:
    """Read the settings that the blocks of both towers have."""
    for name in (
        "qk_norm",
        "scaled_cosine_attn",
        "scale_heads",
        "scale_attn_inner",
        "scale_attn",
        "scale_fc",
    ):
        tower.only(name, False, "the blocks are open_clip's plain ones")
    tower.only("block_type", "default", "'custom' has other names of tensors")
    norm = tower.inside("norm_kwargs", tower.take("norm_kwargs", dict, {}))
    eps = norm.take("eps", float, 1e-5)
    norm.finish()
    activation = tower.inside("act_kwargs", tower.take("act_kwargs", dict, {}))
    approximate = activation.take("approximate", str, "none")
    activation.finish()
    kinds = {"none": "quick_gelu" if quick_gelu else "gelu", "tanh": "gelu_tanh"}
    if approximate not in kinds or (quick_gelu and approximate != "none"):
        tower.refuse("act_kwargs", {"approximate": approximate}, "only 'tanh', of plain GELU")
    return BackboneConfig(
        dim=width,
        depth=tower.take("layers", int, 12),
        num_heads=num_heads,
        attention="softmax",
        norm="layernorm",
        norm_eps=eps,
        final_norm=final_norm,
        feed_forward=kinds[approximate],
        feed_forward_width=int(width * tower.take("mlp_ratio", float, 4.0)),
        feed_forward_bias=True,
        qkv_bias=True,
        out_bias=True,
        layer_scale=tower.take("ls_init_value", float, None),
    )


def write_settings(config: ImageConfig) -> dict[str, Any]:
    """Raise an error: a model of open_clip has two towers.

    Raises:
        ValueError: Always.
    """
    raise ValueError("open_clip has no model of an image tower alone")


def positions(grid: tuple[int, int]) -> Layout:
    """The layout of the positions, `[1 + N, dim]` with that of the class token first."""

    def join(prefix: Any, on_grid: Any) -> Any:
        from torch import cat

        return cat([prefix, on_grid.flatten(0, 1)])

    return Layout(lambda x: (x[:1], x[1:].unflatten(0, grid)), join)


def table(config: ImageConfig) -> Table:
    """The tensors of an image tower."""
    names = [
        Name(f"{TOWER}conv1.weight", "patch_embedding.proj.weight"),
        Name(f"{TOWER}class_embedding", "cls_token", FIRST),
        Name(
            f"{TOWER}positional_embedding",
            ("positions.prefix", "positions.grid"),
            positions(config.grid),
        ),
        *both(f"{TOWER}ln_post", "pool_norm" if config.pool_norm else "backbone.norm"),
        Name(f"{TOWER}proj", "head.weight", TURNED),
        *blocks(THEIRS, config.backbone),
    ]
    if config.pre_norm:
        names += both(f"{TOWER}ln_pre", "pre_norm")
    return Table(tuple(names), depth=config.backbone.depth)


def blocks(theirs: str, backbone: BackboneConfig) -> list[Name]:
    """The tensors of the blocks, which both towers have."""
    attention, feed_forward = f"{OURS}.attention", f"{OURS}.feed_forward"
    names = [
        *both(f"{theirs}.ln_1", f"{OURS}.attention_norm"),
        *both(f"{theirs}.ln_2", f"{OURS}.feed_forward_norm"),
        *both(f"{theirs}.attn.out_proj", f"{attention}.out_proj"),
        *both(f"{theirs}.mlp.c_fc", f"{feed_forward}.up_proj"),
        *both(f"{theirs}.mlp.c_proj", f"{feed_forward}.down_proj"),
    ]
    for kind in ("weight", "bias"):
        ours = tuple(f"{attention}.{part}_proj.{kind}" for part in "qkv")
        names.append(Name(f"{theirs}.attn.in_proj_{kind}", ours, fused([backbone.dim] * 3)))
    if backbone.layer_scale is not None:
        names.append(Name(f"{theirs}.ls_1.gamma", f"{OURS}.attention_branch.scale"))
        names.append(Name(f"{theirs}.ls_2.gamma", f"{OURS}.feed_forward_branch.scale"))
    return names


def read_job(source: Source, config: ImageConfig) -> Job:
    """The preprocessing.

    Raises:
        ValueError: If images are resized in a way that diffmm does not have.
    """
    given = source.config.get("preprocess_cfg") or {}
    mode = given.get("resize_mode") or "shortest"
    if mode not in CROPS:
        raise ValueError(
            f"{source.origin} has resize_mode={mode!r}, but diffmm can hold only {', '.join(CROPS)}"
        )
    return Job(
        reader=image_reader(
            config,
            mean=list(given.get("mean") or MEAN),
            std=list(given.get("std") or STD),
            interpolation="bilinear" if given.get("interpolation") == "bilinear" else "bicubic",
            crop_mode=CROPS[mode],
        )
    )


def image_reader(config: ImageConfig, **settings: Any) -> dict[str, Any]:
    """The reader of color images that are resized to the model's size, without a margin."""
    size = config.image_size
    return {
        "class_path": READER,
        "init_args": {
            "image_size": [size, size] if isinstance(size, int) else list(size),
            "channels": config.in_channels,
            "crop_pct": 1.0,
            **settings,
        },
    }


OPEN_CLIP = Family(
    "open_clip",
    (),
    read_settings,
    write_settings,
    table,
    model=ImageModel,
    job=read_job,
    prepare=image_tower,
)
