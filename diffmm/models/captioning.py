"""The captioning model: an encoder of images or sounds, and a decoder that describes them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffmm.batch import InputShapes
from diffmm.checks import Settings, check_choice
from diffmm.layers.cache import KVCache
from diffmm.layers.linear import Embedding, Linear, init_weights
from diffmm.models.audio import AudioConfig
from diffmm.models.captioning_rows import Row, Tokens, before_texts, make_row
from diffmm.models.cross_attention import add_cross_attention
from diffmm.models.image import ImageConfig
from diffmm.models.pretrained import Pretrained
from diffmm.models.prompt import Read
from diffmm.models.text import TextConfig, TextModel

PROJECTORS = ("linear", "mlp")
MEDIA = ("prefix", "cross_attention")


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig(Settings):
    """Configuration of a captioning model.

    Attributes:
        encoder: Configuration of the encoder of images or sounds, without a head
            (`num_classes=0`). Its special tokens are not passed on to the decoder.
        decoder: Configuration of the decoder (`causal=True`). Its `max_length` is that of the
            tokens of the media and of the text together, or with cross-attention of the text and
            the start token before it.
        projector: The map from the encoder's features to the decoder's inputs: `"linear"`, or
            `"mlp"` for two linear layers with a GELU between them (LLaVA 1.5, Liu et al. 2023).
        media: How the decoder reads the media: as a `"prefix"` of the text, or by
            `"cross_attention"` in its blocks (see `CaptioningModel`).
        cross_attention_every: Distance between blocks with cross-attention: 1 for all blocks, 2 for
            every second one, and so on; at most the decoder's depth.
        cross_attention_gate: Whether each cross-attention has a gate that is closed at the start
            (see `diffmm.layers.CrossAttention`), for decoders that start from a language model.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    encoder: ImageConfig | AudioConfig
    decoder: TextConfig
    projector: Literal["linear", "mlp"] = "linear"
    media: Literal["prefix", "cross_attention"] = "prefix"
    cross_attention_every: int = 1
    cross_attention_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("projector", self.projector, PROJECTORS)
        check_choice("media", self.media, MEDIA)
        if self.encoder.num_classes:
            raise ValueError(
                f"the encoder of a captioning model has no head: set its num_classes to 0, got "
                f"{self.encoder.num_classes}"
            )
        if self.encoder.pool == "map" or self.encoder.pool_norm:
            found = "pool='map'" if self.encoder.pool == "map" else "pool_norm=True"
            raise ValueError(
                f"the decoder reads the encoder's features before they are pooled, so that "
                f"{found} has no effect: leave it out"
            )
        if not self.decoder.causal:
            raise ValueError("the decoder of a captioning model needs causal=True, got False")
        self._check_cross_attention()

    def _check_cross_attention(self) -> None:
        if self.has_cross_attention:
            depth = self.decoder.backbone.depth
            if not 1 <= self.cross_attention_every <= depth:
                raise ValueError(
                    f"cross_attention_every must be between 1 and the decoder's depth={depth}, "
                    f"got {self.cross_attention_every}"
                )
            if self.decoder.backbone.parallel:
                raise ValueError(
                    "cross-attention is between attention and feed-forward, but parallel=True "
                    "computes them at once: set parallel to False, or media to 'prefix'"
                )
            return
        for name in ("cross_attention_every", "cross_attention_gate"):
            if (value := getattr(self, name)) != self.__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name}={value!r} is not used by media='prefix', only by "
                    f"media='cross_attention'"
                )

    @property
    def has_cross_attention(self) -> bool:
        """Whether the decoder reads the media by cross-attention."""
        return self.media == "cross_attention"

    def make_decoder(self) -> TextModel:
        """Build the decoder, with cross-attention if it has one."""
        decoder = TextModel(self.decoder)
        if self.has_cross_attention:
            add_cross_attention(
                decoder.backbone,
                every=self.cross_attention_every,
                gated=self.cross_attention_gate,
            )
        return decoder

    @property
    def towers(self) -> dict[str, ImageConfig | AudioConfig | TextConfig]:
        """The configs of the encoder and the decoder by their names."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def input_fields(self) -> tuple[str, ...]:
        """The batch fields that `forward` takes, in order."""
        return ("tokens", *self.encoder.input_fields)

    @property
    def exact_fields(self) -> tuple[str, ...]:
        """As in `EncoderConfig`."""
        return self.encoder.exact_fields

    def input_shapes(self, batch_size: int, length: int | None = None) -> InputShapes:
        """Shapes and dtypes of a batch of images, or of sounds of `length` samples, with texts that
        make the decoder's sequences as long as possible."""
        media = self.encoder.input_shapes(batch_size, length)
        num_prefix = 1
        if not self.has_cross_attention:
            with torch.device("meta"):
                inputs = (torch.empty(shape, dtype=dtype) for shape, dtype in media.values())
                num_prefix = self.encoder.make().num_patches(*inputs)
        num_tokens = max(1, self.decoder.max_length - num_prefix)
        return {"tokens": ((batch_size, num_tokens), torch.int64), **media}


