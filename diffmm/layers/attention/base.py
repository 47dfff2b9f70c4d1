"""What all attention layers share, and what each of them declares about itself.

Letters: B batch, N tokens, M keys, H heads, G key groups, C components, D head dim, E value dim.
"""

import inspect
import math
from typing import ClassVar, Literal, NotRequired, TypedDict

from torch import Tensor, nn
from torch.nn.functional import normalize

from diffmm.checks import check_choice
from diffmm.layers.cache import LayerCache
from diffmm.layers.linear import Linear
from diffmm.layers.norm import RMSNorm, upcast
from diffmm.layers.registry import Split
from diffmm.layers.rope import Rotation, apply_rope
from diffmm.ops import AttentionMask

HeadShapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class AttentionArgs(TypedDict):
    """The arguments that all attention layers share; `Attention` says what they mean."""

    num_heads: int
    num_kv_heads: NotRequired[int | None]
    head_dim: NotRequired[int | None]
    layer_index: NotRequired[int]
    qkv_bias: NotRequired[bool]
    out_bias: NotRequired[bool]
    qk_norm: NotRequired[bool]
    output_gate: NotRequired[Literal["head", "element"] | None]
    exclusive: NotRequired[bool]
    backend: NotRequired[str]


class Attention(nn.Module):
    """Project, rotate, remember, attend, project back.

    A subclass says how its projections split (`head_shapes`) and how queries, keys and values
    become heads (`attend`). What else the library wants to know of it is declared here, too, so
    that models, sharding, monitors and reports need no list of attention layers.

    Args:
        dim: Width of input and output.
        num_heads: Query heads of `head_dim` **in the softmax layer of this size**. `diff_v1` pairs
            them into `num_heads / 2` differential heads, `diff_v2` doubles them into `num_heads`
            pairs.
        num_kv_heads: Key and value heads, counted in the same way; `num_heads` by default. Fewer
            means grouped keys.
        head_dim: `D`, `dim / num_heads` by default.
        layer_index: The layer's number from 0, which decides where lambda starts in `diff_v1`. It
            stays with a layer whatever happens to its neighbours.
        qkv_bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the output projection has one.
        qk_norm: Whether queries and keys get an RMSNorm over `D` each.
        output_gate: Multiply the heads by `sigmoid(gate_proj(x))` before the output projection, one
            gate per `"head"` or per `"element"` of it (Qiu et al. 2025, "Gated Attention for Large
            Language Models", the gate after attention).
        exclusive: Exclusive self-attention: what a head gathers loses its component along the
            token's own value, `o - (o·v̂) v̂` with `v̂ = v / |v|`, since the residual stream carries
            that already (2026). In `diff_v1` this comes before the headwise norm.
        backend: Backend of the op, see `diffmm.ops.diff_attention`.

    Attributes:
        scale: What multiplies the scores before the softmax.

    Raises:
        ValueError: For counts that do not divide each other, or an unknown `output_gate`.
    """

    label: ClassVar[str]
    """Its name in tables and charts."""

    equation: ClassVar[str]
    """What a head is, as HTML for reports."""

    is_differential: ClassVar[bool] = False
    """Whether it subtracts a second map, so that `lam` is not None."""

    split: ClassVar[dict[str, Split]] = {
        "q_proj": "columns",
        "k_proj": "columns",
        "v_proj": "columns",
        "gate_proj": "columns",
        "out_proj": "rows",
        "q_norm": "heads",
        "k_norm": "heads",
    }
    """How each child module is divided among the devices of tensor parallelism, which share out the
    heads: a projection by its output `"columns"` or by its input `"rows"`, a norm by the `"heads"`
    in its input. Parameters of the layer itself are whole on every device (see
    `shared_by_heads`)."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_index: int = 0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        output_gate: Literal["head", "element"] | None = None,
        exclusive: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("output_gate", output_gate, (None, "head", "element"))
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(
                f"num_heads must divide dim, got {num_heads} heads for dim {dim}: "
                f"change one of them or give head_dim"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {num_heads}"
            )
        self.layer_index = layer_index
        self.scale = self.head_dim**-0.5
        self.exclusive = exclusive
        self.backend = backend
        self.q_shape, self.k_shape, self.v_shape = self.head_shapes()
        self.q_proj = Linear(dim, math.prod(self.q_shape), bias=qkv_bias)
        self.k_proj = Linear(dim, math.prod(self.k_shape), bias=qkv_bias)
        self.v_proj = Linear(dim, math.prod(self.v_shape), bias=qkv_bias)
        width = num_heads * self.head_dim
        self.out_proj = Linear(width, dim, bias=out_bias)
        self.q_norm: nn.Module = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.gate_proj: Linear | None = None
        self.gate_width = 1
        if output_gate is not None:
            value_dim = self.v_shape[-1]
            self.gate_width = 1 if output_gate == "head" else value_dim
            self.gate_proj = Linear(dim, width // value_dim * self.gate_width, bias=False)

    def head_shapes(self) -> HeadShapes:
        """How one token's query, key and value split: `(H, [C,] D)`, `(G, [C,] D)`, `(G, E)`."""
        raise NotImplementedError

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """Queries, keys and values to heads, `[B, N, H, E]`; `x` is the layer's input."""
        raise NotImplementedError

    def components(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The queries and keys of `project` as the maps of each head: `[B, N, H, C, D]` and
        `[B, M, G, C, D]` (or with one key for all components)."""
        return q, k

    def lam(self, x: Tensor) -> Tensor | None:
        """What the second map is multiplied by before it is subtracted, for the layer's input `x`:
        a scalar or `[B, N, H]`, in float32; None where there is no second map."""
        return None

    @property
    def shares(self) -> dict[str, int]:
        """The counts that the number of tensor-parallel devices must divide, by what they count."""
        return {"number of heads": self.q_shape[0], "number of key groups": self.k_shape[0]}

    @classmethod
    def config_fields(cls) -> list[str]:
        """The names of its keyword arguments, each a field of `BackboneConfig` but for
        `layer_index`: its own first, then those that all layers share."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        return list(dict.fromkeys([*own, *AttentionArgs.__annotations__]))

    def init_head_size(self, size: float) -> None:
        """Start with heads whose root mean square is at most `size`, which is that of a value.
        Averages of values already are no larger."""

    def project(self, x: Tensor, rope: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of `x`, as `attend` takes them."""
        # Under tensor parallelism a process has a share of the heads: hence -1.
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, *self.q_shape[1:])))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, *self.k_shape[1:])))
        v = self.v_proj(x).unflatten(-1, (-1, *self.v_shape[1:]))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def finish(self, heads: Tensor) -> Tensor:
        """What is left to do to the heads before the output gate and projection."""
        return heads

    def forward(
        self,
        x: Tensor,
        *,
        mask: AttentionMask,
        rope: Rotation | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`. With a cache, `mask` speaks of all keys seen so far."""
        q, k, v = self.project(x, rope)
        own_value = v
        if cache is not None:
            k, v = cache.update(k, v)
        heads = self.attend(x, q, k, v, mask)
        if self.exclusive:
            heads = without_component(heads, own_value)
        heads = self.finish(heads)
        if self.gate_proj is not None:
            heads = heads * self.gate_proj(x).sigmoid().unflatten(-1, (-1, self.gate_width))
        return self.out_proj(heads.flatten(2))


def without_component(heads: Tensor, value: Tensor) -> Tensor:
    """`o - (o·v̂) v̂` for heads `[B, N, H, E]` and the values `[B, N, G, E]` of the same tokens."""
    direction = normalize(upcast(value), dim=-1)
    direction = direction.repeat_interleave(heads.shape[2] // value.shape[2], dim=2)
    wide = upcast(heads)
    return (wide - (wide * direction).sum(-1, keepdim=True) * direction).to(heads.dtype)


def shared_by_heads(parameter: Tensor) -> Tensor:
    """A parameter that all heads use, as a plain tensor. Under tensor parallelism each process has
    all of it and some of the heads, so that the gradients of all processes add up to its own."""
    if type(parameter) in (Tensor, nn.Parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial  # a third of a second

    # Not `hasattr(parameter, "to_local")`, which is false while Dynamo traces.
    if isinstance(parameter, DTensor):
        return parameter.to_local(grad_placements=[Partial()])
    return parameter
