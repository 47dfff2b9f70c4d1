"""The steps of token-by-token generation: one after another, replayed as a CUDA graph, or with
guesses that one forward pass checks."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmm.layers.cache import KVCache
from diffmm.models.prompt import Prompt
from diffmm.models.prompt_lookup import PromptLookup
from diffmm.models.sampling import Noise, Sampling, compiled_next_tokens, next_tokens
from diffmm.models.text import TextModel
from diffmm.ops import AttentionMask

ROUND_TO = 256
"""Buffers of a graph have a multiple of this many tokens, so that few lengths are compiled."""


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen.

    Attributes:
        sampling: How tokens are drawn from logits.
        stop_ids: Ids that end a row.
        pad_id: Id that fills a row after its end.
        generator: Random number generator; None for the device's default.
        compile: Whether the choice is compiled.
    """

    sampling: Sampling
    stop_ids: Sequence[int]
    pad_id: int
    generator: torch.Generator | None
    compile: bool = False

    def __call__(
        self,
        logits: Tensor,
        noise: Tensor | None,
        step: Tensor,
        tokens: Tensor,
        stopped: Tensor,
        stops: Tensor,
    ) -> Tensor:
        """The next token of each row, `[B]`: see `next_tokens`."""
        choose = compiled_next_tokens() if self.compile else next_tokens
        return choose(self.sampling, logits, noise, step, tokens, stopped, stops, self.pad_id)


