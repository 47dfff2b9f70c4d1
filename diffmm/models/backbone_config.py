"""Everything that decides a backbone."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffmm.checks import Settings, check_choice
from diffmm.layers.attention import ATTENTIONS, Attention, SoftmaxAttention
from diffmm.layers.block import Block
from diffmm.layers.feed_forward import FEED_FORWARDS
from diffmm.layers.linear import INIT_STD, PROJECTIONS
from diffmm.layers.norm import NORMS
from diffmm.layers.rope import RotaryEmbedding

MAX_DEPTH = 10_000
"""More layers would only take the time to be made."""

ROPE_AXES = {"none": 0, "1d": 1, "2d": 2, "3d": 3}


@dataclass(frozen=True)
class BackboneConfig(Settings):
    """Everything that decides a backbone, checked when it is made.

    Attributes:
        dim: width of the residual stream.
        depth: number of blocks.
        num_heads: query heads in the softmax model of this size, whatever `attention` is (see
            `diffmm.layers.Attention`): the one number that keeps comparisons fair.
        num_kv_heads: key and value heads, `num_heads` by default.
        head_dim: `dim / num_heads` by default.
        attention: a name in `diffmm.layers.ATTENTIONS`: `"softmax"`, `"diff_v1"`, `"diff_v2"`,
            `"diff_grouped"`, or one that `register_attention` added.
        norm: `"rmsnorm"`, `"layernorm"`, or one that `register_norm` added.
        feed_forward: `"swiglu"`, `"gelu"`, or one that `register_feed_forward` added.
        feed_forward_width: obeyed if given. By default 8/3 (swiglu) or 4 (gelu) times `dim`, less
            what the attention has over plain softmax attention (the extra queries of `diff_v2`, an
            output gate), so that models of all attentions have the same number of parameters.
        rope: `"none"`, or rotary positions of `"1d"`, `"2d"` or `"3d"`.
        rope_base: the base of their wavelengths.
        qkv_bias, out_bias, feed_forward_bias: which projections have a bias.
        qk_norm: RMSNorm on queries and keys.
        dropout: rate on every branch's output, in [0, 1). Attention maps are never dropped: two
            maps would need one mask.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        layer_scale: start of a learned factor a channel on every branch; none by default.
        init_std: standard deviation of all weights at the start (linear layers, embeddings,
            positions, heads), above 0; projections that end a branch get less, by the square root
            of the number of branches. 0.02 suits widths from about 512 on; narrow models learn
            faster from about `(3 * dim) ** -0.5`.
        output_gate: one gate per `"head"` or per `"element"` of it, before the output projection.
        exclusive: exclusive self-attention (see `diffmm.layers.Attention`).
        cosine_logits: cosine-normalized attention logits; softmax only.
        share: both components use one `"q"` or one `"k"`; v1 only.
        lambda_init: the same for every layer, in place of the paper's schedule; v1 only.
        headwise_norm: normalize heads; v1 only.
        combine: `"subtract"` or `"add"` the second map; all differential attentions.
        signal_per_noise: signal heads that share a noise head; `diff_grouped` only.
        backend: of the attention op.

    Raises:
        ValueError: naming the field and the value.

    >>> config = diffmm.BackboneConfig(dim=64, depth=2, num_heads=4, attention="diff_v2")
    >>> config.resolved_head_dim
    16
    """

    dim: int
    depth: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    attention: str = "diff_v1"
    norm: str = "rmsnorm"
    feed_forward: str = "swiglu"
    feed_forward_width: int | None = None
    rope: Literal["none", "1d", "2d", "3d"] = "none"
    rope_base: float = 10000.0
    qkv_bias: bool = False
    out_bias: bool = False
    feed_forward_bias: bool = False
    qk_norm: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    init_std: float = INIT_STD
    cosine_logits: bool = False
    share: Literal["q", "k"] | None = None
    lambda_init: float | None = None
    headwise_norm: bool = True
    combine: Literal["subtract", "add"] = "subtract"
    signal_per_noise: int = 4
    output_gate: Literal["head", "element"] | None = None
    exclusive: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim", "depth", "num_heads", "num_kv_heads", "head_dim", "feed_forward_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"depth must be at most {MAX_DEPTH:,}, got {self.depth:,}")
        for name in ("dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.init_std <= 0.0:
            raise ValueError(f"init_std must be positive, got {self.init_std}")
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("feed_forward", self.feed_forward, FEED_FORWARDS)
        check_choice("rope", self.rope, ROPE_AXES)
        self._refuse_fields_of_others()
        # Whatever the layers refuse, the config refuses: building them on no device costs nothing.
        with torch.device("meta"):
            self.make_attention(0)
            if self.rope != "none":
                self.make_rope()

    @property
    def resolved_head_dim(self) -> int:
        """`D`, given or derived."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def resolved_feed_forward_width(self) -> int:
        """The feed-forward's width, given or derived (see `feed_forward_width`)."""
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        num_matrices = FEED_FORWARDS[self.feed_forward].num_matrices
        # A multiple that tensor cores like, yet fine enough to keep the counts within 0.5%.
        step = min(64, 1 << max(0, (self.dim // 32).bit_length() - 1))
        width = max(1, round(8 * self.dim / num_matrices / step)) * step
        if extra := self.extra_parameters:
            # Taken off the rounded width, so that only one rounding parts the two models.
            width = max(1, round((width - extra / (num_matrices * self.dim)) / step)) * step
        return width

    @property
    def extra_parameters(self) -> int:
        """How many more parameters the projections of this attention have than those of softmax
        attention with as many heads. (Norms and lambda vectors are lost in rounding.)"""
        with torch.device("meta"):
            plain = SoftmaxAttention(
                self.dim,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                qkv_bias=self.qkv_bias,
                out_bias=self.out_bias,
            )
            layers = (self.make_attention(0), plain)
        own, others = (
            sum(
                parameter.numel()
                for module in layer.modules()
                if isinstance(module, PROJECTIONS)
                for parameter in module.parameters()
            )
            for layer in layers
        )
        return own - others

    def _refuse_fields_of_others(self) -> None:
        """Refuse what is set, but means nothing to this attention.

        Raises:
            ValueError: Naming the field, its value and the attentions that take it.
        """
        taken = {kind: attention.config_fields() for kind, attention in ATTENTIONS.items()}
        for name, field in self.__dataclass_fields__.items():
            served = [kind for kind, names in taken.items() if name in names]
            value = getattr(self, name)
            if served and self.attention not in served and value != field.default:
                raise ValueError(
                    f"{name}={value!r} means nothing to attention {self.attention!r}: it is for "
                    f"{' and '.join(served)}"
                )

    def _arguments(self, attention: type[Attention]) -> dict[str, Any]:
        """What an attention takes of this config."""
        names = attention.config_fields()
        return {name: getattr(self, name) for name in names if name in self.__dataclass_fields__}

    def make_attention(self, layer_index: int) -> Attention:
        """The attention layer of one block."""
        attention = ATTENTIONS[self.attention]
        return attention(self.dim, layer_index=layer_index, **self._arguments(attention))

    def make_rope(self) -> RotaryEmbedding:
        """The rotary embedding that all blocks share."""
        return RotaryEmbedding(self.resolved_head_dim, self.rope_base, ROPE_AXES[self.rope])

    def make_block(self, layer_index: int) -> Block:
        """One block, with its share of the stochastic depth."""
        norm = NORMS[self.norm]
        return Block(
            self.make_attention(layer_index),
            FEED_FORWARDS[self.feed_forward](
                self.dim, self.resolved_feed_forward_width, bias=self.feed_forward_bias
            ),
            (norm(self.dim), norm(self.dim)),
            dim=self.dim,
            dropout=self.dropout,
            drop_path=self.drop_path * layer_index / max(1, self.depth - 1),
            layer_scale=self.layer_scale,
        )
