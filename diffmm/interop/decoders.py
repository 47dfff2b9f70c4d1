"""What the decoders of Hugging Face transformers have in common: names, settings, tokenizer."""

from typing import Any

from diffmm.interop import rope
from diffmm.interop.family import explicit
from diffmm.interop.names import SAME, Name, Table, halves_as_pairs
from diffmm.interop.settings import TheirSettings
from diffmm.interop.source import Source
from diffmm.models import BackboneConfig, TextConfig
from diffmm.models.backbone_config import MAX_DEPTH
from diffmm.models.job import Job, text_reader
from diffmm.tokenizers import HuggingFaceTokenizer

LAYER = "model.layers.{}"
OURS = "backbone.blocks.{}"

DERIVED = (f"{LAYER}.self_attn.rotary_emb.inv_freq",)
"""Rotary frequencies, which transformers stored with the weights until version 4.32."""


def read_shape(settings: TheirSettings, **defaults: Any) -> dict[str, Any]:
    """Read the sizes of a decoder, as fields of `BackboneConfig`.

    Args:
        settings: The settings.
        defaults: Values of settings that the file may omit, by Hugging Face's names.
    """
    num_heads = settings.take("num_attention_heads", int)
    depth = settings.take("num_hidden_layers", int)
    if not 1 <= depth <= MAX_DEPTH:  # before anything is made per layer
        settings.refuse("num_hidden_layers", depth, f"1 to {MAX_DEPTH:,}")
    return {
        "dim": settings.take("hidden_size", int),
        "depth": depth,
        "num_heads": num_heads,
        "num_kv_heads": settings.take("num_key_value_heads", int, num_heads),
        "head_dim": settings.take("head_dim", int, defaults.get("head_dim")),
        "norm_eps": settings.take("rms_norm_eps", float, defaults.get("rms_norm_eps", 1e-6)),
        "feed_forward_width": settings.take("intermediate_size", int),
        "rope": "1d",
        **rope.read(settings),
    }


def read_windows(settings: TheirSettings, depth: int, kinds: list[str]) -> dict[str, Any]:
    """Read the windows of a decoder of which some blocks have one.

    Args:
        settings: The settings.
        depth: Number of blocks.
        kinds: `"sliding_attention"` or `"full_attention"` of each block, unless `layer_types` says
            so.
    """
    kinds = settings.take("layer_types", list, kinds)
    window = settings.take("sliding_window", int, None)
    known = {"sliding_attention", "full_attention"}
    if len(kinds) != depth or not all(isinstance(kind, str) and kind in known for kind in kinds):
        settings.refuse("layer_types", kinds, f"only {' and '.join(sorted(known))}, one per layer")
    if window is None or "sliding_attention" not in kinds:
        return {}
    full = tuple(index for index, kind in enumerate(kinds) if kind == "full_attention")
    return {"window": window, "full_attention_layers": full}


def write_windows(config: TextConfig) -> dict[str, Any]:
    """The settings of windows; without any, all layers are of full attention."""
    backbone = config.backbone
    full = range(backbone.depth) if backbone.window is None else backbone.full_attention_layers
    return {
        "sliding_window": backbone.window,
        "layer_types": [
            "full_attention" if index in full else "sliding_attention"
            for index in range(backbone.depth)
        ],
    }


def text_config(settings: TheirSettings, backbone: BackboneConfig, **more: Any) -> TextConfig:
    """Read the settings around the backbone."""
    settings.only("attention_dropout", 0.0, "it has no effect after training; set it to 0")
    return TextConfig(
        vocab_size=settings.take("vocab_size", int),
        max_length=settings.take("max_position_embeddings", int),
        backbone=backbone,
        **more,
    )


def write_shape(config: TextConfig, family: str, architecture: str) -> dict[str, Any]:
    """The settings of transformers that all decoders have."""
    backbone = explicit(config.backbone)
    return {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": backbone.dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "num_key_value_heads": backbone.num_kv_heads,
        "head_dim": backbone.head_dim,
        "intermediate_size": backbone.feed_forward_width,
        "rms_norm_eps": backbone.norm_eps,
        **rope.write(backbone),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": backbone.init_std,
        "hidden_act": "silu",
    }


