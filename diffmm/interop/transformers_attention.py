"""diffmm's attention for models of Hugging Face transformers: `attn_implementation="diffmm"`.

Importing this module registers it:

    import diffmm.interop.transformers_attention
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="diffmm")

Softmax attention of all models that use transformers' attention interface is then computed by
`diffmm.ops.softmax_attention`, and the differential attention of DiffLlama by
`diffmm.ops.diff_attention`, in one call per layer. For that, `DiffLlamaAttention.forward` is
replaced by a function that calls the original one if another attention is chosen.

Masks of causality, windows, padding and packed sequences, and their combinations, reach the kernels
as an `AttentionMask`. For others, and those of static caches, torch's fused attention is called
with a tensor, as with `attn_implementation="sdpa"`. In compiled models, masks of windows and packed
sequences (transformers looks for these if there is no `attention_mask`) are made outside of the
graph, before the layers; `fullgraph=True` does not allow that.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)
from transformers.models.diffllama.modeling_diffllama import (
    DiffLlamaAttention,
    apply_rotary_pos_emb,
)

from diffmm.ops import AttentionMask, diff_attention, softmax_attention

NAME = "diffmm"
"""The `attn_implementation`."""

MaskFunction = Callable[..., Any]
"""Whether a query attends to a key, given the indices of batch, head, query and key."""

HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments that models pass on to attention functions and that change nothing there. Positions are
in the queries, and the documents that they tell apart in the mask."""


class LayerMask(AttentionMask):
    """An `AttentionMask` on its way through a model of transformers.

    Attributes:
        ndim: Number of axes of the mask as a tensor. transformers prepares masks with two axes, and
            no others.
    """

    ndim: ClassVar[int] = 4

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{_NO_TENSOR} has no {name}: use 'eager'")

    def __getitem__(self, index: Any) -> NoReturn:
        raise ValueError(f"{_NO_TENSOR} has no parts: use 'eager'")


