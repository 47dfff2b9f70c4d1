"""Cross-attention: tokens that attend to those of another sequence."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmm.layers.attention import Attention
from diffmm.layers.cache import LayerCache
from diffmm.ops import AttentionMask


class Context(NamedTuple):
    """The tokens that a block's cross-attention reads, such as those of images or sounds."""

    x: Tensor
    """`[B, M, dim]`, in the width of the tokens that attend to them."""
    mask: AttentionMask
    """Which of them each token attends to, made by `context_mask`."""


def context_mask(
    real: Tensor | None = None,
    documents: Tensor | None = None,
    query_documents: Tensor | None = None,
) -> AttentionMask:
    """The mask of cross-attention from `N` queries to the `M` keys of a context.

    The queries of an `AttentionMask` are the last of its keys. For packed rows the mask therefore
    has `N` more keys, which are those of the queries themselves and are hidden: `CrossAttention`
    fills them with zeros.

    Args:
        real: `[B, M]` booleans, true where a token of the context is real; None if all are.
        documents: The document of each token of the context, `[B, M]` integers: a query attends
            only to tokens of its own. None if there is one document per row.
        query_documents: The document of each query, `[B, N]`; given if `documents` are.
    """
    if documents is None:
        return AttentionMask(key_padding=real)
    assert query_documents is not None
    visible = torch.ones_like(documents, dtype=torch.bool) if real is None else real
    hidden = torch.zeros_like(query_documents, dtype=torch.bool)
    return AttentionMask(
        document_ids=torch.cat([documents, query_documents], dim=1),
        key_padding=torch.cat([visible, hidden], dim=1),
    )


class CrossAttention(nn.Module):
    """Pre-norm cross-attention in a residual branch (Vaswani et al. 2017, section 3.2.3):

        x = x + attention(norm(x), context)

    Queries, lambda and output gates are those of the tokens `x`; keys and values are those of the
    tokens of the context, which are not normalized again. There are no rotary positions, because
    the two sequences have no axis in common: tokens of the context carry their positions in their
    features, and their order has no effect. A token whose context is empty stays as it is, unless
    the output projection has a bias.

    With a gate, a learned number that starts at 0 (Flamingo, Alayrac et al. 2022, section 3.1.2),

        x = x + tanh(gate) attention(norm(x), context),

    so that a pretrained model starts with its own outputs.

    Args:
        attention: Any layer in `diffmm.layers.attention`, without a window and not `exclusive`: a
            context has neither distances to the tokens nor values of their own.
        norm: Norm of the queries' inputs.
        branch: Processes the output of the attention before it is added.
        gated: Whether there is a gate.

    Raises:
        ValueError: If the attention has a window or is exclusive.
    """

    def __init__(
        self, attention: Attention, norm: nn.Module, branch: nn.Module, *, gated: bool = False
    ) -> None:
        super().__init__()
        if attention.exclusive:
            raise ValueError(
                "exclusive=True removes a token's own value, which is not among those of a "
                "context: set exclusive to False in cross-attention"
            )
        if attention.window is not None:
            raise ValueError(
                f"window={attention.window} counts tokens of one sequence: set it to None in "
                f"cross-attention"
            )
        self.norm = norm
        self.attention = attention
        self.branch = branch
        self.gate = nn.Parameter(torch.empty(1)) if gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Close the gate."""
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(
        self, x: Tensor, context: Context | None, cache: LayerCache | None = None
    ) -> Tensor:
        """Map `[B, N, dim]` to `[B, N, dim]`. Keys and values of a context are kept in the cache,
        if there is one, and read from it in calls without a context.

        Raises:
            ValueError: If there is no context, neither given nor in the cache.
        """
        k, v, mask = self._keys_and_values(context, cache)
        if mask.document_ids is not None:
            # The hidden keys of the queries (see `context_mask`).
            k, v = (torch.cat([t, t.new_zeros(*x.shape[:2], *t.shape[2:])], dim=1) for t in (k, v))
        found = self.branch(self.attention(self.norm(x), mask=mask, keys_and_values=(k, v)))
        return x + (found if self.gate is None else self.gate.tanh() * found)

    def _keys_and_values(
        self, context: Context | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, AttentionMask]:
        if context is not None:
            found = (*self.attention.keys_and_values(context.x), context.mask)
            if cache is not None:
                cache.keep_context(found)
            return found
        kept = None if cache is None else cache.context
        if kept is None:
            raise ValueError(
                "blocks with cross-attention need a context, the images or sounds that they read, "
                "and got none: call the model that contains them"
            )
        return kept
