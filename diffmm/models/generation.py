"""Text generation with a decoder, token by token."""

import math
import numbers
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from diffmm.models.description import unwrap
from diffmm.models.text import TextModel
from diffmm.ops import AttentionMask

GREEDY_BELOW = 1e-6
"""Below this temperature decoding is greedy, since the divided logits could overflow float32."""


def generate(
    model: TextModel,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    pad_id: int | None = None,
    key_padding: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Generate a continuation of each prompt: `[B, T]` ids without the prompt.

    `T` is `max_new_tokens`, or less if every row has stopped earlier. Arguments and errors are
    those of `stream`.
    """
    steps = stream(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_ids,
        pad_id=pad_id,
        key_padding=key_padding,
        generator=generator,
    )
    return torch.stack(list(steps), dim=1)


def stream(
    model: TextModel,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    pad_id: int | None = None,
    key_padding: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Generate like `generate`, but yield the `[B]` ids of each step as soon as they are sampled.

    The prompt is processed in one uncompiled forward pass; each following step processes one token
    with the key-value cache. If the model is compiled, only that step runs compiled, compiled once
    for all prompt lengths.

    Args:
        model: A decoder in evaluation mode, compiled or not.
        tokens: Prompts, `[B, N]` ids.
        max_new_tokens: Maximum number of tokens generated per prompt, at least 1.
        temperature: Divides the logits; below 1e-6 decoding is greedy.
        top_k: Sample only among the `k` most likely tokens.
        top_p: Sample only among the most likely tokens whose total probability reaches this value,
            in (0, 1]; applied after `top_k`.
        stop_ids: A row stops once it has generated one of these ids.
        pad_id: Fills a row that has stopped; the first of `stop_ids` by default.
        key_padding: `[B, N]` booleans, true where a token is real. Prompts of different lengths
            are padded **on the left**; each is continued as if it were alone.
        generator: Random number generator on the model's device.

    Raises:
        ValueError: If the model is an encoder or in training mode, an argument is out of range,
            prompts are padded on the right, or prompt and new tokens exceed `max_length`.
    """
    inner = unwrap(model)
    _check_model(inner)
    _check_prompt(inner.config.max_length, tokens, key_padding, max_new_tokens)
    _check_sampling(temperature, top_k, top_p)
    if pad_id is None:
        pad_id = next(iter(stop_ids), 0)
    if key_padding is not None and bool(key_padding.all()):
        key_padding = None

    @torch.no_grad()
    def steps() -> Iterator[Tensor]:
        batch, num_tokens = tokens.shape
        total = num_tokens + max_new_tokens
        cache = inner.new_cache(batch, total)
        stops = torch.tensor(list(stop_ids), device=tokens.device, dtype=tokens.dtype)
        stopped = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
        if key_padding is None:
            real = None
            positions = torch.arange(num_tokens, device=tokens.device)
        else:
            real = torch.cat([key_padding, key_padding.new_ones(batch, max_new_tokens)], dim=1)
            positions = (key_padding.cumsum(dim=1) - 1).clamp(min=0)

        def mask(length: int) -> AttentionMask:
            return AttentionMask(
                causal=True, key_padding=None if real is None else real[:, :length]
            )

        features = inner.forward_features(
            tokens, mask=mask(num_tokens), positions=positions, cache=cache
        )
        logits = inner.head(features[:, -1])
        for length in range(num_tokens + 1, total + 1):
            new = sample(logits, temperature, top_k, top_p, generator).to(tokens.dtype)
            new = torch.where(stopped, pad_id, new)
            yield new
            if len(stops):
                stopped = stopped | torch.isin(new, stops)
                if stopped.all():
                    return
            if length < total:
                positions = positions[..., -1:] + 1
                logits = model(new[:, None], mask=mask(length), positions=positions, cache=cache)
                logits = logits[:, -1]

    return steps()


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample `[B]` ids from `logits`, `[B, V]`. Arguments as in `stream`."""
    if temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    # Most likely first, so that both top-k and top-p keep a prefix.
    num_kept = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    logits, ids = logits.float().topk(num_kept, dim=-1)
    probabilities = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, drawn).squeeze(-1)


def _check_model(model: TextModel) -> None:
    if not model.config.causal:
        raise ValueError(
            "the model is an encoder (causal=False), which cannot generate text: "
            "use a model with causal=True"
        )
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before generating")


def _check_prompt(
    max_length: int, tokens: Tensor, key_padding: Tensor | None, max_new_tokens: int
) -> None:
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            f"prompts must be [B, N] with at least one token, got shape {tuple(tokens.shape)}"
        )
    _check_count("max_new_tokens", max_new_tokens)
    if tokens.shape[1] + max_new_tokens > max_length:
        raise ValueError(
            f"a prompt of {tokens.shape[1]} tokens plus max_new_tokens={max_new_tokens} exceeds "
            f"the model's max_length={max_length}: shorten the prompt or reduce max_new_tokens"
        )
    if key_padding is None:
        return
    if key_padding.shape != tokens.shape or key_padding.dtype != torch.bool:
        raise ValueError(
            f"key_padding must be booleans of the prompts' shape {tuple(tokens.shape)}, "
            f"got {key_padding.dtype} of shape {tuple(key_padding.shape)}"
        )
    falls = key_padding[:, :-1] & ~key_padding[:, 1:]
    wrong = falls.any(dim=1) | ~key_padding[:, -1]
    if wrong.any():
        raise ValueError(
            f"prompts must be padded on the left and end with a real token, "
            f"but row {int(wrong.nonzero()[0, 0])} does not"
        )


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value}")


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0 (greedy), got {temperature}")
    if top_k is not None:
        _check_count("top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
