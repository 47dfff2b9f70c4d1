"""The base class of all attention layers.

Letters in shapes: B batch, N tokens, M keys, H heads, G key groups, C components, D head
dimension, E value dimension.
"""

import inspect
import math
from typing import ClassVar, Literal, NotRequired, TypedDict

from torch import Tensor, nn
from torch.nn.functional import normalize

from diffmm.checks import check_choice
from diffmm.layers.cache import LayerCache
from diffmm.layers.linear import Linear
from diffmm.layers.norm import make_norm, upcast
from diffmm.layers.registry import Split
from diffmm.layers.rope import Rotation, apply_rope
from diffmm.ops import AttentionMask

QKNorm = bool | Literal["layernorm"]
"""Norm of queries and keys: none, RMSNorm (`True`) or LayerNorm."""

QKVBias = bool | Literal["qv"]
"""Projections with a bias: none, all three, or those of queries and values."""

HeadShapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class AttentionArgs(TypedDict):
    """The arguments that all attention layers share, documented in `Attention`."""

    num_heads: int
    num_kv_heads: NotRequired[int | None]
    head_dim: NotRequired[int | None]
    layer_index: NotRequired[int]
    qkv_bias: NotRequired[QKVBias]
    out_bias: NotRequired[bool]
    qk_norm: NotRequired[QKNorm]
    norm_eps: NotRequired[float | None]
    attention_scale: NotRequired[float | None]
    window: NotRequired[int | None]
    output_gate: NotRequired[Literal["head", "element"] | None]
    exclusive: NotRequired[bool]
    backend: NotRequired[str]