class Steps:
    """Generates one token per sequence and step, with a key-value cache that grows.

    Args:
        call: The model, compiled or not.
        cache: Key-value cache that holds the prompt and has room for all steps.
        positions: Position of the prompt's last token, `[1]` or `[B, 1]`.
        real: `[B, total]` booleans, true where a token is real; None if all are.
        choice: How tokens are chosen.
        tokens: Last token of each prompt, `[B]`.
        logits: Logits after it, `[B, V]`.

    Attributes:
        first: The first new tokens, `[B]`.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        cache: KVCache,
        positions: Tensor,
        real: Tensor | None,
        choice: Choice,
        tokens: Tensor,
        logits: Tensor,
    ) -> None:
        device = positions.device
        self.call, self.cache, self.positions, self.real = call, cache, positions.clone(), real
        self.choice = choice
        self.stops = torch.tensor(list(choice.stop_ids), device=device, dtype=tokens.dtype)
        self.stopped = torch.zeros(len(tokens), dtype=torch.bool, device=device)
        self.tokens = tokens.clone()
        self.noise = Noise(choice.sampling, logits, choice.generator)
        self.noise.advance()
        self.first = self.choose(logits)

    def choose(self, logits: Tensor) -> Tensor:
        """Choose the tokens that follow, `[B]`, update `tokens` and `stopped`, and return them."""
        step = self.positions.flatten()[:1]
        return self.choice(logits, self.noise.rows, step, self.tokens, self.stopped, self.stops)

    def next(self) -> Tensor:
        """Process the last tokens, and return those that follow, `[B]`."""
        self.noise.advance()
        return self.step()

    def step(self) -> Tensor:
        """`next`, without new random numbers."""
        self.positions += 1
        logits = self.call(
            self.tokens[:, None], mask=self._mask(), positions=self.positions, cache=self.cache
        )
        return self.choose(logits[:, -1])

    def _mask(self, num_tokens: int = 1) -> AttentionMask:
        """The mask of the next `num_tokens` tokens."""
        length = int(self.cache.length) + num_tokens
        real = None if self.real is None else self.real[:, :length]
        return AttentionMask(causal=True, key_padding=real)


class LookupSteps(Steps):
    """Generates one token per step for one sequence, as `Steps` does, with fewer forward passes.

    A forward pass processes the last token and guesses of those that follow. Each next token is
    chosen from the logits before it, with its own random numbers; as long as it equals the guess,
    the logits after it are already there. Otherwise the remaining guesses leave the cache. Every
    token thus has the distribution that it has in `Steps`, and is the same one if the logits are
    equal to the last bit (a forward pass of several tokens may round differently).

    Args:
        call, cache, positions, real, choice, tokens, logits: See `Steps`.
        ids: The prompt, in which tokens are looked up.
        count: Maximum number of guesses per forward pass, at least 1.
    """

    def __init__(self, *steps: Any, ids: Iterable[int], count: int) -> None:
        super().__init__(*steps)
        self.lookup = PromptLookup(ids)
        self.count = count
        self.guesses: list[int] = []
        self.logits: Tensor | None = None
        self.num_passes = 0

    def step(self) -> Tensor:
        token = int(self.tokens)
        self.lookup.append(token)
        self.positions += 1
        if self.guesses and self.guesses[0] == token:
            self.guesses.pop(0)
        else:
            self._process()
        assert self.logits is not None
        return self.choose(self.logits[:, -1 - len(self.guesses)])

    def _process(self) -> None:
        """Compute the logits after the last token and after each of the guesses that follow."""
        assert isinstance(self.cache.length, int)
        self.cache.length -= len(self.guesses)
        room = self.cache.keys[0].shape[1] - self.cache.length - 1
        self.guesses = self.lookup.guess(min(self.count, room))
        kind: Any = {"dtype": self.tokens.dtype, "device": self.tokens.device}
        tokens = torch.cat([self.tokens, torch.tensor(self.guesses, **kind)])[None]
        ahead = torch.arange(tokens.shape[1], device=tokens.device)
        self.logits = self.call(
            tokens,
            mask=self._mask(tokens.shape[1]),
            positions=self.positions + ahead,
            cache=self.cache,
        )
        self.num_passes += 1


class GraphedSteps(Steps):
    """Replays one CUDA graph for all steps: nothing but the graph is launched per token.

    Each step attends to the keys of the cache that exist, whose number is on the device. Its tokens
    are those of `Steps`.

    Args:
        call, cache, positions, real, choice, tokens, logits: See `Steps`.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        cache: KVCache,
        positions: Tensor,
        real: Tensor | None,
        choice: Choice,
        tokens: Tensor,
        logits: Tensor,
    ) -> None:
        super().__init__(call, cache, positions, real, choice, tokens, logits)
        cache.freeze_shapes()
        self._graph: torch.cuda.CUDAGraph | None = None

    def next(self) -> Tensor:
        if self._graph is None:
            self._graph = self._capture()
        self.noise.advance()
        self._graph.replay()
        return self.tokens.clone()

    def _mask(self, num_tokens: int = 1) -> AttentionMask:
        assert isinstance(self.cache.length, Tensor)
        num_keys = self.cache.length + num_tokens
        return AttentionMask(causal=True, key_padding=self.real, num_keys=num_keys)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Run the step twice, which compiles what is to be compiled, undo it, and capture it."""
        assert isinstance(self.cache.length, Tensor)
        state = (self.cache.length, self.positions, self.stopped, self.tokens)
        before = [tensor.clone() for tensor in state]
        # Not on a stream of its own, as for training: the graph would be slower.
        for _ in range(2):
            self.step()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.tokens.device)
        with no_collection(), torch.cuda.graph(graph):
            self.step()
        return graph


@contextmanager
def no_collection() -> Iterator[None]:
    """Suspend Python's garbage collection, which would end a capture if it freed a graph."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def prepare(
    model: TextModel,
    call: Callable[..., Tensor],
    prompt: Prompt,
    max_new_tokens: int,
    choice: Choice,
    *,
    cuda_graph: bool,
    num_guesses: int = 0,
) -> Steps:
    """Process the prompts, and return the steps that follow.

    Args:
        model: The decoder, uncompiled.
        call: The same, compiled or not, for the steps.
        prompt: The prompts.
        max_new_tokens: Number of tokens that are generated at most.
        choice: How tokens are chosen.
        cuda_graph: Whether steps are replayed as a CUDA graph.
        num_guesses: Maximum number of tokens that are looked up per forward pass; 0 for none.
    """
    batch, device = len(prompt.tokens), prompt.tokens.device
    total = prompt.length + max_new_tokens
    if cuda_graph:
        total = -(-total // ROUND_TO) * ROUND_TO
    cache = model.new_cache(batch, total)
    found = prompt.read(cache)
    logits = model.logits(found.features)
    real = None
    if found.real is not None:
        real = torch.ones(batch, total, dtype=torch.bool, device=device)
        real[:, : prompt.length] = found.real
    # The last token of an empty prompt is no token of a text; steps replace it.
    last = prompt.tokens[:, -1] if prompt.tokens.shape[1] else prompt.tokens.new_zeros(batch)
    inputs = (call, cache, found.positions, real, choice, last, logits)
    if num_guesses:
        return LookupSteps(*inputs, ids=prompt.tokens[0].tolist(), count=num_guesses)
    return (GraphedSteps if cuda_graph else Steps)(*inputs)
