"""The image tower of DiffCLIP (Hammoud and Ghanem 2025), with its projection as a head without
bias: the output is an embedding, not scores of classes. The tensors of the text tower are left out
(`diffmm.interop.diffclip_text` reads it).

It is a ViT with differential attention, version 1, in diffmm's order of heads, whose initial lambda
is 0.8 in all blocks. DiffCLIP publishes no settings beside its weights: they follow from the shapes
of the tensors, and `config.json` only needs `{"model_type": "diffclip"}`.
"""

import math
from typing import Any

from torch import Tensor

from diffmm.interop.family import Family
from diffmm.interop.names import Name, Table
from diffmm.interop.open_clip import TURNED, image_reader
from diffmm.interop.settings import TheirSettings
from diffmm.interop.source import Source
from diffmm.interop.timm_vit import BLOCK, OURS, UNBATCHED, both, positions
from diffmm.layers import DiffAttentionV1
from diffmm.models import BackboneConfig, ImageConfig, ImageModel
from diffmm.models.job import Job

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Statistics of ImageNet, with which DiffCLIP normalizes images."""

TOWER, PROJECTION = "visual.", "image_projection"
THEIRS = f"{TOWER}{BLOCK}"


def image_tower(source: Source) -> Source:
    """Keep the image tower and its projection, and add the settings that the shapes show.

    Raises:
        ValueError: If a tensor from which they follow is missing, or is not a matrix or vector.
    """
    tensors = {
        name.removeprefix("module."): tensor
        for name, tensor in source.tensors.items()
        if name.removeprefix("module.").startswith((TOWER, PROJECTION))
    }
    shapes = shapes_of(
        tensors,
        source.origin,
        {
            f"{TOWER}patch_embed.proj.weight": 4,
            f"{TOWER}pos_embed": 3,
            f"{TOWER}blocks.0.mlp.fc1.weight": 2,
            f"{TOWER}blocks.0.attn.lambda_q1": 1,
            PROJECTION: 2,
        },
    )
    dim, channels, *patch_size = shapes[f"{TOWER}patch_embed.proj.weight"]
    settings = {
        "dim": dim,
        "depth": len(
            {name.split(".")[2] for name in tensors if name.startswith(f"{TOWER}blocks.")}
        ),
        "head_dim": shapes[f"{TOWER}blocks.0.attn.lambda_q1"][0],
        "feed_forward_width": shapes[f"{TOWER}blocks.0.mlp.fc1.weight"][0],
        "in_channels": channels,
        "patch_size": patch_size[0],
        "num_patches": shapes[f"{TOWER}pos_embed"][1] - 1,
        "num_outputs": shapes[PROJECTION][1],
    }
    return source._replace(tensors=tensors, config={**source.config, **settings})


def shapes_of(
    tensors: dict[str, Tensor], origin: str, num_axes: dict[str, int]
) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, given their numbers of axes.

    Raises:
        ValueError: If one is missing or has another number of axes.
    """
    shapes = {}
    for name, count in num_axes.items():
        shapes[name] = tuple(tensors[name].shape) if name in tensors else ()
        if len(shapes[name]) != count:
            raise ValueError(
                f"{origin} is not a DiffCLIP: {name} must have {count} axes, got shape "
                f"{shapes[name]}"
            )
    return shapes


def read_settings(settings: TheirSettings) -> ImageConfig:
    """The config of an image tower, whose images are square."""
    dim, head_dim = settings.take("dim", int), settings.take("head_dim", int)
    num_patches, patch_size = settings.take("num_patches", int), settings.take("patch_size", int)
    side = math.isqrt(max(0, num_patches))
    if side * side != num_patches:
        settings.refuse("num_patches", num_patches, "only square images")
    backbone = BackboneConfig(
        dim=dim,
        depth=settings.take("depth", int),
        num_heads=dim // max(1, head_dim),
        attention="diff_v1",
        lambda_init=0.8,
        norm="layernorm",
        norm_eps=1e-5,
        feed_forward="gelu",
        feed_forward_width=settings.take("feed_forward_width", int),
        feed_forward_bias=True,
        qkv_bias=True,
        out_bias=True,
    )
    return ImageConfig(
        backbone=backbone,
        image_size=side * patch_size,
        patch_size=patch_size,
        in_channels=settings.take("in_channels", int),
        num_classes=settings.take("num_outputs", int),
        head_bias=False,
        learned_positions=True,
    )


def write_settings(config: ImageConfig) -> dict[str, Any]:
    """Raise an error: a DiffCLIP has two towers.

    Raises:
        ValueError: Always.
    """
    raise ValueError("diffclip has no model of an image tower alone")


def table(config: ImageConfig) -> Table:
    """The tensors of an image tower and its projection."""
    attention, feed_forward = f"{OURS}.attention", f"{OURS}.feed_forward"
    names = [
        *both(f"{TOWER}patch_embed.proj", "patch_embedding.proj"),
        Name(f"{TOWER}cls_token", "cls_token", UNBATCHED),
        positions(f"{TOWER}pos_embed", config, config.grid),
        *both(f"{TOWER}norm", "backbone.norm"),
        Name(PROJECTION, "head.weight", TURNED),
        *both(f"{THEIRS}.norm1", f"{OURS}.attention_norm"),
        *both(f"{THEIRS}.norm2", f"{OURS}.feed_forward_norm"),
        *both(f"{THEIRS}.mlp.fc1", f"{feed_forward}.up_proj"),
        *both(f"{THEIRS}.mlp.fc2", f"{feed_forward}.down_proj"),
        Name(f"{THEIRS}.attn.diff_norm.weight", f"{attention}.norm.weight"),
    ]
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        names += both(f"{THEIRS}.attn.{part}", f"{attention}.{part}")
    names += [
        Name(f"{THEIRS}.attn.{name}", f"{attention}.{name}")
        for name in DiffAttentionV1.LAMBDA_NAMES
    ]
    return Table(tuple(names), depth=config.backbone.depth)


def read_job(source: Source, config: ImageConfig) -> Job:
    """The preprocessing, as in DiffCLIP's example: images are squashed to the model's size."""
    return Job(
        reader=image_reader(config, mean=MEAN, std=STD, interpolation="bicubic", crop_mode="squash")
    )


DIFFCLIP = Family(
    "diffclip",
    (),
    read_settings,
    write_settings,
    table,
    model=ImageModel,
    job=read_job,
    prepare=image_tower,
)
