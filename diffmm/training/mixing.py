"""Mixup and CutMix (by timm) for images and audio, with one or several labels per sample."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffmm.checks import Settings, check_choice


@dataclass(frozen=True)
class MixingConfig(Settings):
    """Mixup and CutMix settings. Sample `i` is mixed with sample `B - 1 - i` of the batch.

    Attributes:
        mixup_alpha: Parameter of the Beta distribution of Mixup's weight (Zhang et al. 2018); 0
            disables Mixup.
        cutmix_alpha: Parameter of the Beta distribution of CutMix's area (Yun et al. 2019), for
            images only; 0 disables CutMix.
        probability: Probability of mixing a batch (or, in the other modes, a sample), in [0, 1].
        switch_probability: Probability of CutMix instead of Mixup if both are enabled, in [0, 1].
        mode: Whether to draw one weight per "batch", per "pair" of samples or per sample ("elem").

    Raises:
        ValueError: If a field is invalid; the message names the field and the value.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, ("batch", "pair", "elem"))
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.mixup_alpha and not self.cutmix_alpha:
            raise ValueError(
                "mixing needs mixup_alpha or cutmix_alpha above 0: set one, or drop it"
            )
        for name in ("probability", "switch_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


def mix(inputs: Tensor, config: MixingConfig, *, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mix the samples of a batch.

    Args:
        inputs: Images, `[B, C, H, W]`, or waveforms, `[B, S]`; not modified.
        config: Mixing settings.
        key: Non-negative integers that seed the draw, so that a resumed run draws the same.

    Returns:
        The mixed inputs, and `[B, B]` weights: row `i` holds the fraction of each sample in
        mixture `i`, so that `weights @ targets` are the targets of the mixtures.

    Raises:
        ValueError: If the batch size is odd, or CutMix is used for anything but images.
    """
    size = inputs.shape[0]
    if size % 2:
        raise ValueError(f"mixing pairs the samples of a batch, so it must be even, got {size}")
    if config.cutmix_alpha and inputs.ndim != 4:
        raise ValueError("cutmix is for images: set cutmix_alpha to 0 and use mixup")
    from timm.data.mixup import Mixup  # which imports all of timm: only where a recipe mixes

    mixup = Mixup(
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        prob=config.probability,
        switch_prob=config.switch_probability,
        mode=config.mode,
        label_smoothing=0.0,
        num_classes=size,
    )
    # With each sample as its own class, timm's soft targets are the weights of the samples.
    with numpy_seeded(key):
        return mixup(inputs.clone(), torch.arange(size, device=inputs.device))


@contextmanager
def numpy_seeded(key: tuple[int, ...]) -> Iterator[None]:
    """Seed NumPy's global generator, which timm uses, and restore its state on exit."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(key).generate_state(8))
    try:
        yield
    finally:
        np.random.set_state(state)
