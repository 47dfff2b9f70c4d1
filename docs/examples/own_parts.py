"""A norm and a head of your own. Importing this file registers them: `norm="scale_norm"` in a
backbone's config and `head="cosine"` in an encoder's then work in every recipe's model."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffmm.layers import register_norm
from diffmm.models import register_head


@register_norm("scale_norm")
class ScaleNorm(nn.Module):
    """`g x / |x|` with one learned `g` (Nguyen and Salazar 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.init_gain = dim**0.5
        self.gain = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain, self.init_gain)

    def forward(self, x: Tensor) -> Tensor:
        return (self.gain * normalize(x.float(), dim=-1)).to(x.dtype)


@register_head("cosine")
class CosineHead(nn.Module):
    """Logits that are cosines, ten times as large."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        return 10.0 * normalize(features, dim=-1) @ normalize(self.weight, dim=-1).T
