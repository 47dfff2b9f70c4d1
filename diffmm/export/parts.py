"""Models of images or sounds and texts as several programs."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffmm.export.decoder import CrossDecoder, GrowingCache
from diffmm.export.signature import (
    FilledClips,
    Port,
    Range,
    Signature,
    signature_of,
    tokens_of,
    with_silence,
)
from diffmm.layers.attention import Attention
from diffmm.layers.norm import upcast
from diffmm.models.audio import AudioModel
from diffmm.models.captioning import CaptioningModel
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.cross_attention import cross_attentions
from diffmm.models.text import TextModel
from diffmm.ops import AttentionMask


def signatures_of(model: nn.Module, *, cache: bool = True) -> Mapping[str, Signature]:
    """The inputs and outputs of the programs of a model, by the name of the part; `""` is the whole
    model.

    | model | part | inputs | outputs |
    |---|---|---|---|
    | `ContrastiveModel` | `image` | `images` | `embeddings` `[B, embed_dim]` |
    | | `audio` | `waveforms`, `num_samples` | `embeddings` |
    | | `text` | `tokens`, and `num_tokens` where padding matters | `embeddings` |
    | `CaptioningModel` | `encoder` | `images`, or those of `audio` | `logits`, `present_*` |
    | | `decoder` | those of a text decoder with cache | those of one |
    | with cross-attention | `encoder` | as above | `logits`, `present_*`, `context_*` |
    | | `decoder` | those of a text decoder with cache, `context_*` | those of a text decoder |

    Embeddings have norm 1; `scale` and `bias` (None without one) are facts of each part: a pair is
    compared by `scale * similarity + bias`. The encoder of a captioning model reads one image or
    sound per row into an empty cache: its logits `[B, 1, vocab_size]` predict the first token, and
    its keys and values are the first `past_*` of the decoder, whose `num_padding` is 0 for images,
    and for sounds the output of this name.

    With cross-attention, the encoder also returns the keys and values of the media, `[B, M, ...]`,
    as `context_key_0`, `context_value_0`, ... for each layer with cross-attention in turn, and for
    sounds `num_context` `[B]`, the number of real ones. The decoder takes these in every step; its
    `num_padding` is 0.

    Any other model is one program, as `diffmm.export.signature.signature_of` describes.

    Args:
        model: The model, in evaluation mode.
        cache: As in `signature_of`.

    Raises:
        ValueError: As `signature_of`.
    """
    if cache and isinstance(model, ContrastiveModel):
        return {name: _tower(model, name) for name in model.towers}
    if cache and isinstance(model, CaptioningModel):
        if model.start is not None:
            return _with_cross_attention(model)
        return {"encoder": _prefix(model), "decoder": signature_of(model.decoder)}
    return {"": signature_of(model, cache=cache)}


class Embedder(nn.Module):
    """A tower of a contrastive model, whose features are divided by their norm."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, samples: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute embeddings `[B, embed_dim]` in float32 of samples and, where the tower takes
        them, their lengths."""
        features = self.tower(samples) if lengths is None else self.tower(samples, lengths)
        return normalize(upcast(features), dim=-1)


class Prefix(nn.Module):
    """The beginning of a captioning model's decoder: it reads an image or a sound per row, and
    returns the logits of the first token and the keys and values of all layers.

    The padding of a sound is moved in front of it, where a decoder with a cache has the padding of
    prompts. The number of its tokens is a further output.
    """

    def __init__(self, model: CaptioningModel, least: int) -> None:
        super().__init__()
        self.model = model
        self.least = least

    def forward(self, media: Tensor, num_samples: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute the logits `[B, 1, vocab_size]`, all keys and values, and of sounds the number
        of tokens of padding, `[B]`.

        Args:
            media: Images, `[B, C, H, W]`, or waveforms, `[B, S]`.
            num_samples: As in `CaptioningModel.forward`.
        """
        decoder = self.model.decoder
        if num_samples is not None:
            media = with_silence(media, self.least)
        found, real = self.model.media_tokens(media, num_samples)
        x = found[:, 0]
        batch, length = x.shape[:2]
        places = torch.arange(length, device=x.device)
        num_padding, key_padding, positions = None, None, places
        if real is not None:
            num_padding = length - real[:, 0].sum(dim=1)
            positions = places - num_padding[:, None]
            x = x.gather(1, (positions % length)[..., None].expand(-1, -1, x.shape[2]))
            key_padding, positions = positions >= 0, positions.clamp(min=0)
        mask = AttentionMask(
            causal=True,
            prefix_lengths=torch.full((batch,), length, device=x.device),
            key_padding=key_padding,
        )
        cache = empty_cache(decoder, x)
        features = decoder.backbone(x, mask=mask, positions=positions, cache=cache)
        outputs = decoder.logits(features[:, -1:]), *cache.tensors()
        return outputs if num_padding is None else (*outputs, num_padding)


