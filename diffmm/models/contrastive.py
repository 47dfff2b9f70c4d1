"""The contrastive model: a tower per modality, whose embeddings are compared by their angle."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffmm.batch import InputShapes
from diffmm.checks import Settings
from diffmm.layers.norm import upcast
from diffmm.models.audio import AudioConfig, AudioModel
from diffmm.models.backbone_config import BackboneConfig
from diffmm.models.image import ImageConfig, ImageModel
from diffmm.models.pretrained import Pretrained
from diffmm.models.text_tower import TextTower, TextTowerConfig

NOT_OF_BLOCKS = (
    "depth",
    "full_attention_layers",
    "final_norm",
    "rope",
    "rope_base",
    "rope_scaling",
)
"""Fields of a backbone's config that its blocks do not depend on, or not alone."""

TOWERS = ("image", "audio", "text")
"""Names of the towers, in the order in which they are built."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(Settings):
    """Configuration of a contrastive model.

    Attributes:
        image: Configuration of the image tower; None if the model takes no images. With
            `num_classes=0` it gets a projection without bias to `embed_dim`; otherwise its
            `num_classes` must be `embed_dim`, as in a converted tower of CLIP.
        audio: Configuration of the audio tower, likewise. At least one of the two is given; with
            both, images, sounds and texts share one space.
        text: Configuration of the text tower, with `num_outputs` likewise. The text encoder of CLIP
            is `causal=True` with the pool `"eos"` or `"argmax"`; a bidirectional one is
            `causal=False` with the pool `"mean"`.
        embed_dim: Width of the embeddings.
        shared_blocks: Number of last blocks that all towers share: 0 for separate towers, the depth
            for one backbone. They are those of the first tower, with its layer indices. The
            settings of the blocks must agree; rotary positions and the number of blocks need not.
        init_temperature: Initial temperature, by whose inverse cosine similarities are multiplied.
            0.07 in CLIP (Radford et al. 2021), 0.1 in SigLIP (Zhai et al. 2023).
        max_scale: Upper bound of the inverse temperature; 100 in CLIP.
        init_bias: Initial value of a learned bias of the scaled similarities, for the loss of
            SigLIP (-10 there); None means no bias.

    Raises:
        ValueError: If a field is out of range, or the blocks of the towers cannot be shared; the
            message names the field and the value.
    """

    text: TextTowerConfig
    embed_dim: int
    image: ImageConfig | None = None
    audio: AudioConfig | None = None
    shared_blocks: int = 0
    init_temperature: float = 0.07
    max_scale: float = 100.0
    init_bias: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image is None and self.audio is None:
            raise ValueError("a contrastive model needs an image or an audio tower: give one")
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {self.embed_dim}")
        if self.init_temperature <= 0.0:
            raise ValueError(f"init_temperature must be positive, got {self.init_temperature}")
        if self.max_scale < 1.0 / self.init_temperature:
            raise ValueError(
                f"max_scale must be at least 1 / init_temperature = "
                f"{1.0 / self.init_temperature:g}, got {self.max_scale}"
            )
        for name, tower in self.towers.items():
            object.__setattr__(self, name, self._projected(name, tower))
        self._check_shared()

    @property
    def towers(self) -> dict[str, ImageConfig | AudioConfig | TextTowerConfig]:
        """The configs of the towers by their names, in the order of `TOWERS`."""
        towers = {name: getattr(self, name) for name in TOWERS}
        return {name: tower for name, tower in towers.items() if tower is not None}

    @property
    def input_fields(self) -> tuple[str, ...]:
        """The batch fields that `forward` takes, in order; a batch has images, waveforms or
        both."""
        return tuple(field for name in reversed(self.towers) for field in _fields(self, name))

    @property
    def exact_fields(self) -> tuple[str, ...]:
        """As in `EncoderConfig`."""
        return () if self.audio is None else self.audio.exact_fields

    def input_shapes(
        self, batch_size: int, length: int | None = None, *, num_sounds: int = 0
    ) -> InputShapes:
        """Shapes and dtypes of a batch of texts of `max_length` and of images or, without an image
        tower, of sounds of `length` samples; with `num_sounds`, that many of the batch are sounds
        and the others images."""
        shapes = self.text.input_shapes(batch_size)
        if self.image is not None:
            shapes |= self.image.input_shapes(batch_size - num_sounds)
        if self.audio is not None and (num_sounds or self.image is None):
            shapes |= self.audio.input_shapes(num_sounds or batch_size, length)
        return shapes

    def _projected(self, name: str, tower: Any) -> Any:
        """The config of a tower with a projection to `embed_dim`."""
        field = "num_outputs" if name == "text" else "num_classes"
        width = getattr(tower, field)
        if width == self.embed_dim:
            return tower
        if width:
            raise ValueError(
                f"{name}.{field} must be embed_dim={self.embed_dim}, or 0 for a new projection, "
                f"got {width}"
            )
        return dataclasses.replace(tower, **{field: self.embed_dim, "head_bias": False})

    def _check_shared(self) -> None:
        backbones = {name: tower.backbone for name, tower in self.towers.items()}
        least = min(backbone.depth for backbone in backbones.values())
        if not 0 <= self.shared_blocks <= least:
            raise ValueError(
                f"shared_blocks must be between 0 and {least}, the depth of the shallowest tower, "
                f"got {self.shared_blocks}"
            )
        if not self.shared_blocks:
            return
        (first, expected), *others = (
            (name, _of_blocks(backbone, self.shared_blocks)) for name, backbone in backbones.items()
        )
        for name, found in others:
            for field, value in expected.items():
                if found[field] != value:
                    raise ValueError(
                        f"shared_blocks={self.shared_blocks} needs blocks of equal settings, but "
                        f"{field} is {value!r} in {first} and {found[field]!r} in {name}"
                    )


class Embeddings(NamedTuple):
    """The embeddings of pairs, and the parameters of the comparison."""

    media: Tensor
    """Embeddings of the images, followed by those of the sounds, `[B, embed_dim]`, of norm 1."""
    texts: Tensor
    """Embeddings of the texts, `[B, embed_dim]`, of norm 1."""
    scale: Tensor
    """Factor of the cosine similarities, the inverse temperature; a scalar."""
    bias: Tensor | None
    """Term added to them, a scalar; None without one."""


class ContrastiveModel(Pretrained, nn.Module):
    """Embeds images, sounds and texts in one space (CLIP, Radford et al. 2021; SigLIP, Zhai et al.
    2023).

    The similarity of an image or sound `x` and a text `y` is the cosine of the angle between their
    embeddings; the losses compare `scale * similarity + bias`.

    Attributes:
        image, audio, text: The towers (`ImageModel`, `AudioModel`, `TextTower`), None for an absent
            one; their heads are the projections.
        logit_scale: Logarithm of the scale, `[1]`, as FSDP2 does not shard scalars.
        logit_bias: The bias, `[1]`; None without one.

    >>> config = diffmm.models.ContrastiveConfig(
    ...     image=diffmm.models.ImageConfig(
    ...         backbone=diffmm.BackboneConfig(dim=64, depth=2, num_heads=4, rope="2d"),
    ...         image_size=16,
    ...         patch_size=4,
    ...     ),
    ...     text=diffmm.models.TextTowerConfig(
    ...         vocab_size=100,
    ...         max_length=8,
    ...         backbone=diffmm.BackboneConfig(dim=64, depth=2, num_heads=4),
    ...     ),
    ...     embed_dim=32,
    ... )
    >>> model = diffmm.models.ContrastiveModel(config)
    >>> images, tokens = torch.randn(3, 3, 16, 16), torch.randint(100, (2, 8))
    >>> (model.encode_image(images) @ model.encode_text(tokens).T).shape
    torch.Size([3, 2])
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.image = None if config.image is None else ImageModel(config.image)
        self.audio = None if config.audio is None else AudioModel(config.audio)
        self.text = TextTower(config.text)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = None if config.init_bias is None else nn.Parameter(torch.empty(1))
        self.reset_parameters()
        blocks = {name: tower.backbone.blocks for name, tower in self.towers.items()}
        (first, own), *others = blocks.items()
        self._shared: dict[str, str] = {}
        for name, theirs in others:
            for index in range(-config.shared_blocks, 0):
                theirs[index] = own[index]
                alias = f"{name}.backbone.blocks.{len(theirs) + index}."
                self._shared[alias] = f"{first}.backbone.blocks.{len(own) + index}."
        self.register_state_dict_post_hook(_without_aliases)
        self.register_load_state_dict_pre_hook(_with_aliases)

    def reset_parameters(self) -> None:
        """Initialize the scale and the bias."""
        nn.init.constant_(self.logit_scale, -math.log(self.config.init_temperature))
        if self.logit_bias is not None:
            assert self.config.init_bias is not None
            nn.init.constant_(self.logit_bias, self.config.init_bias)

    @property
    def towers(self) -> dict[str, Any]:
        """The towers by their names, in the order of `TOWERS`."""
        return {name: getattr(self, name) for name in self.config.towers}

    @property
    def input_fields(self) -> tuple[str, ...]:
        """As in `ContrastiveConfig`."""
        return self.config.input_fields

    @property
    def scale(self) -> Tensor:
        """Factor of the cosine similarities, a scalar."""
        return upcast(self.logit_scale).exp().squeeze(0)

    @property
    def bias(self) -> Tensor | None:
        """Term added to the scaled similarities, a scalar; None without one."""
        return None if self.logit_bias is None else upcast(self.logit_bias).squeeze(0)

    def forward(
        self,
        tokens: Tensor,
        num_tokens: Tensor | None,
        media: Tensor,
        num_samples: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Embeddings:
        """Compute the embeddings of pairs.

        Args:
            tokens: Token ids of the texts, `[B, N]`, padded on the right.
            num_tokens: `[B]` integers, the number of real tokens; None if all are real.
            media: Images, `[B, C, H, W]`, or waveforms, `[B, S]`.
            num_samples: `[B]` integers, the number of real samples of each waveform; None if all
                are real.
            images: Images `[I, C, H, W]` of a batch with both; the first `I` texts are theirs, and
                the others those of the waveforms, `[B - I, S]`.

        Raises:
            ValueError: If the model has no tower for the media, or a tower refuses its inputs.
        """
        found = self.encode_media(media, num_samples)
        if images is not None:
            found = torch.cat([self.encode_image(images), found])
        return Embeddings(found, self.encode_text(tokens, num_tokens), self.scale, self.bias)

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings of images `[B, C, H, W]`: `[B, embed_dim]` in float32, of norm 1.

        Raises:
            ValueError: If the model has no image tower, or the images have another shape.
        """
        if self.image is None:
            raise ValueError("the model has no image tower: it embeds sounds and texts")
        return _unit(self.image(images))

    def encode_audio(self, waveforms: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """Embeddings of waveforms `[B, S]`: `[B, embed_dim]` in float32, of norm 1.

        Args:
            waveforms: As in `AudioModel.forward`.
            num_samples: As there.

        Raises:
            ValueError: If the model has no audio tower, or the waveforms have another shape.
        """
        if self.audio is None:
            raise ValueError("the model has no audio tower: it embeds images and texts")
        return _unit(self.audio(waveforms, num_samples))

    def encode_media(self, media: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """`encode_image` for media with four axes, `encode_audio` for others."""
        if media.ndim == 4:
            return self.encode_image(media)
        return self.encode_audio(media, num_samples)

    def encode_text(self, tokens: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """Embeddings of texts, token ids `[B, N]`: `[B, embed_dim]` in float32, of norm 1.

        Args:
            tokens: As in `TextTower.forward`.
            num_tokens: As there.

        Raises:
            ValueError: If the texts are too long.
        """
        return _unit(self.text(tokens, num_tokens))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ContrastiveModel":
        """Cast and move the module, but keep the scale and the bias in float32: a step of training
        is less than the distance of two numbers in bfloat16, so that they would never change."""
        exact = [self.logit_scale] + ([] if self.logit_bias is None else [self.logit_bias])

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keep = moved.dtype.itemsize < 4 and any(tensor is each for each in exact)
            return tensor.to(moved.device) if keep else moved

        return super()._apply(move, recurse)

    def add_aliases(self, state: dict[str, Any], prefix: str = "") -> None:
        """Add the weights of shared blocks by their names in the other towers to a state, in place.

        Args:
            state: A state of this model.
            prefix: Prefix of the names in it.
        """
        for alias, original in self._shared.items():
            begin = prefix + original
            for name in [name for name in state if name.startswith(begin)]:
                state[prefix + alias + name.removeprefix(begin)] = state[name]

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Reduce the scale to at most `max_scale`, as CLIP does after every optimizer step."""
        local: Any = getattr(self.logit_scale, "to_local", None)  # of sharded weights
        scale = self.logit_scale if local is None else local()
        scale.clamp_(max=math.log(self.config.max_scale))


class ZeroShotClassifier(nn.Module):
    """Classifies images or sounds by their similarity to the embeddings of classes.

    The logits are `scale * similarity + bias`.

    Args:
        model: The contrastive model.
        classes: Embeddings of the classes, `[num_classes, embed_dim]`, of norm 1.
        tower: `"image"` or `"audio"`, the tower that embeds the inputs; None for inputs of both.
    """

    def __init__(self, model: ContrastiveModel, classes: Tensor, tower: str | None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("classes", classes, persistent=False)
        self.num_classes = len(classes)
        self.config: Any = model.config if tower is None else model.config.towers[tower]
        self.input_fields: tuple[str, ...] = (
            (*_fields(model.config, "image"), *_fields(model.config, "audio"))
            if tower is None
            else tuple(self.config.input_fields)
        )

    def forward(self, media: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """Compute logits, `[B, num_classes]`, of inputs as in `ContrastiveModel.encode_media`."""
        return self.compare(self.model.encode_media(media, num_samples))

    def compare(self, embeddings: Tensor) -> Tensor:
        """Compute logits, `[B, num_classes]`, of embeddings `[B, embed_dim]`."""
        logits = self.model.scale * (embeddings @ cast(Tensor, self.classes).T)
        return logits if self.model.bias is None else logits + self.model.bias


# Shared blocks have several names. A state has the first of them, so that they are saved once and
# torch's distributed checkpoint, which visits every module once, can load it.


def _without_aliases(
    model: ContrastiveModel, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    aliases = tuple(prefix + alias for alias in model._shared)
    for name in [name for name in state if aliases and name.startswith(aliases)]:
        del state[name]


def _with_aliases(model: ContrastiveModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    model.add_aliases(state, prefix)


def _unit(embeddings: Tensor) -> Tensor:
    return normalize(upcast(embeddings), dim=-1)


def _fields(config: ContrastiveConfig, name: str) -> tuple[str, ...]:
    return tuple(config.towers[name].input_fields)


def _of_blocks(backbone: BackboneConfig, count: int) -> dict[str, Any]:
    """The settings of the last `count` blocks of a backbone."""
    fields = {
        name: getattr(backbone, name)
        for name in backbone.__dataclass_fields__
        if name not in NOT_OF_BLOCKS
    }
    fields["num_kv_heads"] = backbone.num_kv_heads or backbone.num_heads
    fields["head_dim"] = backbone.resolved_head_dim
    fields["feed_forward_width"] = backbone.resolved_feed_forward_width
    # Counted from the end, where the shared blocks are.
    layers = (index - backbone.depth for index in backbone.full_attention_layers)
    return {**fields, "full_attention_layers": [index for index in layers if index >= -count]}
