"""Heads of classifiers."""

from torch import Tensor, nn

from diffmm.layers.linear import Linear


class DistilledHead(nn.Module):
    """A linear layer for the class token and one for the distillation token; the logits are the
    mean of both (DeiT, Touvron et al. 2021, section 4, "Classification with our approach").

    Args:
        dim: Width of the tokens.
        num_classes: Number of classes.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.cls = Linear(dim, num_classes)
        self.dist = Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map the two tokens, `[B, 2, dim]`, to logits `[B, num_classes]`."""
        return (self.cls(tokens[:, 0]) + self.dist(tokens[:, 1])) / 2