class Start(nn.Module):
    """The beginning of a captioning model with cross-attention: it reads an image or a sound per
    row, and returns the logits of the first token, the keys and values of the start token, and
    those of the media."""

    def __init__(self, model: CaptioningModel, least: int) -> None:
        super().__init__()
        self.model = model
        self.least = least

    def forward(self, media: Tensor, num_samples: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute the logits `[B, 1, vocab_size]`, all keys and values of the start token and of
        the media, and of sounds the number of tokens that are real, `[B]`.

        Args:
            media: As in `Prefix`.
            num_samples: As there.
        """
        decoder = self.model.decoder
        if num_samples is not None:
            media = with_silence(media, self.least)
        tokens = torch.zeros(media.shape[0], 0, dtype=torch.int64, device=media.device)
        row = self.model.row(tokens, media, num_samples)
        cache = empty_cache(decoder, row.x)
        features = decoder.backbone(row.x, mask=row.mask, cache=cache, context=row.context)
        assert row.context is not None
        contexts = [tensor for k, v, _ in cache.contexts.values() for tensor in (k, v)]
        outputs = decoder.logits(features), *cache.tensors(), *contexts
        real = row.context.mask.key_padding
        return outputs if real is None else (*outputs, real.sum(dim=1))


def empty_cache(decoder: TextModel, x: Tensor) -> GrowingCache:
    """A cache without tokens for inputs of a decoder, `[B, N, dim]`."""
    shapes = [s for a in decoder.backbone.attentions for s in (a.k_shape, a.v_shape)]
    return GrowingCache(tuple(x.new_zeros(x.shape[0], 0, *shape) for shape in shapes))


def _tower(model: ContrastiveModel, name: str) -> Signature:
    tower = model.towers[name]
    found = signature_of(tower)
    inputs = found.inputs
    if name == "text" and len(inputs) == 1:
        config = tower.config
        # Elsewhere the padding changes nothing.
        if config.pool == "last" or not config.causal:
            inputs += (Port("num_tokens", torch.int64, ("batch",), least=1, most="tokens"),)
    embeddings = Port("embeddings", torch.float32, ("batch", model.config.embed_dim))
    facts: dict[str, Any] = {
        "part": name,
        "scale": model.scale.item(),
        "bias": None if model.bias is None else model.bias.item(),
        **found.facts,
    }
    module = Embedder(found.module).eval()
    return replace(found, module=module, inputs=inputs, outputs=(embeddings,), facts=facts)


class _Beginning(NamedTuple):
    """What the programs of encoders have in common."""

    inputs: tuple[Port, ...]
    axes: dict[str, Range]
    size: int | str
    """Number of tokens of the media, or its axis."""
    least: int
    """The smallest number of samples of sounds that are not filled up; 1 for images."""
    logits: Port
    facts: dict[str, Any]


def _beginning(model: CaptioningModel) -> _Beginning:
    found = signature_of(model.encoder)
    encoder, config = model.encoder, model.config.decoder
    axes, least = dict(found.axes), 1
    size: int | str = "media"
    if isinstance(encoder, AudioModel):
        assert isinstance(found.module, FilledClips)
        least = found.module.least
        axes["media"] = tokens_of(found, encoder)
    else:
        size = math.prod(encoder.config.grid)
    logits = Port("logits", torch.float32, ("batch", 1, config.vocab_size))
    facts = {"part": "encoder", "max_length": config.max_length, **found.facts}
    return _Beginning(found.inputs, axes, size, least, logits, facts)


def _ports(name: str, layers: Iterable[Attention], size: int | str) -> list[Port]:
    """The keys and values of each layer in turn."""
    return [
        Port(f"{name}_{part}_{index}", torch.float32, ("batch", size, *shape))
        for index, layer in enumerate(layers)
        for part, shape in (("key", layer.k_shape), ("value", layer.v_shape))
    ]


def _prefix(model: CaptioningModel) -> Signature:
    inputs, axes, size, least, logits, facts = _beginning(model)
    outputs = [logits, *_ports("present", model.decoder.backbone.attentions, size)]
    if isinstance(model.encoder, AudioModel):
        outputs.append(Port("num_padding", torch.int64, ("batch",)))
    return Signature(Prefix(model, least).eval(), inputs, tuple(outputs), axes, facts)


def _with_cross_attention(model: CaptioningModel) -> dict[str, Signature]:
    inputs, axes, size, least, logits, facts = _beginning(model)
    backbone, is_sound = model.decoder.backbone, isinstance(model.encoder, AudioModel)
    crossed = [layer.attention for layer in cross_attentions(backbone).values()]
    contexts = _ports("context", crossed, size)
    if is_sound:
        contexts.append(Port("num_context", torch.int64, ("batch",), least=1, most=size))
    outputs = (logits, *_ports("present", backbone.attentions, 1), *contexts)
    decoder = signature_of(model.decoder)
    sizes = {"media": axes["media"]} if is_sound else {}
    return {
        "encoder": Signature(Start(model, least).eval(), inputs, outputs, axes, facts),
        "decoder": replace(
            decoder,
            module=CrossDecoder(model.decoder, has_padding=is_sound).eval(),
            inputs=(*decoder.inputs, *contexts),
            axes={**decoder.axes, **sizes},
        ),
    }
