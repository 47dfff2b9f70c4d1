"""A modality of your own: video, as patches of space and time with 3-D rotary positions.

A config declares its inputs and their shapes, a model turns them into tokens; attention, positions,
pooling, head, training, memory estimates and attention maps are the library's. The task here is to
tell in which of four directions a square moves.

    python docs/examples/video.py            # trains for a minute, prints the accuracy
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffmm.batch import InputShapes
from diffmm.layers.linear import Conv3d, init_weights
from diffmm.layers.positions import coordinates
from diffmm.models import BackboneConfig, Embedded, Encoder, EncoderConfig
from diffmm.training import Classification, OptimizerConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class VideoConfig(EncoderConfig):
    """Everything that decides a video model: `EncoderConfig`, sizes of clips and of patches."""

    input_fields: ClassVar[tuple[str, ...]] = ("videos",)

    video_size: tuple[int, int, int]  # frames, height, width
    patch_size: tuple[int, int, int]
    in_channels: int = 1

    @property
    def num_axes(self) -> int:
        return 3

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(s // p for s, p in zip(self.video_size, self.patch_size, strict=True))

    def input_shapes(self, batch_size: int, length: int | None = None) -> InputShapes:
        return {"videos": ((batch_size, self.in_channels, *self.video_size), torch.float32)}


class VideoModel(Encoder):
    """Clips `[B, C, T, H, W]` to classes."""

    config: VideoConfig

    def __init__(self, config: VideoConfig) -> None:
        super().__init__(config, config.grid)
        size = config.patch_size
        self.stem = Conv3d(config.in_channels, config.backbone.dim, size, stride=size)
        self.stem.apply(partial(init_weights, std=0.02))

    def forward(self, videos: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(videos))

    def forward_features(self, videos: Tensor) -> Tensor:
        return self.encode(self.embed(videos))[0]

    def embed(self, videos: Tensor) -> Embedded:
        tokens = self.stem(videos).flatten(2).transpose(1, 2)
        if self.positions is not None:
            tokens = tokens + self.positions(tokens.shape[1])
        places = coordinates(self.config.grid, device=videos.device)
        return Embedded(tokens, places, key_padding=None)


class MovingSquares(Dataset[dict[str, Tensor]]):
    """Clips of 8 frames of 16 x 16 pixels; the label is the direction of motion."""

    DIRECTIONS = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(4, (count,), generator=generator)
        start = torch.randint(16, (count, 1, 2), generator=generator)
        places = start + torch.arange(8)[None, :, None] * self.DIRECTIONS[self.labels][:, None]
        row, column = ((torch.arange(16) - places[..., i : i + 1]) % 16 < 5 for i in (0, 1))
        self.videos = (row[..., :, None] & column[..., None, :]).float().unsqueeze(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        videos, labels = self.videos[index], self.labels[index]
        return {"videos": videos, "labels": labels, "index": torch.tensor(index)}


def train(attention: str = "diff_v2", steps: int = 300) -> float:
    """Train on 512 clips and return the accuracy on 256 others."""
    torch.manual_seed(0)
    backbone = BackboneConfig(48, 3, 2, attention=attention, rope="3d", qk_norm=True)
    sizes = {"video_size": (8, 16, 16), "patch_size": (2, 4, 4)}
    config = VideoConfig(backbone=backbone, num_classes=4, cls_token=False, pool="mean", **sizes)
    schedule = ScheduleConfig(steps, warmup_steps=min(50, steps // 2))
    task = Classification(VideoModel(config), OptimizerConfig(3e-3), schedule)
    loaders = [DataLoader(MovingSquares(n, n), 32, shuffle=n == 512) for n in (512, 256)]
    trainer = Trainer(max_steps=steps, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(task, loaders[0])
    return float(trainer.validate(task, loaders[1])[0]["val/accuracy"])


if __name__ == "__main__":
    print(f"accuracy {train():.3f}")
