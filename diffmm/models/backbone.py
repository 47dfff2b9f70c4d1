"""The one backbone: a stack of blocks between an embedding and a head."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from diffmm.checks import Settings, check_choice
from diffmm.layers.attention import ATTENTIONS, Attention
from diffmm.layers.block import Block
from diffmm.layers.cache import KVCache
from diffmm.layers.feed_forward import FEED_FORWARDS
from diffmm.layers.linear import Started
from diffmm.layers.norm import NORMS
from diffmm.layers.rope import RotaryEmbedding
from diffmm.ops import AttentionMask

INIT_STD = 0.02

MAX_DEPTH = 10_000
"""More layers would only take the time to be made."""

ROPE_AXES = {"none": 0, "1d": 1, "2d": 2}


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
        attention: `"softmax"`, `"diff_v1"` or `"diff_v2"`.
        norm: `"rmsnorm"` or `"layernorm"`.
        feed_forward: `"swiglu"` or `"gelu"`.
        feed_forward_width: obeyed if given. By default 8/3 (swiglu) or 4 (gelu) times `dim`, less
            what the attention has over softmax attention, so that the three have the same number
            of parameters: v2's extra queries come out of here.
        rope: `"none"`, `"1d"` or `"2d"` rotary positions.
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
        cosine_logits: cosine-normalized attention logits; softmax only.
        share: both components use one `"q"` or one `"k"`; v1 only.
        lambda_init: the same for every layer, in place of the paper's schedule; v1 only.
        headwise_norm: normalize heads; v1 only.
        combine: `"subtract"` or `"add"` the second map; v1 and v2.
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
    rope: Literal["none", "1d", "2d"] = "none"
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
        for name, served in (
            ("cosine_logits", ("softmax",)),
            ("share", ("diff_v1",)),
            ("lambda_init", ("diff_v1",)),
            ("headwise_norm", ("diff_v1",)),
            ("combine", ("diff_v1", "diff_v2")),
        ):
            is_set = getattr(self, name) != type(self).__dataclass_fields__[name].default
            if is_set and self.attention not in served:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} means nothing to attention "
                    f"{self.attention!r}: it is for {' and '.join(served)}"
                )
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
        if self.attention == "diff_v2":
            head_dim, extra_heads = self.resolved_head_dim, self.num_heads
            extra = self.dim * extra_heads * head_dim + self.dim * self.num_heads
            extra += extra_heads * head_dim if self.qkv_bias else 0
            # Taken off the rounded width, so that only one rounding parts the two models.
            width = max(1, round((width - extra / (num_matrices * self.dim)) / step)) * step
        return width

    def make_attention(self, layer_index: int) -> Attention:
        """The attention layer of one block."""
        own: dict[str, Any] = {}
        if self.attention == "softmax":
            own = {"cosine": self.cosine_logits}
        elif self.attention == "diff_v1":
            own = {name: getattr(self, name) for name in ("share", "lambda_init", "headwise_norm")}
        if self.attention != "softmax":
            own["combine"] = self.combine
        return ATTENTIONS[self.attention](
            self.dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            layer_index=layer_index,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            qk_norm=self.qk_norm,
            backend=self.backend,
            **own,
        )

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


class Backbone(nn.Module):
    """Blocks and a final norm: `[B, N, dim]` to `[B, N, dim]`, for every modality.

    Attributes:
        activation_checkpointing: whether blocks are recomputed in the backward pass in place of
            keeping their activations; a training choice, so it is set here and not in the config.

    >>> config = diffmm.BackboneConfig(dim=64, depth=2, num_heads=4)
    >>> backbone = diffmm.Backbone(config)
    >>> backbone(torch.randn(2, 10, 64), mask=diffmm.AttentionMask()).shape
    torch.Size([2, 10, 64])
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.rope = config.make_rope() if config.rope != "none" else None
        self.blocks = nn.ModuleList(config.make_block(index) for index in range(config.depth))
        self.norm = NORMS[config.norm](config.dim)
        self.apply(partial(init_weights, std=config.init_std))
        # Two branches a block are added up: scaled so, their sum does not grow with depth.
        for name, module in self.named_modules():
            if name.endswith(("out_proj", "down_proj")):
                init_weights(module, config.init_std * (2 * config.depth) ** -0.5)
        for attention in self.attentions:
            attention.init_head_size(config.init_std * config.dim**0.5)

    def forward(
        self,
        x: Tensor,
        *,
        mask: AttentionMask,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        indices: Collection[int] | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Run the blocks and the final norm.

        Args:
            x: `[B, N, dim]` embedded tokens.
            mask: what each token sees.
            positions: of the tokens, `[N]` or `[B, N]` (with a last axis of 2 for 2-D rope);
                0, 1, 2, ... by default, after what the cache holds. Unused without rope.
            cache: keys and values of earlier tokens, to which these are added.
            indices: blocks whose outputs, before the final norm, are wanted too.

        Returns:
            `[B, N, dim]`, and with `indices` the outputs of those blocks, in their order, in a list
            beside it.

        Raises:
            ValueError: for 2-D rope without positions, or a cache of another number of layers or
                without room for these tokens.
        """
        rope = None
        if self.rope is not None:
            if positions is None:
                if self.rope.num_axes > 1:
                    raise ValueError("2-D rope needs positions of shape [N, 2], got None")
                start = cache.length if cache is not None else 0
                positions = torch.arange(start, start + x.shape[1], device=x.device)
            rope = self.rope(positions)
        recompute = self.activation_checkpointing and self.training
        count = len(self.blocks)
        # By place and not by `layer_index`, which blocks that were copied have in common.
        caches = [None] * count if cache is None else cache.layers(count)
        intermediates = []
        for index, (block, own) in enumerate(zip(self.blocks, caches, strict=True)):
            x = block(x, mask=mask, rope=rope, cache=own, recompute=recompute)
            if indices is not None and index in indices:
                intermediates.append(x)
        if cache is not None:
            cache.advance(x.shape[1])
        x = self.norm(x)
        return x if indices is None else (x, intermediates)

    @property
    def attentions(self) -> list[Attention]:
        """The attention layer of each block."""
        return [cast(Block, block).attention for block in self.blocks]

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for this backbone, on its device and in the dtype it computes in."""
        weight = self.attentions[0].q_proj.weight
        kind = weight.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        return KVCache(
            [attention.k_shape for attention in self.attentions],
            [attention.v_shape for attention in self.attentions],
            batch=batch,
            max_length=max_length,
            dtype=torch.get_autocast_dtype(kind) if autocast else weight.dtype,
            device=weight.device,
        )


def init_weights(module: nn.Module, std: float = INIT_STD) -> None:
    """Start a layer of `diffmm.layers.linear` with weights of this size, now and at each
    `reset_parameters`; leave every other as it is."""
    if isinstance(module, Started):
        module.init_std = std
        module.reset_parameters()
