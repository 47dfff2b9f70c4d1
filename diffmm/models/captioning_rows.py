"""Rows of a captioning model's decoder: tokens of media and texts as one sequence each."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffmm.layers.cross_attention import Context, context_mask
from diffmm.ops import AttentionMask


class Tokens(NamedTuple):
    """Tokens of media, or of texts."""

    x: Tensor
    """Inputs of the decoder's blocks, `[B, N, dim]`."""
    real: Tensor | None
    """`[B, N]` booleans, true where a token is real; None if all are."""
    documents: Tensor | None
    """The document of each token, `[B, N]`; None if there is one document per row."""


class Row(NamedTuple):
    """One sequence per row of the decoder: a prefix of `P` tokens, which are those of all media or,
    with cross-attention, one start token per document; then the texts."""

    x: Tensor
    """Inputs of the decoder's blocks, `[B, P + N, dim]`."""
    mask: AttentionMask
    """Bidirectional over media, causal over the texts, separate for each document."""
    positions: Tensor | None
    """Positions within each document, `[B, P + N]`; None for 0, 1, 2, ..."""
    real: Tensor | None
    """`[B, P + N]` booleans, false for padding of the media and before prompts; None if there is
    none."""
    documents: Tensor | None
    """The document of each token, `[B, P + N]`; None if there is one document per row."""
    num_prefix: int
    """Number of tokens of the prefix, `P`."""
    num_documents: int
    """Upper bound of the number of documents in a row."""
    context: Context | None
    """The tokens of the media that cross-attention reads; None without it."""


def make_row(media: Tokens, texts: Tokens, *, start: Tensor | None, num_documents: int) -> Row:
    """Arrange media and texts as rows.

    Args:
        media: The tokens of the media.
        texts: The tokens of the texts; both have documents, or neither.
        start: The start token of a decoder with cross-attention, `[1, dim]`; None if the media
            themselves precede the texts.
        num_documents: Upper bound of the number of documents in a row.
    """
    prefix = media if start is None else _starts(start, texts, num_documents)
    x = torch.cat([prefix.x, texts.x], dim=1)
    batch, num_prefix = prefix.x.shape[:2]
    real, documents = None, None
    if prefix.real is not None or texts.real is not None:
        real = torch.cat([_real(prefix), _real(texts)], dim=1)
    if prefix.documents is not None and texts.documents is not None:
        documents = torch.cat([prefix.documents, texts.documents], dim=1)
    context, prefix_lengths = None, None
    if start is None:
        prefix_lengths = torch.full((batch,), num_prefix, device=x.device)
    else:  # a start token attends to itself alone, as a causal mask says
        context = Context(media.x, context_mask(media.real, media.documents, documents))
    mask = AttentionMask(
        causal=True, prefix_lengths=prefix_lengths, document_ids=documents, key_padding=real
    )
    positions = _positions(real, documents, num_documents)
    return Row(x, mask, positions, real, documents, num_prefix, num_documents, context)


def before_texts(row: Row, features: Tensor) -> Tensor:
    """The features, `[B, N, dim]`, of the token before each token of the texts: of the document's
    last real token of the prefix before its first one, and of the token before it otherwise."""
    first, length = row.num_prefix, features.shape[1]
    if row.documents is None and row.real is None:
        return features[:, first - 1 : length - 1]
    documents = row.documents
    if documents is None:
        documents = torch.zeros(features.shape[:2], dtype=torch.int64, device=features.device)
    prefix, texts = documents[:, :first], documents[:, first:].long()
    own = _members(prefix, None if row.real is None else row.real[:, :first], row.num_documents)
    places = torch.arange(length, device=features.device)
    last = torch.where(own, places[:first, None], 0).amax(dim=1)
    is_first = torch.ones_like(texts, dtype=torch.bool)
    is_first[:, 1:] = texts[:, 1:] != texts[:, :-1]
    before = torch.where(is_first, last.take_along_dim(texts, dim=1), places[first:] - 1)
    return features.take_along_dim(before[..., None], dim=1)


def _starts(start: Tensor, texts: Tokens, num_documents: int) -> Tokens:
    """One start token for each document."""
    batch, device = texts.x.shape[0], texts.x.device
    documents = None
    if texts.documents is not None:
        documents = torch.arange(num_documents, device=device).expand(batch, -1)
    return Tokens(start.to(texts.x.dtype).expand(batch, num_documents, -1), None, documents)


def _real(tokens: Tokens) -> Tensor:
    if tokens.real is not None:
        return tokens.real
    return torch.ones(tokens.x.shape[:2], dtype=torch.bool, device=tokens.x.device)


def _positions(real: Tensor | None, documents: Tensor | None, num_documents: int) -> Tensor | None:
    """The position of each token within its document, `[B, L]`: the number of real tokens before
    it. None for 0, 1, 2, ..."""
    if documents is None:
        return None if real is None else (real.cumsum(dim=1) - 1).clamp(min=0)
    own = _members(documents, real, num_documents)
    counts = own.cumsum(dim=1).take_along_dim(documents[..., None].long(), dim=2).squeeze(2)
    return (counts - 1).clamp(min=0)


def _members(documents: Tensor, real: Tensor | None, num_documents: int) -> Tensor:
    """`[B, L, num_documents]` booleans, true where a token is real and of the document."""
    own = documents[..., None] == torch.arange(num_documents, device=documents.device)
    return own if real is None else own & real[..., None]
