"""The configuration of a backbone."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from diffmm.checks import Settings, check_choice
from diffmm.layers.attention import ATTENTIONS, Attention, HeadProjections, SoftmaxAttention
from diffmm.layers.block import Block
from diffmm.layers.feed_forward import FEED_FORWARDS
from diffmm.layers.linear import INIT_STD, PROJECTIONS
from diffmm.layers.norm import NORMS, make_norm
from diffmm.layers.rope import RotaryEmbedding
from diffmm.layers.rope_scaling import RopeScaling

MAX_DEPTH = 10_000
"""An upper bound that catches mistakes before the layers are built."""

ROPE_AXES = {"none": 0, "1d": 1, "2d": 2, "3d": 3}


@dataclass(frozen=True)
class BackboneConfig(Settings):
    """Configuration of a backbone, checked on creation.

    Attributes:
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Number of query heads of the softmax model of this size, whatever `attention`
            is (see `diffmm.layers.Attention`). This keeps comparisons between attentions fair.
        num_kv_heads: Number of key and value heads; `num_heads` by default.
        head_dim: Head dimension; `dim / num_heads` by default.
        attention: A name in `diffmm.layers.ATTENTIONS`: `"softmax"`, `"diff_v1"`, `"diff_v2"`,
            `"diff_grouped"`, or one added by `register_attention`.
        norm: `"rmsnorm"`, `"zero_centered_rmsnorm"`, `"layernorm"`, or one added by
            `register_norm`.
        norm_eps: `eps` of all norms, those of queries and keys included (but see
            `headwise_norm_eps`); by default 1e-5 (rmsnorm) or 1e-6 (the others).
        final_norm: Whether the output of the last block is normalized.
        parallel: Whether attention and feed-forward of a block are parallel, with one norm and one
            residual branch (see `diffmm.layers.Block`); excludes `post_norm`.
        post_norm: Whether the output of each residual branch is normalized, too.
        feed_forward: `"swiglu"`, `"gelu"`, `"geglu_tanh"` and `"gelu_tanh"` (with the tanh
            approximation), `"quick_gelu"`, `"polynorm_glu"`, or one added by
            `register_feed_forward`.
        feed_forward_width: Hidden width of the feed-forward layers. By default 8/3 (gated) or 4
            (not gated) times `dim`, reduced by the parameters that the attention has beyond softmax
            attention (the extra queries of `diff_v2`, an output gate), so that all attentions
            give the same number of parameters. A given value is used unchanged.
        rope: `"none"`, or rotary positions over one (`"1d"`), two (`"2d"`) or three (`"3d"`) axes.
        rope_base: Base of the rotary wavelengths.
        rope_scaling: How the rotary frequencies are changed for longer sequences (see
            `diffmm.layers.RopeScaling`); `rope="1d"` only.
        window: A token attends only to itself and the `window - 1` tokens before it (in a
            bidirectional model, also to as many after it); None means no limit.
        full_attention_layers: Indices of the blocks without a window.
        attention_scale: Factor of the attention scores before the softmax; `head_dim ** -0.5` by
            default.
        qkv_bias: Whether the query, key and value projections have a bias; `"qv"` for all but the
            keys.
        out_bias: Whether the output projection of the attention has a bias.
        feed_forward_bias: Whether the projections of the feed-forward layer have a bias.
        qk_norm: Whether to apply RMSNorm to queries and keys; `"layernorm"` applies LayerNorm.
        dropout: Dropout rate on the output of every residual branch, in [0, 1). Attention maps
            have no dropout, because both maps of a pair would need the same dropout mask.
        drop_path: Stochastic depth rate of the last block, in [0, 1); the rate grows linearly from
            0 in the first block.
        layer_scale: Initial value of a learned factor per channel on every residual branch; None
            means no such factor.
        init_std: Standard deviation of all initial weights (linear layers, embeddings, positions,
            heads), above 0; projections that end a residual branch get this divided by the square
            root of the number of branches. 0.02 suits widths of about 512 and above; narrower
            models learn faster with about `(3 * dim) ** -0.5`.
        output_gate: One gate per `"head"` or per `"element"` of a head, before the output
            projection; None means no gate.
        exclusive: Whether to use exclusive self-attention (see `diffmm.layers.Attention`).
        cosine_logits: Whether to use cosine-normalized attention logits; softmax only.
        attention_softcap: Smooth bound of the attention logits; softmax only.
        dex: Whether a learned projection of every head is subtracted from its output (DEX, Kong et
            al. 2025), for models trained further from softmax weights; softmax only.
        share: Whether both components share one query (`"q"`) or one key (`"k"`); v1 only.
        lambda_init: Initial lambda of every layer, instead of the paper's schedule; v1 only.
        lambda_layer_offset: Added to the index of a block for its initial lambda; v1 only.
        dual_lambda: Whether lambda has two learned numbers per layer instead of four vectors; v1
            only.
        heads_per_noise: Number of differential heads that share a second query; v1 only.
        headwise_norm: Whether heads are normalized; v1 only.
        headwise_norm_eps: `eps` of that norm; v1 only.
        combine: Whether to `"subtract"` or `"add"` the second map; all differential attentions.
        signal_per_noise: Number of signal heads per noise head; `diff_grouped` only.
        backend: Backend of the attention op; see `diffmm.ops.diff_attention`.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.

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
    norm_eps: float | None = None
    final_norm: bool = True
    parallel: bool = False
    post_norm: bool = False
    feed_forward: str = "swiglu"
    feed_forward_width: int | None = None
    rope: Literal["none", "1d", "2d", "3d"] = "none"
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    attention_scale: float | None = None
    qkv_bias: bool | Literal["qv"] = False
    out_bias: bool = False
    feed_forward_bias: bool = False
    qk_norm: bool | Literal["layernorm"] = False
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    init_std: float = INIT_STD
    cosine_logits: bool = False
    attention_softcap: float | None = None
    dex: bool = False
    share: Literal["q", "k"] | None = None
    lambda_init: float | None = None
    lambda_layer_offset: int = 0
    dual_lambda: bool = False
    heads_per_noise: int = 1
    headwise_norm: bool = True
    headwise_norm_eps: float = 1e-5
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
        if self.parallel and self.post_norm:
            raise ValueError("parallel=True has one residual branch: post_norm=True is not used")
        if self.rope_scaling is not None and self.rope == "none":
            raise ValueError("rope_scaling needs rope='1d', got rope='none'")
        layers = self.full_attention_layers
        if layers and self.window is None:
            raise ValueError(f"full_attention_layers={layers} needs a window for the other layers")
        if len(set(layers)) < len(layers) or not set(layers) <= set(range(self.depth)):
            raise ValueError(
                f"full_attention_layers must be different indices below depth={self.depth}, "
                f"got {layers}"
            )
        self._check_unused_fields()
        # Building the layers on the meta device runs their own checks and allocates nothing.
        with torch.device("meta"):
            self.make_norm()
            self.make_attention(0)
            if self.rope != "none":
                self.make_rope()

    @property
    def resolved_head_dim(self) -> int:
        """Head dimension `D`, given or derived."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def resolved_feed_forward_width(self) -> int:
        """Width of the feed-forward layers, given or derived (see `feed_forward_width`)."""
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        num_matrices = FEED_FORWARDS[self.feed_forward].num_matrices
        # A multiple that suits tensor cores, yet keeps parameter counts within 0.5%.
        step = min(64, 1 << max(0, (self.dim // 32).bit_length() - 1))
        width = max(1, round(8 * self.dim / num_matrices / step)) * step
        if extra := self.extra_parameters:
            # Subtracted from the rounded width, so that the two models differ by one rounding.
            width = max(1, round((width - extra / (num_matrices * self.dim)) / step)) * step
        return width

    @property
    def extra_parameters(self) -> int:
        """Number of parameters that the projections of this attention have beyond those of softmax
        attention with as many heads. Norms and lambda vectors are too small to count."""
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
                if isinstance(module, (*PROJECTIONS, HeadProjections))
                for parameter in module.parameters()
            )
            for layer in layers
        )
        return own - others

    def _check_unused_fields(self) -> None:
        """Raise an error for settings that this attention does not use.

        Raises:
            ValueError: The message names the field, its value and the attentions that use it.
        """
        taken = {kind: attention.config_fields() for kind, attention in ATTENTIONS.items()}
        for name, field in self.__dataclass_fields__.items():
            served = [kind for kind, names in taken.items() if name in names]
            value = getattr(self, name)
            if served and self.attention not in served and value != field.default:
                raise ValueError(
                    f"{name}={value!r} is not used by attention {self.attention!r}, only by "
                    f"{' and '.join(served)}"
                )

    def _arguments(self, attention: type[Attention]) -> dict[str, Any]:
        """The fields of this config that an attention takes as arguments."""
        names = attention.config_fields()
        return {name: getattr(self, name) for name in names if name in self.__dataclass_fields__}

    def make_attention(self, layer_index: int) -> Attention:
        """Build the attention layer of one block."""
        attention = ATTENTIONS[self.attention]
        arguments = self._arguments(attention)
        if layer_index in self.full_attention_layers:
            arguments["window"] = None
        return attention(self.dim, layer_index=layer_index, **arguments)

    def make_norm(self) -> nn.Module:
        """Build a norm over `dim`: that of a residual branch, or the final one."""
        return make_norm(self.norm, self.dim, self.norm_eps)

    def make_final_norm(self) -> nn.Module:
        """Build the norm after the last block."""
        return self.make_norm() if self.final_norm else nn.Identity()

    def make_rope(self) -> RotaryEmbedding:
        """Build the rotary embedding that all blocks share."""
        return RotaryEmbedding(
            self.resolved_head_dim, self.rope_base, ROPE_AXES[self.rope], self.rope_scaling
        )

    def make_block(self, layer_index: int) -> Block:
        """Build one block, with its own stochastic depth rate."""
        return Block(
            self.make_attention(layer_index),
            FEED_FORWARDS[self.feed_forward](
                self.dim, self.resolved_feed_forward_width, bias=self.feed_forward_bias
            ),
            (self.make_norm(), None if self.parallel else self.make_norm()),
            dim=self.dim,
            dropout=self.dropout,
            drop_path=self.drop_path * layer_index / max(1, self.depth - 1),
            layer_scale=self.layer_scale,
            post_norms=(self.make_norm(), self.make_norm()) if self.post_norm else (None, None),
        )
