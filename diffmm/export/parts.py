"""Models of images or sounds and texts as several programs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffmm.export.decoder import GrowingCache
from diffmm.export.signature import (
    FilledClips,
    Port,
    Signature,
    signature_of,
    tokens_of,
    with_silence,
)
from diffmm.layers.norm import upcast
from diffmm.models.audio import AudioModel
from diffmm.models.captioning import CaptioningModel
from diffmm.models.contrastive import ContrastiveModel
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

    Embeddings have norm 1; `scale` and `bias` (None without one) are facts of each part: a pair is
    compared by `scale * similarity + bias`. The encoder of a captioning model reads one image or
    sound per row into an empty cache: its logits `[B, 1, vocab_size]` predict the first token, and
    its keys and values are the first `past_*` of the decoder, whose `num_padding` is 0 for images,
    and for sounds the output of this name.

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
        shapes = [s for a in decoder.backbone.attentions for s in (a.k_shape, a.v_shape)]
        cache = GrowingCache(tuple(x.new_zeros(batch, 0, *shape) for shape in shapes))
        features = decoder.backbone(x, mask=mask, positions=positions, cache=cache)
        outputs = decoder.logits(features[:, -1:]), *cache.tensors()
        return outputs if num_padding is None else (*outputs, num_padding)


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
        "scale": float(model.scale),
        "bias": None if model.bias is None else float(model.bias),
        **found.facts,
    }
    module = Embedder(found.module).eval()
    return replace(found, module=module, inputs=inputs, outputs=(embeddings,), facts=facts)


def _prefix(model: CaptioningModel) -> Signature:
    found = signature_of(model.encoder)
    config, attentions = model.config.decoder, model.decoder.backbone.attentions
    outputs = [Port("logits", torch.float32, ("batch", 1, config.vocab_size))]
    axes, least, length = dict(found.axes), 1, "media"
    encoder = model.encoder
    if isinstance(encoder, AudioModel):
        assert isinstance(found.module, FilledClips)
        least = found.module.least
        axes[length] = tokens_of(found, encoder)
    size = length if isinstance(encoder, AudioModel) else math.prod(encoder.config.grid)
    for index, layer in enumerate(attentions):
        for part, shape in (("key", layer.k_shape), ("value", layer.v_shape)):
            name = f"present_{part}_{index}"
            outputs.append(Port(name, torch.float32, ("batch", size, *shape)))
    if isinstance(encoder, AudioModel):
        outputs.append(Port("num_padding", torch.int64, ("batch",)))
    facts = {"part": "encoder", "max_length": config.max_length, **found.facts}
    return Signature(Prefix(model, least).eval(), found.inputs, tuple(outputs), axes, facts)
