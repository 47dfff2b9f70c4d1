"""The choice of the next token from logits."""

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

GREEDY_BELOW = 1e-6
"""Below this temperature decoding is greedy, since the divided logits could overflow float32."""

CHUNK = 512
"""Number of logits whose largest are found first, in parallel with those of the other chunks."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the softmax of the logits, restricted to the most likely tokens.

    A token is drawn in two steps, so that the second one can be compiled and repeated: random
    numbers, and the token that follows from them, `argmax(p / e)` for exponential `e`, which has
    the distribution `p`.

    Args:
        temperature: Divides the logits; below 1e-6 the most likely token is chosen.
        top_k: Number of most likely tokens among which one is drawn; all by default.
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

    def noise(self, logits: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """The random numbers of one draw, `[B, K]` for `K` candidates; None if there is no choice.

        Args:
            logits: `[B, V]`, of which only the shape and the device matter.
            generator: Random number generator on their device.
        """
        if self.temperature < GREEDY_BELOW:
            return None
        vocab_size = logits.shape[1]
        count = vocab_size if self.top_k is None else min(self.top_k, vocab_size)
        noise = logits.new_empty(logits.shape[0], count, dtype=torch.float32)
        return noise.exponential_(1.0, generator=generator)

    def choose(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """The tokens `[B]` that follow from logits, `[B, V]`, and the random numbers of `noise`."""
        if noise is None:
            return logits.argmax(dim=-1)
        if self.top_k is None and self.top_p is None:
            shifted = logits.float() - logits.max(dim=-1, keepdim=True).values
            return ((shifted / self.temperature).softmax(dim=-1) / noise).argmax(dim=-1)
        # Most likely first, so that both top-k and top-p keep a prefix.
        values, ids = largest(logits.float(), noise.shape[1])
        probabilities = ((values - values[:, :1]) / self.temperature).softmax(dim=-1)
        if self.top_p is not None:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        drawn = (probabilities / noise).argmax(dim=-1, keepdim=True)
        return ids.gather(-1, drawn).squeeze(-1)


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of each row, in descending order, and their indices."""
    if logits.is_cuda and 4 * count <= CHUNK and logits.shape[1] >= 8 * CHUNK:
        return largest_of_chunks(logits, count)
    return logits.topk(count, dim=-1)


def largest_of_chunks(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The result of `topk`, which takes about twenty dependent kernels for one long row on a GPU.
    The largest of each chunk are found first: few kernels, over many short rows."""
    chunks = pad(logits, (0, -logits.shape[1] % CHUNK), value=-math.inf).unflatten(1, (-1, CHUNK))
    values, places = chunks.topk(count, dim=-1, sorted=False)
    starts = torch.arange(0, chunks.shape[1] * CHUNK, CHUNK, device=logits.device)
    candidates = (places + starts[:, None]).flatten(1)
    values, order = values.flatten(1).topk(count, dim=-1)
    return values, candidates.gather(-1, order)


def next_tokens(
    sampling: Sampling, logits: Tensor, noise: Tensor | None, stopped: Tensor, pad_id: int
) -> Tensor:
    """The next token of each row, `[B]` int64, or `pad_id` where a row has `stopped`."""
    return torch.where(stopped, pad_id, sampling.choose(logits, noise))


compiled_next_tokens = torch.compile(next_tokens)
"""`next_tokens` in few kernels."""


def check_count(name: str, value: int) -> None:
    """Check that a number is an integer of at least 1.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value}")
