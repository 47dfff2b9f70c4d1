"""What a model's parameters are, by their names: which decay, and which layer they belong to."""

import re
from collections.abc import Iterator

from torch import nn

from diffmm.layers.linear import PROJECTIONS

BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
LAMBDA = "lambda_"
"""Parameters of lambda have this in their names."""


def decaying(model: nn.Module) -> Iterator[str]:
    """The names of the parameters that take weight decay, as `named_parameters` has them: weights
    of linear and convolution layers, but for `lambda_proj` and what is tied to an embedding."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for prefix, module in model.named_modules():
        name = f"{prefix}.weight" if prefix else "weight"
        if isinstance(module, PROJECTIONS) and id(module.weight) not in tied and LAMBDA not in name:
            yield name


def layer_of(name: str, num_blocks: int) -> int:
    """The layer that a parameter belongs to, counted from the input: 0 before the blocks, `i + 1`
    for block `i`, `num_blocks + 1` after them."""
    block = BLOCK.match(name)
    if block:
        return int(block[1]) + 1
    return num_blocks + 1 if name.startswith(AFTER_BLOCKS) else 0


AFTER_BLOCKS = ("backbone.norm.", "head.", "pooling.")
"""What parameters behind the blocks are called."""
