"""The text tower of open_clip's `CLIP`. The tensors of the image tower are left out, and the file
does not have the tokenizer: the ids of a text come from open_clip's `get_tokenizer`.
"""

from typing import Any

from diffmm.interop.family import Family
from diffmm.interop.names import Name, Table
from diffmm.interop.open_clip import TURNED, blocks, read_blocks
from diffmm.interop.settings import TheirSettings
from diffmm.interop.source import Source
from diffmm.interop.timm_vit import both
from diffmm.models.text_tower import POOLS, TextTower, TextTowerConfig

NOT_OF_TEXT = ("visual.", "logit_scale", "logit_bias", "attn_mask", "text.attn_mask")
OF_IMAGES = (
    "vision_cfg",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
    "cast_dtype",
    "output_dict",
)
THEIRS = "transformer.resblocks.{}"


def text_tower(source: Source) -> Source:
    """Keep the text tower alone, whose names some files prefix with `text.`."""
    kept = {
        name.removeprefix("text."): tensor
        for name, tensor in source.tensors.items()
        if not name.startswith(NOT_OF_TEXT)
    }
    return source._replace(tensors=kept)


def read_settings(settings: TheirSettings) -> TextTowerConfig:
    """The config of a text tower."""
    settings.skip("preprocess_cfg")
    model = settings.section("model_cfg")
    model.skip(*OF_IMAGES)
    model.only("multimodal_cfg", None, "it has no decoder of captions")
    quick = model.take("quick_gelu", bool, False)
    num_outputs = model.take("embed_dim", int)
    tower = model.section("text_cfg")
    model.finish()
    tower.only("hf_model_name", None, "the tower is open_clip's own transformer")
    tower.only("embed_cls", False, "it has no class token after the text")
    bidirectional = tower.take("no_causal_mask", bool, False)
    if bidirectional:
        tower.only("use_pad_mask", False, "it does not mask padding")
    tower.skip(
        *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "hf_tokenizer_name"),
        *("tokenizer_mode", "tokenizer_kwargs", "text_mask", "pad_id", "use_pad_mask"),
        *("correct_cls_mask", "output_tokens", "final_ln_after_pool"),
    )
    pool = tower.take("pool_type", str, "argmax")
    if pool not in POOLS:
        tower.refuse("pool_type", pool, f"only {', '.join(POOLS)}")
    projection = tower.take("proj_type", str, "linear")
    if projection not in ("linear", "none"):
        tower.refuse("proj_type", projection, "only 'linear' and 'none'")
    bias, eos_id = tower.take("proj_bias", bool, False), tower.take("eos_id", int, 2)
    width = tower.take("width", int, 512)
    backbone = read_blocks(
        tower, width=width, num_heads=tower.take("heads", int, 8), quick_gelu=quick
    )
    config = TextTowerConfig(
        vocab_size=tower.take("vocab_size", int, 49408),
        max_length=tower.take("context_length", int, 77),
        backbone=backbone,
        num_outputs=0 if projection == "none" else num_outputs,
        head_bias=bias and projection != "none",
        causal=not bidirectional,
        pool=pool,
        eos_id=eos_id if pool == "eos" else None,
    )
    tower.finish()
    return config


def write_settings(config: TextTowerConfig) -> dict[str, Any]:
    """Raise an error: a model of open_clip has two towers.

    Raises:
        ValueError: Always.
    """
    raise ValueError("open_clip has no model of a text tower alone")


def table(config: TextTowerConfig) -> Table:
    """The tensors of a text tower, without the prefix `text.`."""
    names = [
        Name("token_embedding.weight", "embedding.weight"),
        Name("positional_embedding", "positions.grid"),
        *both("ln_final", "backbone.norm"),
        *blocks(THEIRS, config.backbone),
    ]
    if config.num_outputs and config.head_bias:
        names += both("text_projection", "head")
    elif config.num_outputs:
        names.append(Name("text_projection", "head.weight", TURNED))
    return Table(tuple(names), depth=config.backbone.depth)


OPEN_CLIP_TEXT = Family(
    "open_clip_text",
    (),
    read_settings,
    write_settings,
    table,
    model=TextTower,
    prepare=text_tower,
)
