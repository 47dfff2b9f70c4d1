"""Differential attention as plain softmax attention of more heads and a subtraction.

Inference engines have kernels for softmax attention whose query, key and value heads have one width
`D`, with grouped keys: query head `j` of `H'` reads key and value head `j // (H' // G')` of `G'`.
Any layer of differential attention is such an attention, followed by a subtraction:

    head_i = concat over p of (out[signal[i, p]] - lam_i out[noise[i, p]])

where `p` counts the parts of width `D` of a value: one in v2 and grouped differential attention,
two in v1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmm.checks import article
from diffmm.layers.attention import Attention
from diffmm.layers.linear import Linear


@dataclass(frozen=True)
class PlainHeads:
    """The projections of a layer, arranged by heads of plain attention.

    The scale of the scores, rotary positions, q and k norms, mask and window are those of the
    layer, head by head.

    Attributes:
        q_weight: `[H', D, dim]`, and likewise for keys and values `[G', D, dim]`.
        k_weight: See `q_weight`.
        v_weight: See `q_weight`.
        q_bias: `[H', D]`, and likewise for keys and values `[G', D]`; None if the layer has none.
        k_bias: See `q_bias`.
        v_bias: See `q_bias`.
        signal: `[H, P]`, the plain head of the first map of each head and part.
        noise: `[H, P]`, the plain head of the second map.
    """

    q_weight: Tensor
    k_weight: Tensor
    v_weight: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    signal: Tensor
    noise: Tensor

    def combine(self, out: Tensor, lam: Tensor) -> Tensor:
        """The heads `[B, N, H, P * D]` of the layer, before its headwise norm and projection
        (`Attention.finish`, `out_proj`), from the outputs of plain attention.

        Args:
            out: `[B, N, H', D]`.
            lam: `Attention.lam(x)`, a scalar or `[B, N, H]`.
        """
        factor = lam.unsqueeze(-1).unsqueeze(-1) if lam.ndim else lam
        return (out[:, :, self.signal] - factor * out[:, :, self.noise]).flatten(3).to(out.dtype)


def plain_heads(layer: Attention) -> PlainHeads:
    """Arrange the projections of a layer of differential attention by heads of plain attention.

    With `H` differential heads, `G` groups and `C` keys per group (of `Attention.components`),
    plain key head `(g C + c) P + p` has key `c` and part `p` of the value of group `g`. Each is
    read by the queries of component `c` of the heads in the group, or with one key (`C = 1`) by the
    queries of both components, each once.

    | layer | query heads `H'` | key and value heads `G'` |
    |---|---|---|
    | v2 | `2 H` | `G` |
    | grouped, `r` heads per noise head | `H + H / r` | `G` |
    | v1, `H` pairs | `4 H` | `4 G` |

    Raises:
        ValueError: If the layer subtracts no second map, or its values are not a multiple of `D`
            wide.
    """
    if not layer.is_differential:
        raise ValueError(
            f"{article(type(layer).__name__)} has one map per head: its heads are plain already"
        )
    head_dim, (num_groups, value_dim) = layer.k_shape[-1], layer.v_shape
    parts, rest = divmod(value_dim, head_dim)
    if rest:
        raise ValueError(
            f"values must be a multiple of head_dim {head_dim} wide, got {value_dim}: plain heads "
            f"have one width"
        )
    # The raw heads of the projections, arranged as the maps are.
    q, k = (
        torch.arange(torch.Size(shape[:-1]).numel()).view(1, 1, *shape[:-1], 1)
        for shape in (layer.q_shape, layer.k_shape)
    )
    q, k = (heads[0, 0, ..., 0] for heads in layer.components(q, k))  # [H, 2], [G, C]
    num_heads, num_keys = q.shape[0], k.shape[1]
    per_group = num_heads // num_groups
    queries: list[int] = []
    signal, noise = torch.empty(2, num_heads, parts, dtype=torch.int64)
    for group in range(num_groups):
        own = q[group * per_group : (group + 1) * per_group]
        for key in range(num_keys):
            readers = own[:, key].tolist() if num_keys == 2 else own.flatten().unique().tolist()
            for part in range(parts):
                for head, raw in enumerate(own, start=group * per_group):
                    first, second = raw.tolist()
                    place = head - group * per_group
                    if num_keys == 1:
                        signal[head, part] = len(queries) + readers.index(first)
                        noise[head, part] = len(queries) + readers.index(second)
                    else:
                        (signal, noise)[key][head, part] = len(queries) + place
                queries += readers
    keys = k.flatten().repeat_interleave(parts)
    values = torch.arange(num_groups * parts).view(num_groups, 1, parts)
    values = values.expand(-1, num_keys, -1).flatten()
    q_weight, q_bias = _rows(layer.q_proj, torch.tensor(queries), head_dim)
    k_weight, k_bias = _rows(layer.k_proj, keys, head_dim)
    v_weight, v_bias = _rows(layer.v_proj, values, head_dim)
    return PlainHeads(q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, signal, noise)


def _rows(linear: Linear, heads: Tensor, head_dim: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of some heads of a projection."""
    weight = linear.weight.unflatten(0, (-1, head_dim))[heads]
    return weight, None if linear.bias is None else linear.bias.view(-1, head_dim)[heads]
