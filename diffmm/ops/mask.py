"""The attention mask: which keys each query attends to."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

PER_SAMPLE = ("prefix_lengths", "document_ids", "key_padding")
TENSORS = (*PER_SAMPLE, "num_keys")


@dataclass(frozen=True)
class AttentionMask:
    """Which keys each query attends to. All given restrictions apply; without any, every query
    attends to every key.

    With `N` queries and `M` keys, the queries are the **last** `N` positions: query `n` has
    position `n + M - N` (bottom-right alignment, as decoding with a key-value cache needs). With
    `num_keys`, only that many of the keys exist, and take the place of `M` in all of this.

    The mask is registered as a pytree whose leaves are its tensors, so that `torch.export` accepts
    it as an input; `num_keys` is a leaf only if it is given.

    Args:
        causal: Whether a query attends only to keys up to its own position.
        window: A query attends to itself and the `window - 1` keys before it and, if the mask is
            not causal, as many after it. At least 1; None means no limit.
        prefix_lengths: `[B]` integers; every query attends to the keys before this position, so
            the mask is bidirectional over the prefix and causal after it. Requires `causal`.
        document_ids: `[B, M]` integers; a query attends only to keys of its own document.
        key_padding: `[B, M]` booleans, true where a key is real.
        num_keys: Number of keys that exist, an integer tensor without axes, at least `N` and at
            most `M`: the first ones of a buffer, such as that of a cache whose shape is always the
            same. By default, all `M`.

    Raises:
        ValueError: If `window` is below 1 or a float, `prefix_lengths` is given without `causal`,
            or a tensor has the wrong number of axes or dtype.

    >>> diffmm.AttentionMask(causal=True, window=2).to_bool(3, 3)[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """

    causal: bool = False
    window: int | None = None
    prefix_lengths: Tensor | None = None
    document_ids: Tensor | None = None
    key_padding: Tensor | None = None
    num_keys: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.window, float):
            raise ValueError(f"window must be an integer, the number of keys, got {self.window}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (the query itself), got {self.window}")
        if self.prefix_lengths is not None and not self.causal:
            raise ValueError(
                "prefix_lengths needs causal=True: without it the prefix has no effect"
            )
        for name, tensor, num_dims in (
            ("prefix_lengths", self.prefix_lengths, 1),
            ("document_ids", self.document_ids, 2),
            ("key_padding", self.key_padding, 2),
            ("num_keys", self.num_keys, 0),
        ):
            if tensor is None:
                continue
            if tensor.ndim != num_dims:
                wanted = ("a tensor without axes", "[B]", "[B, M]")[num_dims]
                raise ValueError(f"{name} must be {wanted}, got shape {tuple(tensor.shape)}")
            if (tensor.dtype == torch.bool) != (name == "key_padding") or (
                tensor.is_floating_point()
            ):
                wanted = "booleans" if name == "key_padding" else "integers"
                raise ValueError(f"{name} must hold {wanted}, got {tensor.dtype}")

    @property
    def per_sample(self) -> bool:
        """Whether the mask differs between the samples of a batch."""
        return any(getattr(self, name) is not None for name in PER_SAMPLE)

    @property
    def is_full(self) -> bool:
        """Whether every query attends to every key."""
        is_limited = self.causal or self.window is not None or self.num_keys is not None
        return not (is_limited or self.per_sample)

    @property
    def is_causal(self) -> bool:
        """Whether every query attends to exactly the keys up to its own position."""
        is_limited = self.window is not None or self.num_keys is not None
        return self.causal and not (is_limited or self.per_sample)

    def within(self, window: int) -> "AttentionMask":
        """The same mask, restricted to a window (see `window`) where it has no smaller one."""
        smaller = window if self.window is None else min(window, self.window)
        return dataclasses.replace(self, window=smaller)

    def check(self, batch: int, num_keys: int) -> None:
        """Check that the tensors match `batch` samples of `num_keys` keys.

        Raises:
            ValueError: If one does not; the message names the tensor and both shapes.
        """
        for name in PER_SAMPLE:
            tensor = getattr(self, name)
            wanted = (batch,) if name == "prefix_lengths" else (batch, num_keys)
            if tensor is not None and tuple(tensor.shape) != wanted:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, but the keys need {wanted}"
                )

    def to_bool(
        self,
        num_queries: int,
        num_keys: int,
        device: torch.device | str | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The mask as booleans, `[1 or B, 1, N, M]`, true where the query attends to the key.

        Args:
            num_queries: Number of queries `N`.
            num_keys: Number of keys `M`.
            device: Device of the result; by default that of the mask's own tensors.
            rows: Indices of some queries, `[R]`; the result is then `[1 or B, 1, R, M]`.

        Raises:
            ValueError: If there are `document_ids` and more queries than keys: the first queries
                would belong to no document.
        """
        if self.document_ids is not None and num_queries > num_keys:
            raise ValueError(
                f"document_ids needs a key for every query, got {num_queries} queries "
                f"and {num_keys} keys"
            )
        for name in TENSORS:
            tensor = getattr(self, name)
            if device is None and tensor is not None:
                device = tensor.device
        key = torch.arange(num_keys, device=device)
        end = num_keys if self.num_keys is None else self.num_keys
        query = torch.arange(num_queries, device=device)[:, None] + (end - num_queries)
        if rows is not None:
            query = query[rows]

        visible = torch.ones(query.shape[0], num_keys, dtype=torch.bool, device=device)[None, None]
        if self.num_keys is not None:
            visible = visible & (key < self.num_keys)
        if self.causal:
            past = (key <= query)[None, None]
            if self.prefix_lengths is not None:
                past = past | (key < self.prefix_lengths[:, None])[:, None, None, :]
            visible = visible & past
        if self.window is not None:
            visible = visible & ((query - key).abs() < self.window)
        if self.document_ids is not None:
            documents = self.document_ids
            same = documents[:, query.squeeze(1), None] == documents[:, None, :]
            visible = visible & same[:, None]
        if self.key_padding is not None:
            visible = visible & self.key_padding[:, None, None, :]
        return visible


def _flatten(mask: AttentionMask) -> tuple[list[Any], tuple[bool, int | None]]:
    names = PER_SAMPLE if mask.num_keys is None else TENSORS
    return [getattr(mask, name) for name in names], (mask.causal, mask.window)


def _flatten_with_names(
    mask: AttentionMask,
) -> tuple[list[tuple[Any, Any]], tuple[bool, int | None]]:
    tensors, rest = _flatten(mask)
    names = [_pytree.GetAttrKey(name) for name in TENSORS[: len(tensors)]]
    return list(zip(names, tensors, strict=True)), rest


def _unflatten(tensors: Any, rest: tuple[bool, int | None]) -> AttentionMask:
    # Without `__post_init__`, because torch also builds pytrees with leaves that are not tensors.
    mask = object.__new__(AttentionMask)
    for name, value in zip(("causal", "window"), rest, strict=True):
        object.__setattr__(mask, name, value)
    for name, tensor in itertools.zip_longest(TENSORS, tensors):
        object.__setattr__(mask, name, tensor)
    return mask


_pytree.register_pytree_node(
    AttentionMask,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_names,
    serialized_type_name="diffmm.ops.AttentionMask",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
