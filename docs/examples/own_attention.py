"""An attention of your own: subtract a uniform map, so that a head keeps what stands out.

    head_i = (A_i - lambda A_uniform) V_i,   lambda = sigmoid(lambda_logit)

Importing this file registers it, and `attention="uniform_noise"` then works in every model, task,
strategy and report. What it declares is all that the library needs to know.
"""

import torch
from torch import Tensor, nn

from diffmm.layers import Attention, register_attention
from diffmm.layers.attention import HeadShapes, shared_by_heads
from diffmm.ops import AttentionMask, diff_attention


@register_attention("uniform_noise")
class UniformNoiseAttention(Attention):
    """Softmax attention less a share of the mean of all visible values."""

    label = "uniform noise"
    equation = "(<i>A</i> − <i>λ A</i><sub>uniform</sub>) <i>V</i>, one <i>λ</i> per layer"
    is_differential = True  # it has a lambda to watch

    def __init__(self, dim: int, *, combine: str = "subtract", **shared) -> None:
        super().__init__(dim, **shared)
        self.sign = 1.0 if combine == "subtract" else -1.0
        self.lambda_logit = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.lambda_logit, -2.0)

    def head_shapes(self) -> HeadShapes:
        key = (self.num_kv_heads, 1, self.head_dim)
        value = (self.num_kv_heads, self.head_dim)
        return (self.num_heads, 1, self.head_dim), key, value

    def lam(self, x: Tensor) -> Tensor:
        return self.sign * shared_by_heads(self.lambda_logit).sigmoid().squeeze(0)

    def components(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([q, torch.zeros_like(q)], dim=3), k  # no query looks anywhere: uniform

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        q, k = self.components(q, k)
        return diff_attention(q, k, v, self.lam(x), mask=mask, backend=self.backend)