_NO_TENSOR = f"the mask of attn_implementation={NAME!r} is not a tensor and"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Softmax attention with the arguments of transformers' attention functions.

    Args:
        module: The attention layer; its `is_causal` is the default of `is_causal`.
        query: `[B, H, N, D]`.
        key: `[B, G, M, D]`; `G` divides `H`.
        value: `[B, G, M, E]`.
        attention_mask: A mask by `mask`, a tensor for torch's fused attention, or None.
        dropout: Dropout rate of the attention maps, which must be 0.
        scaling: Factor of the scores; `D ** -0.5` by default.
        is_causal: Whether attention is causal if there is no mask.
        softcap: Smooth bound of the scores.
        sliding_window: Window if there is no mask.
        others: Arguments for other implementations, which must be `HARMLESS` or None.

    Returns:
        `[B, N, H, E]`, and None in place of attention maps.

    Raises:
        ValueError: If an argument asks for what this attention does not have; the message names
            it.
    """
    check_supported(others, dropout)
    if isinstance(attention_mask, Tensor):
        if softcap is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} does not support softcap={softcap} with a static "
                f"cache or a mask per query: use 'eager'"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal
        )
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        attention_mask = AttentionMask(causal=causal, window=sliding_window)
    q, k, v = (tensor.transpose(1, 2) for tensor in cast(query, key, value))
    return softmax_attention(q, k, v, mask=attention_mask, scale=scaling, softcap=softcap), None


def check_supported(arguments: Mapping[str, Any], dropout: float = 0.0) -> None:
    """Check that arguments for an attention function change nothing, and that there is no dropout.

    Raises:
        ValueError: If one may; the message names it.
    """
    wanted = [
        name
        for name, value in arguments.items()
        if name not in HARMLESS and value is not None and value is not False
    ]
    wanted += [f"dropout={dropout}"] if dropout else []
    if wanted:
        raise ValueError(
            f"attn_implementation={NAME!r} does not support {', '.join(sorted(wanted))}: use "
            f"'eager'"
        )


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's precision where it is enabled, as torch's own attention does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(
        x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device)) for x in tensors
    )


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | LayerMask | None = None,
    **others: Any,
) -> LayerMask | Tensor | None:
    """The mask of a model's layers, with the arguments of transformers' mask functions: an
    `LayerMask` if there is one, otherwise that of torch's fused attention, `[B, 1, N, M]`
    booleans.

    Args:
        batch_size: Number of sequences `B`.
        q_length: Number of queries `N`.
        kv_length: Number of keys `M`.
        q_offset: Position of the first query; a tensor with a static cache.
        kv_offset: Position of the first key.
        mask_function: Function of the indices of batch, head, query and key.
        attention_mask: `[B, ...]` booleans, true where a token is real, or a mask that this
            function has returned.
        others: Arguments for `transformers.masking_utils.sdpa_mask`.
    """
    if isinstance(attention_mask, LayerMask):
        return attention_mask
    place = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    parts = None
    if isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length:
        is_plain = mask_function in (causal_mask_function, bidirectional_mask_function)
        if torch.compiler.is_compiling() and not is_plain:
            return _outside_of_graph(*place, **others)
        parts = settings_of(mask_function)
    if parts is None or (attention_mask is not None and attention_mask.ndim != 2):
        tensor_only = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(*place, **{**others, **tensor_only})
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        # Without padding, the kernels need no mask in memory; to know this, the host waits.
        if not torch.compiler.is_compiling() and bool(padding.all()):
            padding = None
    return LayerMask(**parts, key_padding=padding)


@torch.compiler.disable(
    reason="the masks of windows and packed sequences are made outside of the graph: compile "
    "without fullgraph=True, or give an attention_mask to a model without windows"
)
def _outside_of_graph(*place: Any, **others: Any) -> LayerMask | Tensor | None:
    return mask(*place, **others)


def settings_of(mask_function: MaskFunction) -> dict[str, Any] | None:
    """The fields of the `AttentionMask` that a mask function of transformers describes; None if it
    describes another mask."""
    found: dict[str, Any] = {"causal": False}
    one_sided = False  # a window that does not hide the keys after a query
    for part in conjunction(mask_function):
        if part is bidirectional_mask_function:
            continue
        if part is causal_mask_function:
            new: dict[str, Any] = {"causal": True}
        elif is_made_by(sliding_window_overlay, part):
            new, one_sided = {"window": variables(part)["sliding_window"]}, True
        elif is_made_by(sliding_window_bidirectional_overlay, part):
            new = {"window": variables(part)["sliding_window"] + 1}
        elif is_made_by(packed_sequence_mask_function, part):
            documents = variables(part)["packed_sequence_mask"]
            # In a compiled model, also if there is one document per row.
            is_one = bool((documents == documents[:, :1]).all())
            new = {} if is_one else {"document_ids": documents}
        else:
            return None
        if new.keys() & (found.keys() - {"causal"}):
            return None
        found |= new
    return None if one_sided and not found["causal"] else found


def conjunction(mask_function: MaskFunction) -> Iterator[MaskFunction]:
    """The functions of which a mask function made by `transformers.masking_utils.and_masks` is the
    conjunction; any other function itself."""
    if getattr(mask_function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        yield mask_function
        return
    for part in variables(mask_function)["mask_functions"]:
        yield from conjunction(part)


def is_made_by(maker: Callable[..., Any], function: MaskFunction) -> bool:
    """Whether a function is the one that `maker` returns."""
    return getattr(function, "__qualname__", "") == f"{maker.__name__}.<locals>.inner_mask"


def variables(function: Any) -> dict[str, Any]:
    """The variables that a function has from the one that made it, by name."""
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


_separate_calls: Any = DiffLlamaAttention.forward


def diffllama_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: AttentionMask | Tensor | None = None,
    past_key_values: Any = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """`DiffLlamaAttention.forward` with one call of `diffmm.ops.diff_attention`.

    transformers calls its attention twice, for either half of the values, with raw head `c * h + i`
    for component `c` of differential head `i`. With another `attn_implementation`, or a mask that
    is a tensor, this is its own function.
    """
    ours = self.config._attn_implementation == NAME
    if not ours or isinstance(attention_mask, Tensor):
        others |= {} if is_causal is None else {"is_causal": is_causal}
        return _separate_calls(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **others
        )
    check_supported(others)
    if attention_mask is None:
        attention_mask = AttentionMask(causal=is_causal is not False)
    batch, length = hidden_states.shape[:2]
    q, k, v = (
        project(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    # [B, 2 * h, N, D] to [B, N, h, 2, D].
    q, k, v = (x.unflatten(1, (2, -1)).permute(0, 3, 2, 1, 4) for x in cast(q, k, v))
    exponents = (self.lambda_q1 * self.lambda_k1, self.lambda_q2 * self.lambda_k2)
    first, second = (x.sum(-1, dtype=torch.float32).exp() for x in exponents)
    heads = diff_attention(
        q,
        k,
        v.flatten(3),
        first - second + self.lambda_init,
        mask=attention_mask,
        scale=self.scaling,
    )
    heads = (1.0 - self.lambda_init) * self.groupnorm(heads)
    return self.o_proj(heads.flatten(2)), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
DiffLlamaAttention.forward = diffllama_forward  # type: ignore[method-assign, assignment]
