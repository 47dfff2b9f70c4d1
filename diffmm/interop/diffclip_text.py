"""The text tower of DiffCLIP (Hammoud and Ghanem 2025), with differential attention, version 1, and
an initial lambda of 0.8 in all blocks. The tensors of the image tower are left out. The settings
follow from the shapes of the tensors, as in `diffmm.interop.diffclip`.
"""

from typing import Any

from diffmm.interop.diffclip import PROJECTION as OF_IMAGES
from diffmm.interop.diffclip import TOWER as IMAGE_TOWER
from diffmm.interop.diffclip import shapes_of
from diffmm.interop.family import Family
from diffmm.interop.names import Name, Table
from diffmm.interop.open_clip import OURS, TURNED
from diffmm.interop.settings import TheirSettings
from diffmm.interop.source import Source
from diffmm.interop.timm_vit import both
from diffmm.layers import DiffAttentionV1
from diffmm.models import BackboneConfig
from diffmm.models.text_tower import TextTower, TextTowerConfig

THEIRS, PROJECTION = "transformer.resblocks.{}", "text_projection"


def text_tower(source: Source) -> Source:
    """Keep the text tower, and add the settings that the shapes show.

    Raises:
        ValueError: If a tensor from which they follow is missing, or has other axes.
    """
    named = {name.removeprefix("module."): tensor for name, tensor in source.tensors.items()}
    others = (IMAGE_TOWER, OF_IMAGES, "logit_scale")
    tensors = {name: x for name, x in named.items() if not name.startswith(others)}
    first = "transformer.resblocks.0"
    shapes = shapes_of(
        tensors,
        source.origin,
        {
            "token_embedding.weight": 2,
            "positional_embedding": 2,
            f"{first}.mlp.c_fc.weight": 2,
            f"{first}.attn.lambda_q1": 1,
            PROJECTION: 2,
        },
    )
    vocab_size, dim = shapes["token_embedding.weight"]
    blocks = {name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")}
    settings = {
        "vocab_size": vocab_size,
        "dim": dim,
        "depth": len(blocks),
        "head_dim": shapes[f"{first}.attn.lambda_q1"][0],
        "feed_forward_width": shapes[f"{first}.mlp.c_fc.weight"][0],
        "max_length": shapes["positional_embedding"][0],
        "num_outputs": shapes[PROJECTION][1],
    }
    return source._replace(tensors=tensors, config={**source.config, **settings})


def read_settings(settings: TheirSettings) -> TextTowerConfig:
    """The config of a text tower."""
    dim = settings.take("dim", int)
    backbone = BackboneConfig(
        dim=dim,
        depth=settings.take("depth", int),
        num_heads=dim // max(1, settings.take("head_dim", int)),
        attention="diff_v1",
        lambda_init=0.8,
        norm="layernorm",
        norm_eps=1e-5,
        feed_forward="quick_gelu",
        feed_forward_width=settings.take("feed_forward_width", int),
        feed_forward_bias=True,
        qkv_bias=True,
        out_bias=True,
    )
    return TextTowerConfig(
        vocab_size=settings.take("vocab_size", int),
        max_length=settings.take("max_length", int),
        backbone=backbone,
        num_outputs=settings.take("num_outputs", int),
    )


def write_settings(config: TextTowerConfig) -> dict[str, Any]:
    """Raise an error: a DiffCLIP has two towers.

    Raises:
        ValueError: Always.
    """
    raise ValueError("diffclip has no model of a text tower alone")


def table(config: TextTowerConfig) -> Table:
    """The tensors of a text tower and its projection."""
    attention, feed_forward = f"{OURS}.attention", f"{OURS}.feed_forward"
    names = [
        Name("token_embedding.weight", "embedding.weight"),
        Name("positional_embedding", "positions.grid"),
        Name(PROJECTION, "head.weight", TURNED),
        Name(f"{THEIRS}.attn.diff_norm.weight", f"{attention}.norm.weight"),
        *both("ln_final", "backbone.norm"),
        *both(f"{THEIRS}.ln_1", f"{OURS}.attention_norm"),
        *both(f"{THEIRS}.ln_2", f"{OURS}.feed_forward_norm"),
        *both(f"{THEIRS}.mlp.c_fc", f"{feed_forward}.up_proj"),
        *both(f"{THEIRS}.mlp.c_proj", f"{feed_forward}.down_proj"),
    ]
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        names += both(f"{THEIRS}.attn.{part}", f"{attention}.{part}")
    for name in DiffAttentionV1.LAMBDA_NAMES:
        names.append(Name(f"{THEIRS}.attn.{name}", f"{attention}.{name}"))
    return Table(tuple(names), depth=config.backbone.depth)


DIFFCLIP_TEXT = Family(
    "diffclip_text",
    (),
    read_settings,
    write_settings,
    table,
    model=TextTower,
    prepare=text_tower,
)
