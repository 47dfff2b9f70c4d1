"""Which backend is faster on this GPU, for each attention, mask and length: the table behind
`backend="auto"`, for any card. Run by `python -m benchmarks.attention --choose`.

Forward and backward passes of the ops, compiled for the shape, in bfloat16, with about 32,768
tokens per call and heads of 64 and 128: softmax attention, v1 and v2 with `sdpa` and `triton`, and
softmax attention also with torch's FlexAttention and, for documents, torch's varlen attention.
Documents have 400 tokens on average, padding is a quarter of the tokens, prefixes an eighth, and
the window is a quarter of the length. Masks that need more than 2 GiB in memory are left out.

A card for which `auto` selects another backend than the faster one can set `backend` in a model's
backbone; the lines at the end say for which lengths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from benchmarks.timing import median_ms
from diffmm.ops import AttentionMask, diff_attention, softmax_attention
from diffmm.ops.diff_attention import choose_backend as choose_diff
from diffmm.ops.softmax_attention import choose_backend as choose_softmax

TOKENS, HEADS, MAX_MASK_BYTES = 32768, 8, 2 << 30
LENGTHS = (256, 1024, 4096, 16384)
MASKS = ("causal", "documents", "window", "prefix", "padding", "full")
KINDS = ("softmax", "v1", "v2")


def make_mask(name: str, batch: int, length: int, device: str) -> AttentionMask:
    """One of `MASKS`, random but the same every time."""
    random = torch.Generator().manual_seed(length)
    if name == "documents":
        starts = torch.rand(batch, length, generator=random) < 1 / 400
        return AttentionMask(causal=True, document_ids=starts.cumsum(1).to(device))
    if name == "padding":
        lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=random)
        return AttentionMask(key_padding=(torch.arange(length) < lengths).to(device))
    if name == "prefix":
        lengths = torch.randint(length // 4, (batch,), generator=random)
        return AttentionMask(causal=True, prefix_lengths=lengths.to(device))
    if name == "window":
        return AttentionMask(causal=True, window=length // 4)
    return AttentionMask(causal=name == "causal")


@dataclass(frozen=True)
class Time:
    """Milliseconds of forward and backward passes."""

    kind: str
    mask: str
    D: int
    length: int
    by: str
    ms: float
    is_auto: bool


def inputs_of(kind: str, batch: int, length: int, D: int) -> list[Tensor]:
    """Random q, k, v and, for differential attention, lam."""

    def random(*size: int) -> Tensor:
        return torch.randn(
            batch, length, *size, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )

    if kind == "softmax":
        return [random(HEADS, D) for _ in range(3)]
    pairs, components, E = (HEADS // 2, 2, 2 * D) if kind == "v1" else (HEADS, 1, D)
    lam = torch.rand(batch, length, pairs, device="cuda", requires_grad=True)
    return [random(pairs, 2, D), random(pairs, components, D), random(pairs, E), lam]


def implementations(
    kind: str, name: str, mask: AttentionMask, batch: int, length: int
) -> dict[str, Callable[..., Tensor]]:
    """The implementations of an attention with a mask, by name."""
    op = softmax_attention if kind == "softmax" else diff_attention
    ops: dict[str, Callable[..., Tensor]] = {
        by: torch.compile(partial(op, mask=mask, backend=by), dynamic=False)
        for by in ("sdpa", "triton")
    }
    if not (mask.is_full or mask.is_causal) and batch * length**2 > MAX_MASK_BYTES:
        del ops["sdpa"]
    if kind != "softmax":
        return ops
    ops["flex"] = torch.compile(partial(flex, mask=mask), dynamic=False)
    if name == "documents":
        assert mask.document_ids is not None
        ops["varlen"] = partial(varlen, mask.document_ids)
    return ops


def flex(q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask) -> Tensor:
    """torch's FlexAttention, its block mask included, as for each batch."""

    def visible(b: Tensor, h: Tensor, n: Tensor, m: Tensor) -> Tensor:
        sees = n >= 0
        if mask.causal:
            sees = m <= n
            if mask.prefix_lengths is not None:
                sees = sees | (m < mask.prefix_lengths[b])
        if mask.window is not None:
            sees = sees & (n - m < mask.window)
        if mask.document_ids is not None:
            sees = sees & (mask.document_ids[b, n] == mask.document_ids[b, m])
        if mask.key_padding is not None:
            sees = sees & mask.key_padding[b, m]
        return sees

    batch, length = q.shape[:2]
    blocks = create_block_mask(
        visible, batch if mask.per_sample else None, None, length, length, device=q.device
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Any = flex_attention(q, k, v, block_mask=blocks)
    return out.transpose(1, 2)


def varlen(document_ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's varlen attention over the documents of all samples in one sequence."""
    batch, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    ends = torch.tensor([batch * length], device=q.device)
    bounds = torch.cat([begins.flatten().nonzero().flatten(), ends]).int()
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    attend: Any = varlen_attn
    return attend(*flat, bounds, bounds, length, length, window_size=(-1, 0)).view_as(q)


def both_passes(op: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Forward and backward pass."""
    out = op(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def measure(kind: str, name: str, D: int, length: int) -> list[Time]:
    """Time all implementations of one attention with one mask."""
    batch = max(1, TOKENS // length)
    mask = make_mask(name, batch, length, "cuda")
    inputs = inputs_of(kind, batch, length, D)
    q, k, v = inputs[:3]
    auto = (choose_softmax if kind == "softmax" else choose_diff)(q, k, v, mask, D**-0.5)
    times = []
    for by, op in implementations(kind, name, mask, batch, length).items():
        try:
            ms = median_ms(partial(both_passes, op, inputs))
        except Exception as error:
            print(f"  {kind} {name} {D} {length} {by}: {type(error).__name__}: {error}"[:160])
            continue
        times.append(Time(kind, name, D, length, by, ms, by == auto))
    torch._dynamo.reset()
    return times


def advice(times: Sequence[Time], tolerance: float = 1.05) -> list[str]:
    """A line for each attention, mask and width for which `auto` is slower than another backend at
    some length."""
    lines = []
    for key in dict.fromkeys((t.kind, t.mask, t.D) for t in times):
        slower: dict[str, list[int]] = {}
        for length in dict.fromkeys(t.length for t in times):
            own = [t for t in times if (t.kind, t.mask, t.D) == key and t.length == length]
            choices = [t for t in own if t.by in ("sdpa", "triton")]
            auto = [t for t in choices if t.is_auto]
            best = min(choices, key=lambda t: t.ms, default=None)
            if auto and best is not None and auto[0].ms > tolerance * best.ms:
                slower.setdefault(best.by, []).append(length)
        for by, lengths in slower.items():
            kind, mask, D = key
            lines.append(
                f"{kind} with heads of {D} and a {mask} mask: backend: {by} for lengths of about "
                f"{', '.join(map(str, lengths))}"
            )
    return lines


def line_of(own: Sequence[Time], base: float | None) -> str:
    """One line of the table; the backend that `auto` selects has a star."""
    first = own[0]
    shown = "  ".join(
        f"{t.by}{'*' if t.is_auto else ''} {t.ms:.3f} ms"
        + (f" ({t.ms / base:.2f})" if base else "")
        for t in own
    )
    return f"{first.kind:8} {first.mask:10} d{first.D:<4} {first.length:6}  {shown}"


def choose(lengths: Sequence[int] = LENGTHS, widths: Sequence[int] = (64, 128)) -> list[Time]:
    """Print the table, with ratios to causal softmax attention by `sdpa`, and the advice."""
    times: list[Time] = []
    for D in widths:
        for length in lengths:
            base = None
            for kind in KINDS:
                for name in MASKS:
                    own = measure(kind, name, D, length)
                    times += own
                    if base is None:
                        base = next((t.ms for t in own if t.by == "sdpa"), None)
                    if own:
                        print(line_of(own, base), flush=True)
    found = advice(times)
    print("\nauto selects the faster of sdpa and triton everywhere" if not found else "")
    print("\n".join(found))
    return times