class Attention(nn.Module):
    """Base class of attention layers: project, apply rope, update the cache, attend, project back.

    A subclass defines how its projections split into heads (`head_shapes`) and how queries, keys
    and values are combined (`attend`). It also declares everything else that models, sharding,
    monitors and reports need, so that none of them contains a list of attention layers.

    Args:
        dim: Width of input and output.
        num_heads: Number of query heads **in the softmax layer of this size**. `diff_v1` pairs
            them into `num_heads / 2` differential heads; `diff_v2` doubles them into `num_heads`
            pairs.
        num_kv_heads: Number of key and value heads, counted in the same way; `num_heads` by
            default. Fewer means grouped-query attention.
        head_dim: Head dimension `D`; `dim / num_heads` by default.
        layer_index: Index of the layer, counted from 0, which determines the initial lambda of
            `diff_v1`. It does not change if other layers are removed.
        qkv_bias: Whether the query, key and value projections have a bias; `"qv"` for all but the
            keys, as in Whisper.
        out_bias: Whether the output projection has a bias.
        qk_norm: Whether to apply RMSNorm over `D` to queries and keys; `"layernorm"` applies
            LayerNorm.
        norm_eps: `eps` of the norms of queries and keys; None uses the default of the norm.
        attention_scale: Factor of the scores before the softmax; `D ** -0.5` by default.
        window: A token attends only to itself and the `window - 1` tokens before it (in a
            bidirectional model, also to as many after it), in addition to the mask of the call;
            None means no limit.
        output_gate: Multiply the heads by `sigmoid(gate_proj(x))` before the output projection, one
            gate per `"head"` or per `"element"` of a head (Qiu et al. 2025, "Gated Attention for
            Large Language Models", the gate after attention).
        exclusive: Exclusive self-attention (2026): remove from a head's output its component along
            the token's own value, `o - (o·v̂) v̂` with `v̂ = v / |v|`, which the residual stream
            already carries. In `diff_v1` this precedes the headwise norm.
        backend: Backend of the attention op; see `diffmm.ops.diff_attention`.

    Attributes:
        scale: Factor applied to the scores before the softmax.
        softcap: Bound of the scores (see `SoftmaxAttention`); None means no bound.

    Raises:
        ValueError: If head counts do not divide as required, `attention_scale` or `window` is not
            positive, or `output_gate`, `qk_norm` or `qkv_bias` is unknown.
    """

    label: ClassVar[str]
    """Name of the layer in tables and charts."""

    equation: ClassVar[str]
    """Equation of a head, as HTML for reports."""

    is_differential: ClassVar[bool] = False
    """Whether the layer subtracts a second map, so that `lam` is not None."""

    split: ClassVar[dict[str, Split]] = {
        "q_proj": "columns",
        "k_proj": "columns",
        "v_proj": "columns",
        "gate_proj": "columns",
        "out_proj": "rows",
        "q_norm": "heads",
        "k_norm": "heads",
    }
    """How tensor parallelism splits each child module, so that every device has a part of the
    heads: a projection by its output (`"columns"`) or its input (`"rows"`), a norm by the
    `"heads"` in its input. Parameters of the layer itself are replicated on every device (see
    `shared_by_heads`)."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_index: int = 0,
        qkv_bias: QKVBias = False,
        out_bias: bool = False,
        qk_norm: QKNorm = False,
        norm_eps: float | None = None,
        attention_scale: float | None = None,
        window: int | None = None,
        output_gate: Literal["head", "element"] | None = None,
        exclusive: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("output_gate", output_gate, (None, "head", "element"))
        check_choice("qk_norm", qk_norm, (False, True, "layernorm"))
        check_choice("qkv_bias", qkv_bias, (False, True, "qv"))
        if attention_scale is not None and attention_scale <= 0.0:
            raise ValueError(f"attention_scale must be positive, got {attention_scale}")
        if isinstance(window, float):
            raise ValueError(f"window must be an integer, the number of tokens, got {window}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 (the token itself), got {window}")
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(
                f"num_heads must divide dim, got {num_heads} heads for dim {dim}: "
                f"change one of them or set head_dim"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {num_heads}"
            )
        self.layer_index = layer_index
        self.scale = self.head_dim**-0.5 if attention_scale is None else attention_scale
        self.softcap: float | None = None
        self.window = window
        self.exclusive = exclusive
        self.backend = backend
        self.q_shape, self.k_shape, self.v_shape = self.head_shapes()
        self.q_proj = Linear(dim, math.prod(self.q_shape), bias=bool(qkv_bias))
        self.k_proj = Linear(dim, math.prod(self.k_shape), bias=qkv_bias is True)
        self.v_proj = Linear(dim, math.prod(self.v_shape), bias=bool(qkv_bias))
        width = num_heads * self.head_dim
        self.out_proj = Linear(width, dim, bias=out_bias)
        norm = qk_norm if isinstance(qk_norm, str) else "rmsnorm"
        self.q_norm, self.k_norm = (
            make_norm(norm, self.head_dim, norm_eps) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.gate_proj: Linear | None = None
        self.gate_width = 1
        if output_gate is not None:
            value_dim = self.v_shape[-1]
            self.gate_width = 1 if output_gate == "head" else value_dim
            self.gate_proj = Linear(dim, width // value_dim * self.gate_width, bias=False)

    def head_shapes(self) -> HeadShapes:
        """Shapes of one token's query, key and value: `(H, [C,] D)`, `(G, [C,] D)`, `(G, E)`."""
        raise NotImplementedError

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """Compute the heads, `[B, N, H, E]`, from queries, keys and values; `x` is the layer's
        input."""
        raise NotImplementedError

    def components(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Arrange the queries and keys of `project` by attention map: `[B, N, H, C, D]` and
        `[B, M, G, C, D]` (or `[B, M, G, 1, D]` if all components share a key)."""
        return q, k

    def lam(self, x: Tensor) -> Tensor | None:
        """The factor of the second map for the layer's input `x`: a scalar or `[B, N, H]`, in
        float32; None if there is no second map."""
        return None

    @property
    def shares(self) -> dict[str, int]:
        """Counts that the number of tensor-parallel devices must divide, keyed by description."""
        return {"number of heads": self.q_shape[0], "number of key groups": self.k_shape[0]}

    @classmethod
    def config_fields(cls) -> list[str]:
        """Names of the keyword arguments, the layer's own first, then the shared ones. Each is a
        field of `BackboneConfig`, except `layer_index`."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        return list(dict.fromkeys([*own, *AttentionArgs.__annotations__]))

    def init_head_size(self, size: float) -> None:
        """Initialize the layer so that the root mean square of its heads is at most `size`, that
        of a value. Averages of values already satisfy this."""

    def queries(self, x: Tensor) -> Tensor:
        """Compute the queries of `x` in the shape that `attend` takes, before rope."""
        # -1, because under tensor parallelism a process has only a part of the heads.
        return self.q_norm(self.q_proj(x).unflatten(-1, (-1, *self.q_shape[1:])))

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the keys, before rope, and the values of `x`, likewise."""
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, *self.k_shape[1:])))
        return k, self.v_proj(x).unflatten(-1, (-1, *self.v_shape[1:]))

    def project(self, x: Tensor, rope: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the queries, keys and values of `x` in the shapes that `attend` takes."""
        q, (k, v) = self.queries(x), self.keys_and_values(x)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def narrowed(self, mask: AttentionMask) -> AttentionMask:
        """Restrict the mask of a call to the layer's window."""
        return mask if self.window is None else mask.within(self.window)

    def finish(self, heads: Tensor) -> Tensor:
        """Process the heads before the output gate and projection."""
        return heads

    def forward(
        self,
        x: Tensor,
        *,
        mask: AttentionMask,
        rope: Rotation | None = None,
        cache: LayerCache | None = None,
        keys_and_values: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Map `[B, N, dim]` to `[B, N, dim]`. With a cache, `mask` covers all keys so far. Given
        the keys and values of other tokens (`diffmm.layers.CrossAttention`), `x` attends to these,
        without rope and cache."""
        if keys_and_values is None:
            q, k, v = self.project(x, rope)
        else:
            assert rope is None
            assert cache is None
            q, (k, v) = self.queries(x), keys_and_values
        own_value = v
        if cache is not None:
            k, v = cache.update(k, v)
        heads = self.attend(x, q, k, v, self.narrowed(mask))
        if self.exclusive:
            heads = without_component(heads, own_value)
        heads = self.finish(heads)
        if self.gate_proj is not None:
            heads = heads * self.gate_proj(x).sigmoid().unflatten(-1, (-1, self.gate_width))
        return self.out_proj(heads.flatten(2))


def without_component(heads: Tensor, value: Tensor) -> Tensor:
    """Compute `o - (o·v̂) v̂` for heads `[B, N, H, E]` and values `[B, N, G, E]` of the same
    tokens."""
    direction = normalize(upcast(value), dim=-1)
    direction = direction.repeat_interleave(heads.shape[2] // value.shape[2], dim=2)
    wide = upcast(heads)
    return (wide - (wide * direction).sum(-1, keepdim=True) * direction).to(heads.dtype)


def shared_by_heads(parameter: Tensor) -> Tensor:
    """Return a parameter that all heads use as a plain tensor. Under tensor parallelism it is
    replicated while the heads are split, so its gradient is the sum over all processes."""
    if type(parameter) in (Tensor, nn.Parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial  # this import takes 0.3 s

    # `hasattr(parameter, "to_local")` would be false while Dynamo traces.
    if isinstance(parameter, DTensor):
        return parameter.to_local(grad_placements=[Partial()])
    return parameter
