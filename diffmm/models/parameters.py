"""Parameter groups by name: which parameters have weight decay, and in which layer they are."""

import re
from collections.abc import Iterator

from torch import nn

from diffmm.layers.block import Block
from diffmm.layers.linear import PROJECTIONS

BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
LAMBDA = "lambda_"
"""The names of all lambda parameters contain this."""


def decaying(model: nn.Module) -> Iterator[str]:
    """Names of the parameters with weight decay, as in `named_parameters`: the weights of linear
    and convolution layers, except `lambda_proj` and weights tied to an embedding."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for prefix, module in model.named_modules():
        name = f"{prefix}.weight" if prefix else "weight"
        if isinstance(module, PROJECTIONS) and id(module.weight) not in tied and LAMBDA not in name:
            yield name


def block_matrices(model: nn.Module) -> Iterator[str]:
    """Names of the weights of linear layers inside the blocks, as in `named_parameters`, except
    `lambda_proj`: the matrices in the narrow sense, which map features to features."""
    for prefix, block in model.named_modules():
        for name, module in block.named_modules() if isinstance(block, Block) else ():
            if isinstance(module, nn.Linear) and LAMBDA not in name:
                yield f"{prefix}.{name}.weight"


def layer_of(name: str, num_blocks: int) -> int:
    """Index of the layer that a parameter belongs to, counted from the input: 0 before the blocks,
    `i + 1` for block `i`, `num_blocks + 1` after them."""
    block = BLOCK.match(name)
    if block:
        return int(block[1]) + 1
    return num_blocks + 1 if name.startswith(AFTER_BLOCKS) else 0


AFTER_BLOCKS = ("backbone.norm.", "head.", "pooling.", "pool_norm.")
"""Name prefixes of the parameters after the blocks."""
