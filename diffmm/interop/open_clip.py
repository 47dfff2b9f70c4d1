"""The image tower of open_clip's `CLIP`, with its projection as a head without bias: the output is
an embedding, not scores of classes. The tensors of the text tower are left out.

A text tower needs learned positions and the features of one token, which `diffmm.TextModel` does
not have; towers of timm's or transformers' models and ResNets are refused.
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
    for name, value in (
        ("timm_model_name", None),
        ("attentional_pool", False),
        ("act_kwargs", None),
        ("qk_norm", False),
        ("scaled_cosine_attn", False),
        ("scale_heads", False),
        ("scale_attn_inner", False),
        ("scale_attn", False),
        ("scale_fc", False),
    ):
        tower.only(name, value, "the tower is open_clip's plain vision transformer")
    tower.skip(*(f"timm_{name}" for name in ("model_pretrained", "pool", "proj", "proj_bias")))
    tower.skip("timm_drop", "timm_drop_path", "pos_embed_type")  # fixed positions are in the file
    tower.only("block_type", "default", "'custom' has other names of tensors")
    norm = tower.inside("norm_kwargs", tower.take("norm_kwargs", dict, {}))
    eps = norm.take("eps", float, 1e-5)
    norm.finish()
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
    backbone = BackboneConfig(
        dim=width,
        depth=tower.take("layers", int, 12),
        num_heads=width // tower.take("head_width", int, 64),
        attention="softmax",
        norm="layernorm",
        norm_eps=eps,
        final_norm=not after,
        feed_forward="quick_gelu" if quick else "gelu",
        feed_forward_width=int(width * tower.take("mlp_ratio", float, 4.0)),
        feed_forward_bias=True,
        qkv_bias=True,
        out_bias=True,
        layer_scale=tower.take("ls_init_value", float, None),
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


def write_settings(config: ImageConfig) -> dict[str, Any]:
    """Raise an error: a model of open_clip has two towers.

    Raises:
        ValueError: Always.
    """
    raise ValueError("open_clip has no model of an image tower alone: convert to timm instead")


def positions(grid: tuple[int, int]) -> Layout:
    """The layout of the positions, `[1 + N, dim]` with that of the class token first."""

    def join(prefix: Any, on_grid: Any) -> Any:
        from torch import cat

        return cat([prefix, on_grid.flatten(0, 1)])

    return Layout(lambda x: (x[:1], x[1:].unflatten(0, grid)), join)


def table(config: ImageConfig) -> Table:
    """The tensors of an image tower."""
    width = config.backbone.dim
    attention, feed_forward = f"{OURS}.attention", f"{OURS}.feed_forward"
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
        *both(f"{THEIRS}.ln_1", f"{OURS}.attention_norm"),
        *both(f"{THEIRS}.ln_2", f"{OURS}.feed_forward_norm"),
        *both(f"{THEIRS}.attn.out_proj", f"{attention}.out_proj"),
        *both(f"{THEIRS}.mlp.c_fc", f"{feed_forward}.up_proj"),
        *both(f"{THEIRS}.mlp.c_proj", f"{feed_forward}.down_proj"),
    ]
    for kind in ("weight", "bias"):
        ours = tuple(f"{attention}.{part}_proj.{kind}" for part in "qkv")
        names.append(Name(f"{THEIRS}.attn.in_proj_{kind}", ours, fused([width] * 3)))
    if config.pre_norm:
        names += both(f"{TOWER}ln_pre", "pre_norm")
    if config.backbone.layer_scale is not None:
        names.append(Name(f"{THEIRS}.ls_1.gamma", f"{OURS}.attention_branch.scale"))
        names.append(Name(f"{THEIRS}.ls_2.gamma", f"{OURS}.feed_forward_branch.scale"))
    return Table(tuple(names), depth=config.backbone.depth)


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