class CaptioningModel(Pretrained, nn.Module):
    """Describes images, or transcribes sounds: a decoder of texts reads the encoder's patch
    features, in one of two ways.

    * `media="prefix"`: in front of the text, as a prefix in which all tokens attend to all (prefix
      LM, Raffel et al. 2020, section 3.2.1; PaliGemma, Beyer et al. 2024). A row of the decoder is
      `[tokens of all media | texts]`. The last token of the media predicts the first token of the
      text.
    * `media="cross_attention"`: by cross-attention between the attention and the feed-forward of
      its blocks (Vaswani et al. 2017; Whisper, Radford et al. 2022; with every `n`-th block and a
      gate, Flamingo, Alayrac et al. 2022), differential if the decoder's attention is. A row is
      `[start | text]` with a learned start token, which predicts the first token of the text. Media
      take no part of `max_length`, and their order within a document has no effect: an encoder
      should have positions in its features (`learned_positions`), which rotary ones leave out.

    With one document per row, several images or sounds of a row belong to one text. Packed rows
    have several documents, each with media and a text, which neither attend to each other nor share
    positions: each has the same logits as in a row of its own.

    Attributes:
        encoder: An `ImageModel` or `AudioModel`.
        projector: Maps the encoder's features to the decoder's inputs.
        decoder: A `TextModel`.
        start: The start token, `[1, dim]`; None for a prefix of media.

    >>> config = diffmm.models.CaptioningConfig(
    ...     encoder=diffmm.models.ImageConfig(
    ...         backbone=diffmm.BackboneConfig(dim=64, depth=2, num_heads=4, rope="2d"),
    ...         image_size=16,
    ...         patch_size=4,
    ...     ),
    ...     decoder=diffmm.models.TextConfig(
    ...         vocab_size=100,
    ...         max_length=32,
    ...         backbone=diffmm.BackboneConfig(dim=64, depth=2, num_heads=4, rope="1d"),
    ...     ),
    ... )
    >>> model = diffmm.models.CaptioningModel(config)
    >>> tokens, images = torch.randint(100, (2, 8)), torch.randn(2, 3, 16, 16)
    >>> model(tokens, images).shape  # [B, N, vocab_size]
    torch.Size([2, 8, 100])
    """

    def __init__(self, config: CaptioningConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.encoder.make()
        self.decoder = config.make_decoder()
        width, dim = config.encoder.backbone.dim, config.decoder.backbone.dim
        layers = [Linear(width, dim)]
        if config.projector == "mlp":
            layers.append(Linear(dim, dim))
        for layer in layers:
            init_weights(layer, layer.in_features**-0.5)
        self.projector = nn.Sequential(layers[0], *(m for f in layers[1:] for m in (nn.GELU(), f)))
        self.start: Embedding | None = None
        if config.has_cross_attention:
            self.start = Embedding(1, dim)
            init_weights(self.start, config.decoder.backbone.init_std)

    @property
    def input_fields(self) -> tuple[str, ...]:
        """As in `CaptioningConfig`."""
        return self.config.input_fields

    def forward(
        self,
        tokens: Tensor,
        media: Tensor,
        num_samples: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        media_documents: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Any:
        """Compute logits `[B, N, vocab_size]`: those at `n` predict `tokens[:, n]` from the media
        and the text before it. Given `targets`, compute their cross-entropy instead
        (`diffmm.ops.Losses`), for which the logits are never in memory as a whole.

        Args:
            tokens: Texts, `[B, N]` ids, padded on the right; in packed rows one after the other.
            media: Images, `[B, C, H, W]` or `[B, K, C, H, W]`, or waveforms, `[B, S]` or
                `[B, K, S]`: one or `K` of them per row.
            num_samples: `[B]` or `[B, K]` integers, the number of real samples of each waveform;
                None if all are real.
            document_ids: The document of each token of packed texts, `[B, N]` integers from 0 to
                `K - 1`; the tokens of a document are adjacent. All are of document 0 by default.
            media_documents: The document of each image or sound, `[B, K]`, likewise. Every document
                needs at least one.
            targets: Token ids to predict, `[B, N]`: those of `tokens`, or
                `diffmm.batch.IGNORE_INDEX` for padding.

        Raises:
            ValueError: If a tensor has the wrong shape, a row is longer than the decoder's
                `max_length`, or packed rows are given to a decoder with a window.
        """
        row = self.row(
            tokens, media, num_samples, document_ids=document_ids, media_documents=media_documents
        )
        features = self.decoder.backbone(
            row.x, mask=row.mask, positions=row.positions, context=row.context
        )
        features = before_texts(row, features)
        return (
            self.decoder.logits(features)
            if targets is None
            else (self.decoder.losses(features, targets))
        )

    def row(
        self,
        tokens: Tensor,
        media: Tensor,
        num_samples: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        media_documents: Tensor | None = None,
        key_padding: Tensor | None = None,
    ) -> Row:
        """Arrange media and texts as rows of the decoder.

        Args:
            tokens: As in `forward`.
            media: As there.
            num_samples: As there.
            document_ids: As there.
            media_documents: As there.
            key_padding: `[B, N]` booleans, true where a token of a prompt is real.

        Raises:
            ValueError: As there.
        """
        found, real = self.media_tokens(media, num_samples)
        self._check(tokens, found, document_ids, media_documents)
        (batch, num_items, per_item), length = found.shape[:3], tokens.shape[1]
        num_documents, owners = 1, None
        if document_ids is not None or media_documents is not None:
            kind: dict[str, Any] = {"dtype": torch.int64, "device": found.device}
            num_documents = num_items
            if media_documents is None:
                media_documents = torch.zeros(batch, num_items, **kind)
            if document_ids is None:
                document_ids = torch.zeros(batch, length, **kind)
            owners = media_documents.repeat_interleave(per_item, dim=1)
        text = self.decoder.embed(tokens)
        real = None if real is None else real.flatten(1)
        row = make_row(
            Tokens(found.flatten(1, 2).to(text.dtype), real, owners),
            Tokens(text, key_padding, document_ids),
            start=None if self.start is None else self.start.weight,
            num_documents=num_documents,
        )
        longest = self.config.decoder.max_length
        if row.x.shape[1] > longest:
            raise ValueError(
                f"{self.prefix_name(row.num_prefix)} and {length} of text are longer than the "
                f"decoder's max_length={longest}: shorten them or increase max_length"
            )
        return row

    def media_tokens(
        self, media: Tensor, num_samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode images or sounds as inputs of the decoder.

        Args:
            media: As in `forward`.
            num_samples: As there.

        Returns:
            Tokens, `[B, K, M, dim]`, and `[B, K, M]` booleans, true where one is real; None if all
            are.
        """
        single = 4 if isinstance(self.config.encoder, ImageConfig) else 2
        if media.ndim == single:
            media = media[:, None]
        if media.ndim != single + 1 or 0 in media.shape[:2]:
            axes = "C, H, W" if single == 4 else "S"
            raise ValueError(
                f"media must be [B, {axes}] or [B, K, {axes}], got shape {tuple(media.shape)}"
            )
        inputs = [media.flatten(0, 1)]
        if num_samples is not None:
            inputs.append(num_samples.flatten())
        embedded = self.encoder.embed(*inputs)
        features = self.encoder.encode(embedded)[0][:, self.encoder.num_prefix_tokens :]
        sizes = media.shape[:2]
        real = embedded.key_padding
        return (
            self.projector(features).unflatten(0, sizes),
            None if real is None else real.unflatten(0, sizes),
        )

    def num_media_tokens(self, media: Tensor) -> int:
        """Number of tokens of the media of a row, including padding."""
        single = 4 if isinstance(self.config.encoder, ImageConfig) else 2
        items = media if media.ndim == single else media[:, 0]
        return self.encoder.num_patches(items) * (1 if items is media else media.shape[1])

    def num_prefix_tokens(self, media: Tensor) -> int:
        """Number of tokens before the text in a row with one document: those of the media, or with
        cross-attention the start token."""
        return self.num_media_tokens(media) if self.start is None else 1

    def prefix_name(self, num_tokens: int) -> str:
        """What `num_tokens` tokens before a text are, for messages."""
        if self.start is None:
            return f"{num_tokens} tokens of media"
        return f"{num_tokens} start token{'s' if num_tokens > 1 else ''}"

    def read_prefix(
        self,
        cache: KVCache,
        tokens: Tensor,
        media: Tensor,
        num_samples: Tensor | None = None,
        *,
        key_padding: Tensor | None = None,
    ) -> Read:
        """Read media and prompts, with an empty key-value cache of the decoder, to which their keys
        and values are appended; with cross-attention, it keeps those of the media, too.

        Args:
            cache: The cache, made by `decoder.new_cache`.
            tokens: Prompts, `[B, N]` ids, padded on the left; `N` may be 0.
            media: As in `forward`.
            num_samples: As there.
            key_padding: `[B, N]` booleans, true where a token is real; None if all are.
        """
        row = self.row(tokens, media, num_samples, key_padding=key_padding)
        features = self.decoder.backbone(
            row.x, mask=row.mask, positions=row.positions, cache=cache, context=row.context
        )
        length = row.x.shape[1]
        if row.real is None or row.positions is None:
            positions = torch.arange(length - 1, length, device=row.x.device)
            return Read(features[:, -1], positions, None)
        places = torch.arange(length, device=row.x.device)
        last = torch.where(row.real, places, 0).amax(dim=1, keepdim=True)
        features = features.take_along_dim(last[..., None], dim=1)[:, 0]
        return Read(features, row.positions.take_along_dim(last, dim=1), row.real)

    def _check(
        self,
        tokens: Tensor,
        found: Tensor,
        document_ids: Tensor | None,
        media_documents: Tensor | None,
    ) -> None:
        if tokens.ndim != 2 or tokens.shape[0] != found.shape[0]:
            raise ValueError(
                f"tokens must be [B, N] with B={len(found)} as the media, got shape "
                f"{tuple(tokens.shape)}"
            )
        for name, given, wanted in (
            ("document_ids", document_ids, tuple(tokens.shape)),
            ("media_documents", media_documents, tuple(found.shape[:2])),
        ):
            if given is not None and tuple(given.shape) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(given.shape)}")
        window = self.config.decoder.backbone.window
        if window is not None and not (document_ids is None and media_documents is None):
            raise ValueError(
                f"packed rows are not supported by a decoder with window={window}, which counts "
                f"the tokens of other documents: use one pair per row, or no window"
            )
