"""Text generation with a decoder, token by token."""

import weakref
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffmm.checks import check_count, counted
from diffmm.models.captioning import CaptioningModel
from diffmm.models.decoding import Choice, prepare
from diffmm.models.description import unwrap
from diffmm.models.host_copy import HostCopy
from diffmm.models.ids import as_ids, check_ids
from diffmm.models.modes import check_evaluation
from diffmm.models.prompt import Prompt, text_prompt
from diffmm.models.sampling import Sampling
from diffmm.models.text import TextConfig, TextModel

MIN_STEPS_OF_GRAPH = 8
"""Number of new tokens from which a CUDA graph is captured by default."""


def generate(
    model: TextModel | CaptioningModel,
    tokens: Tensor | None = None,
    *,
    media: Tensor | None = None,
    num_samples: Tensor | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    pad_id: int | None = None,
    key_padding: Tensor | None = None,
    generator: torch.Generator | None = None,
    cuda_graph: bool | None = None,
    prompt_lookup_num_tokens: int | None = None,
) -> Tensor:
    """Generate a continuation of each prompt: `[B, T]` ids without the prompt.

    `T` is `max_new_tokens`, or less if every row has stopped earlier. Arguments and errors are
    those of `stream`.
    """
    steps = stream(
        model,
        tokens,
        media=media,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_ids,
        pad_id=pad_id,
        key_padding=key_padding,
        generator=generator,
        cuda_graph=cuda_graph,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
    )
    return torch.stack(list(steps), dim=1)


def stream(
    model: TextModel | CaptioningModel,
    tokens: Tensor | None = None,
    *,
    media: Tensor | None = None,
    num_samples: Tensor | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    pad_id: int | None = None,
    key_padding: Tensor | None = None,
    generator: torch.Generator | None = None,
    cuda_graph: bool | None = None,
    prompt_lookup_num_tokens: int | None = None,
) -> Iterator[Tensor]:
    """Generate like `generate`, but yield the `[B]` ids of each step as soon as they are sampled.

    The prompt is processed in one forward pass; each following step processes one token with the
    key-value cache. On a CUDA device, all steps replay one CUDA graph, so that the launches of the
    host do not limit the rate; steps do not wait for the device, except for the previous step if
    there are `stop_ids`. If the model is compiled, both the prompt and the steps run compiled, for
    all lengths.

    Args:
        model: A decoder or a captioning model in evaluation mode, compiled or not.
        tokens: Prompts, `[B, N]` ids. A captioning model also takes `N = 0`, the default.
        media: Images or sounds for a captioning model, as in its `forward`; a prompt follows them.
        num_samples: As there.
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
        cuda_graph: Whether to replay a CUDA graph, which gives the same tokens; by default if the
            model is on a CUDA device and `max_new_tokens` is at least 8, since capturing it takes
            as long as some steps. False is for models whose steps cannot be captured, such as
            models that were compiled to use CUDA graphs themselves.
        prompt_lookup_num_tokens: Speculative decoding of a single prompt: up to this many tokens
            that followed the same few tokens earlier in the text are processed with the last one,
            and kept as long as they are those that are chosen. This needs fewer steps where texts
            repeat themselves, such as in summaries and code, and changes no probability. No CUDA
            graph is used, and each token waits for the device. None by default.

    Raises:
        ValueError: If the model is an encoder or in training mode, an argument is out of range,
            `tokens` are not ids of the model, prompts are padded on the right, prompt and new
            tokens (and media) exceed `max_length`, `cuda_graph` is set without a CUDA device,
            prompt lookup is combined with it or with several prompts, or media are missing or not
            wanted.
    """
    inner: Any = unwrap(model)
    decoder, num_prefix = _check_model(inner, media)
    if tokens is None:
        if media is None:
            raise ValueError("a text model needs prompts, got none")
        tokens = torch.empty(len(media), 0, dtype=torch.int64, device=media.device)
    before = "" if media is None else f" after {inner.prefix_name(num_prefix)}"
    _check_prompt(decoder.config, tokens, key_padding, max_new_tokens, num_prefix, before)
    sampling = Sampling(temperature, top_k, top_p)
    stops = as_ids("stop_ids", stop_ids)
    if pad_id is None:
        pad_id = next(iter(stops), 0)
    if key_padding is not None and bool(key_padding.all()):
        key_padding = None

    is_cuda = tokens.is_cuda
    if prompt_lookup_num_tokens is not None:
        check_count("prompt_lookup_num_tokens", prompt_lookup_num_tokens)
        if len(tokens) > 1:
            raise ValueError(
                f"prompt lookup continues one prompt, got {len(tokens)}: generate them one by one, "
                f"or leave out prompt_lookup_num_tokens"
            )
        if cuda_graph:
            raise ValueError("prompt lookup cannot be captured: set cuda_graph to False")
        cuda_graph = False
    if cuda_graph is None:
        cuda_graph = is_cuda and max_new_tokens >= MIN_STEPS_OF_GRAPH
    elif cuda_graph and not is_cuda:
        raise ValueError(
            f"cuda_graph=True needs a CUDA device, but the prompts are on {tokens.device}"
        )
    # Of a captioning model, the steps run compiled if its decoder is.
    steps_of: Any = model if media is None else inner.decoder
    features_of = compiled_features(steps_of)
    is_compiled = features_of != decoder.forward_features
    choice = Choice(sampling, stops, pad_id, generator, compile=is_cuda and is_compiled)
    if media is None:
        prompt = text_prompt(features_of, tokens, key_padding)
    else:
        read = partial(
            inner.read_prefix,
            tokens=tokens,
            media=media,
            num_samples=num_samples,
            key_padding=key_padding,
        )
        prompt = Prompt(tokens, read, num_prefix)

    @torch.no_grad()
    def generated() -> Iterator[Tensor]:
        steps = prepare(
            decoder,
            steps_of,
            prompt,
            max_new_tokens,
            choice,
            cuda_graph=cuda_graph,
            num_guesses=prompt_lookup_num_tokens or 0,
        )
        new = steps.first
        for number in range(1, max_new_tokens + 1):
            has_stopped = HostCopy(steps.stopped.all()) if stops else None
            # On a GPU, the next step is launched before the host waits for this one.
            follows = number < max_new_tokens
            ahead = steps.next() if follows and is_cuda else None
            yield new
            if not follows or (has_stopped is not None and has_stopped.wait()):
                return
            new = steps.next() if ahead is None else ahead

    return generated()


