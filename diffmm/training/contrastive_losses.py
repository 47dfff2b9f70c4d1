"""Losses of contrastive training, over the pairs of all processes.

Each of `B` samples is a pair of an image or sound and a text. Every other sample of the batch is a
negative: it belongs to another sample. This is wrong for samples that are known to match because
they have the same medium or the same text; such pairs are left out, neither positive nor negative.
Without duplicates, the losses are those of open_clip's `ClipLoss` and `SigLipLoss`.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

MULTIPLIER = 6364136223846793005
"""Factor of the polynomial that identifies a text: that of Knuth's random numbers of 64 bits."""


class Pairs(NamedTuple):
    """Embeddings of pairs, and numbers that are equal for equal media and texts."""

    media: Tensor
    """Embeddings of the images or sounds, `[B, D]`, of norm 1."""
    texts: Tensor
    """Embeddings of the texts, `[B, D]`, of norm 1."""
    media_ids: Tensor | None
    """`[B]` int64; None if all media differ."""
    text_ids: Tensor
    """`[B]` int64, as of `text_ids`."""

    def at(self, place: slice | Tensor) -> "Pairs":
        """The pairs at a place."""
        ids = None if self.media_ids is None else self.media_ids[place]
        return Pairs(self.media[place], self.texts[place], ids, self.text_ids[place])


class Loss(Protocol):
    """A contrastive loss."""

    def __call__(
        self, own: Pairs, every: Pairs, first: int, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return the summed loss of a share of the pairs, a scalar.

        Args:
            own: The share, `B` pairs.
            every: All pairs that they are compared with, including the share.
            first: Position of the share in `every`.
            scale: Factor of the cosine similarities, a scalar.
            bias: Term added to them, a scalar; None without one.
        """


def clip_loss(own: Pairs, every: Pairs, first: int, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Symmetric cross-entropy (CLIP, Radford et al. 2021, figure 3), summed over the share:

        1/2 sum_i (-log softmax_j(scale x_i · y_j)_i - log softmax_j(scale y_i · x_j)_i)

    with media `x` and texts `y`. It does not depend on a bias. Computed in float32, or float64.
    Arguments as in `Loss`.
    """
    targets = torch.arange(first, first + len(own.media), device=own.media.device)
    ignored = ignored_pairs(own, every, first)
    total = scale.new_zeros(())
    for queries, keys in ((own.media, every.texts), (own.texts, every.media)):
        logits = similarities(queries, keys, scale, None).masked_fill(ignored, -torch.inf)
        total = total + cross_entropy(logits, targets, reduction="sum")
    return total / 2


def siglip_loss(own: Pairs, every: Pairs, first: int, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Sigmoid loss of all pairs (SigLIP, Zhai et al. 2023, equation 1), summed over the share:

        - sum_i sum_j log sigmoid(z_ij (scale x_i · y_j + bias)),    z_ij = 1 if i = j, else -1

    with media `x` and texts `y`. Computed in float32, or float64. Arguments as in `Loss`.
    """
    logits = similarities(own.media, every.texts, scale, bias)
    columns = torch.arange(len(every.texts), device=logits.device)
    is_own = columns == torch.arange(first, first + len(logits), device=logits.device)[:, None]
    losses = -logsigmoid(torch.where(is_own, logits, -logits))
    return losses.masked_fill(ignored_pairs(own, every, first), 0.0).sum()


LOSSES: dict[str, Loss] = {"clip": clip_loss, "siglip": siglip_loss}
"""Values of `Contrastive(loss=...)`."""


def similarities(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled similarities with a bias, `[B, G]`, at full precision under autocast, too: a scale of
    100 would make the error of bfloat16 larger than typical differences."""
    with torch.autocast(queries.device.type, enabled=False):
        logits = scale * (queries @ keys.T)
        return logits if bias is None else logits + bias


def ignored_pairs(own: Pairs, every: Pairs, first: int) -> Tensor:
    """`[B, G]` booleans: true for samples other than its own that a sample is known to match,
    because they have the same medium or the same text."""
    same = own.text_ids[:, None] == every.text_ids
    if own.media_ids is not None:
        assert every.media_ids is not None
        same |= own.media_ids[:, None] == every.media_ids
    same.diagonal(first).fill_(False)
    return same


def text_ids(tokens: Tensor, num_tokens: Tensor) -> Tensor:
    """Numbers that are equal for equal texts, whatever their padding, and differ for others: a hash
    of 64 bits.

    Args:
        tokens: Token ids, `[B, N]`, padded on the right.
        num_tokens: Number of real tokens of each text, `[B]`.

    Returns:
        `[B]` int64.
    """
    powers = torch.full_like(tokens[0], MULTIPLIER).cumprod(0)  # modulo 2 ** 64
    is_real = torch.arange(tokens.shape[1], device=tokens.device) < num_tokens[:, None]
    return ((tokens + 1) * powers * is_real).sum(dim=1)


def gathered(pairs: Pairs, group: Any) -> tuple[Pairs, int]:
    """Gather the pairs of all processes, with the gradients of their embeddings.

    Args:
        pairs: The pairs of this process, equally many on all of them.
        group: The process group; None for a single process.

    Returns:
        All pairs, in the order of the ranks, and the position of the first one of this process.
    """
    if group is None:
        return pairs, 0

    parts: Any = (None if part is None else _Gather.apply(part, group) for part in pairs)
    every = Pairs(*parts)
    return every, group.rank() * len(pairs.media)


class _Gather(torch.autograd.Function):
    """Concatenates the tensors of all processes. The gradient of each is the sum of those of all
    processes. (`torch.distributed.nn.functional.all_gather` fails for gloo's subgroups.)"""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.count = group, len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total.narrow(0, ctx.group.rank() * ctx.count, ctx.count), None