def around_blocks(config: TextConfig) -> tuple[Name, ...]:
    """The tensors outside the blocks."""
    head = () if config.tie_embeddings else (Name("lm_head.weight", "head.weight"),)
    return (
        Name("model.embed_tokens.weight", "embedding.weight"),
        Name("model.norm.weight", "backbone.norm.weight"),
        *head,
    )


def feed_forward(config: TextConfig) -> tuple[Name, ...]:
    """The gated feed-forward layer."""
    kinds = ("weight", "bias") if config.backbone.feed_forward_bias else ("weight",)
    return tuple(
        Name(f"{LAYER}.mlp.{part}_proj.{kind}", f"{OURS}.feed_forward.{part}_proj.{kind}")
        for part in ("gate", "up", "down")
        for kind in kinds
    )


def attention(config: TextConfig) -> tuple[Name, ...]:
    """The projections of softmax attention, and the norms of queries and keys."""
    backbone = config.backbone
    rotated = halves_as_pairs(backbone.resolved_head_dim)
    parts = {"q": rotated, "k": rotated, "v": SAME}
    kinds = ("weight", "bias") if backbone.qkv_bias else ("weight",)
    theirs, ours = f"{LAYER}.self_attn", f"{OURS}.attention"
    names = [
        Name(f"{theirs}.{part}_proj.{kind}", f"{ours}.{part}_proj.{kind}", layout)
        for part, layout in parts.items()
        for kind in kinds
    ]
    if backbone.qk_norm:
        names += [
            Name(f"{theirs}.{part}_norm.weight", f"{ours}.{part}_norm.weight", rotated)
            for part in "qk"
        ]
    for kind in ("weight", "bias") if backbone.out_bias else ("weight",):
        names.append(Name(f"{theirs}.o_proj.{kind}", f"{ours}.out_proj.{kind}"))
    return tuple(names)


def pre_norms() -> tuple[Name, ...]:
    """The norms before attention and feed-forward."""
    return (
        Name(f"{LAYER}.input_layernorm.weight", f"{OURS}.attention_norm.weight"),
        Name(f"{LAYER}.post_attention_layernorm.weight", f"{OURS}.feed_forward_norm.weight"),
    )


def table(config: TextConfig, *blocks: tuple[Name, ...]) -> Table:
    """The table of a decoder with these tensors in its blocks."""
    return Table(
        (*around_blocks(config), *(name for names in blocks for name in names)),
        depth=config.backbone.depth,
        derived=DERIVED,
        aliases={"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {},
    )


def llama_table(config: TextConfig) -> Table:
    """The table of Llama and of the families with its names."""
    return table(config, attention(config), pre_norms(), feed_forward(config))


def tokenizer_job(source: Source, config: TextConfig) -> Job | None:
    """The job with the tokenizer beside the weights, if there is one, its chat template and the
    tokens that end a text.

    Raises:
        ValueError: If it is not a tokenizer, or has more tokens than the model; or an id that ends
            a text is not one.
    """
    if source.tokenizer is None:
        return None
    tokenizer = HuggingFaceTokenizer.of_definition(source.origin, source.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source.origin} has {tokenizer.vocab_size} tokens, but its model "
            f"has {config.vocab_size}: without its tokenizer.json it can be converted"
        )
    reader = text_reader(source.origin)
    reader["init_args"] |= {
        "definition": tokenizer.definition,
        "start_ids": list(tokenizer.start_ids),
    }
    stop_ids = read_stop_ids(source, config.vocab_size)
    if stop_ids and stop_ids != [tokenizer.find_eos()]:
        reader["init_args"]["stop_ids"] = stop_ids
    if source.chat_template is not None:
        reader["init_args"]["chat_template"] = source.chat_template
    return Job(reader=reader)


def read_stop_ids(source: Source, vocab_size: int) -> list[int]:
    """The ids that end a generated text: `eos_token_id`, which may be a list, of
    `generation_config.json` or else of `config.json`; empty if neither has any.

    Raises:
        ValueError: If one is not the id of a token.
    """
    values = source.generation.get("eos_token_id", source.config.get("eos_token_id"))
    ids = values if isinstance(values, list) else [] if values is None else [values]
    if not all(type(each) is int and 0 <= each < vocab_size for each in ids):
        raise ValueError(
            f"{source.origin} has eos_token_id={values!r:.100}, which must be ids in [0, "
            f"{vocab_size})"
        )
    return ids