def compiled_features(model: TextModel) -> Callable[..., Tensor]:
    """Return `forward_features` of a decoder, compiled for all lengths if the model is compiled."""
    inner = unwrap(model)
    if inner is model and inner._compiled_call_impl is None:
        return inner.forward_features
    if inner not in _COMPILED:
        # Refers to the model weakly, or the entry would keep it alive.
        of_this = weakref.ref(inner)

        def features(*args: Any, **kwargs: Any) -> Tensor:
            return of_this().forward_features(*args, **kwargs)  # type: ignore[union-attr]

        _COMPILED[inner] = torch.compile(features, dynamic=True)
    return _COMPILED[inner]


_COMPILED: weakref.WeakKeyDictionary[TextModel, Callable[..., Tensor]] = weakref.WeakKeyDictionary()


def _check_model(model: Any, media: Tensor | None) -> tuple[TextModel, int]:
    """Check a model, and return its decoder and the number of tokens before the prompts."""
    is_captioning = isinstance(model, CaptioningModel)
    if is_captioning and media is None:
        raise ValueError("a captioning model needs media, the images or sounds, got none")
    if not is_captioning and media is not None:
        raise ValueError(f"media are for captioning models, got a {type(model).__name__}")
    decoder = model.decoder if is_captioning else model
    if not decoder.config.causal:
        raise ValueError(
            "the model is an encoder (causal=False), which cannot generate text: "
            "use a model with causal=True"
        )
    check_evaluation(model, "generating")
    return decoder, 0 if media is None else model.num_prefix_tokens(media)


def _check_prompt(
    config: TextConfig,
    tokens: Tensor,
    key_padding: Tensor | None,
    max_new_tokens: int,
    num_prefix: int,
    before: str,
) -> None:
    if tokens.ndim != 2 or 0 in (tokens.shape[0], tokens.shape[1] + num_prefix):
        raise ValueError(
            f"prompts must be [B, N] with at least one token, got shape {tuple(tokens.shape)}"
        )
    check_ids(tokens, config.vocab_size)
    check_count("max_new_tokens", max_new_tokens)
    prompt = f"a prompt of {counted(tokens.shape[1], 'token')}{before}"
    room = config.max_length - num_prefix - tokens.shape[1]
    if room < 1:
        raise ValueError(
            f"{prompt} leaves no room for new tokens in the model's "
            f"max_length={config.max_length}: shorten the prompt"
        )
    if max_new_tokens > room:
        raise ValueError(
            f"{prompt} plus max_new_tokens={max_new_tokens} exceeds the model's "
            f"max_length={config.max_length}: shorten the prompt or reduce max_new_tokens"
        )
    if key_padding is None:
        return
    if key_padding.shape != tokens.shape or key_padding.dtype != torch.bool:
        raise ValueError(
            f"key_padding must be booleans of the prompts' shape {tuple(tokens.shape)}, "
            f"got {key_padding.dtype} of shape {tuple(key_padding.shape)}"
        )
    if not tokens.shape[1]:
        return
    falls = key_padding[:, :-1] & ~key_padding[:, 1:]
    wrong = falls.any(dim=1) | ~key_padding[:, -1]
    if wrong.any():
        raise ValueError(
            f"prompts must be padded on the left and end with a real token, "
            f"but row {int(wrong.nonzero()[0, 0])} does not"
        )
