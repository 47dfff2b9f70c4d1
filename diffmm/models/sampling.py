"""The choice of the next token from logits."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmm.checks import check_count
from diffmm.ops.kth_largest import kth_largest

GREEDY_BELOW = 1e-6
"""Below this temperature decoding is greedy, since the divided logits could overflow float32."""

NOISE_BYTES = 2**20
"""Bytes of random numbers that are made at once, or those of a single step if it needs more."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the softmax of the logits, restricted to the most likely tokens.

    A token is drawn in two steps, so that the second one can be compiled and repeated: random
    numbers (`Noise`), and the token that follows from them, `argmax(log p - log e)` for exponential
    `e`, which has the distribution `p`.

    Args:
        temperature: Divides the logits; below 1e-6 the most likely token is chosen.
        top_k: Number of most likely tokens among which one is drawn, and those that are as likely
            as the last of them; all by default.
        top_p: Only the most likely tokens whose total probability reaches this value are drawn, in
            (0, 1]; applied after `top_k`.

    Raises:
        ValueError: If an argument is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be finite and at least 0 (greedy), got {self.temperature}"
            )
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is chosen, without random numbers."""
        return self.temperature < GREEDY_BELOW

    def choose(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """The tokens `[B]` that follow from logits, `[B, V]`, and from one row of a `Noise`,
        `[B, V]`, or None for greedy decoding."""
        if noise is None:
            return logits.argmax(dim=-1)
        logits = logits.float()
        # Up to a constant per row, the logarithms of the probabilities.
        scores = (logits - logits.max(dim=-1, keepdim=True).values) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            least = kth_largest(logits, self.top_k)
            scores = scores.masked_fill(logits < least, -math.inf)
        if self.top_p is not None:
            scores = self._without_tail(scores)
        return (scores - noise).argmax(dim=-1)

    def _without_tail(self, scores: Tensor) -> Tensor:
        """Exclude the tokens after those whose total probability reaches `top_p`."""
        assert self.top_p is not None
        ordered, ids = scores.softmax(dim=-1).sort(dim=-1, descending=True)
        is_tail = ordered.cumsum(dim=-1) - ordered >= self.top_p
        return scores.masked_fill(is_tail.scatter(-1, ids, is_tail), -math.inf)


class Noise:
    """Random numbers of draws, `log e` for exponential `e`, made for several steps at once.

    A step thus launches nothing for them, and a CUDA graph of it has no random numbers of its own.
    Each step uses one row, and all rows are made anew when each has been used.

    Args:
        sampling: How tokens are drawn.
        logits: Logits `[B, V]` of one step, of which only the shape and the device matter.
        generator: Random number generator on their device; None for the device's default.
    """

    def __init__(
        self, sampling: Sampling, logits: Tensor, generator: torch.Generator | None
    ) -> None:
        self.generator = generator
        self.rows: Tensor | None = None
        self._unused = 0
        if not sampling.is_greedy:
            count = max(1, NOISE_BYTES // (4 * logits.numel()))
            self.rows = torch.empty(count, *logits.shape, device=logits.device)

    def advance(self) -> None:
        """Before each step: make the rows anew if all have been used."""
        if self.rows is None:
            return
        if not self._unused:
            self.rows.exponential_(generator=self.generator).log_()
            self._unused = len(self.rows)
        self._unused -= 1


def next_tokens(
    sampling: Sampling,
    logits: Tensor,
    noise: Tensor | None,
    step: Tensor,
    tokens: Tensor,
    stopped: Tensor,
    stops: Tensor,
    pad_id: int,
) -> Tensor:
    """Replace the last token of each row, `tokens` `[B]`, by the next one, or by `pad_id` where a
    row has `stopped`, which also becomes true of rows whose next token is in `stops`, `[S]`.

    The number `step`, `[1]`, grows by one per step and selects the row of `noise`, the rows of a
    `Noise`. A copy of the tokens is returned. Compiled, the kernel that chooses them stores them,
    too.
    """
    if noise is not None:
        noise = noise.index_select(0, step % len(noise))[0]
    new = torch.where(stopped, pad_id, sampling.choose(logits, noise)).to(tokens.dtype)
    tokens.copy_(new)
    if len(stops):
        # `torch.isin` waits for the device if there are many.
        stopped.logical_or_((new[:, None] == stops).any(dim=1))
    return new


@functools.cache
def compiled_next_tokens() -> Callable[..., Tensor]:
    """`next_tokens` in few kernels. (`torch.compile` imports torch's compiler, which takes longer
    than all else that generation imports.)"""
    return torch.compile(next_tokens)
