"""Changes of rotary frequencies for longer sequences."""

import math
from dataclasses import dataclass
from typing import Literal

from diffmm.checks import Settings, check_choice

KINDS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling(Settings):
    """How the rotary frequencies of a model are changed for sequences that are longer than those it
    was first trained with.

    Attributes:
        kind: `"linear"` divides all frequencies by `factor`, so that positions are interpolated
            (Chen et al. 2023). `"llama3"` does so for wavelengths above `original_length /
            low_frequency_factor`, leaves those below `original_length / high_frequency_factor`
            unchanged, and interpolates between them (Llama 3.1). `"yarn"` interpolates between both
            by dimension, from that which turns `beta_fast` times in `original_length` to that which
            turns `beta_slow` times (Peng et al. 2023, section 3.2).
        factor: By how much the sequence is longer; above 0.
        original_length: Length of the sequences before, in tokens; `"llama3"` and `"yarn"` need it.
        low_frequency_factor, high_frequency_factor: See `kind`; `"llama3"` only.
        beta_fast, beta_slow: See `kind`; `"yarn"` only.
        truncate: Whether the ends of the interpolation are whole dimensions; `"yarn"` only.
        attention_factor: Factor of the rotated queries and keys; `"yarn"` only. By default
            `0.1 ln(factor) + 1` (Peng et al. 2023, eq. 22), or 1 for factors up to 1.

    Raises:
        ValueError: If a field is out of range or not used by `kind`.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_length: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, KINDS)
        if self.factor <= 0.0:
            raise ValueError(f"factor must be positive, got {self.factor}")
        if (self.original_length is None) != (self.kind == "linear"):
            raise ValueError(
                f"original_length is for kinds 'llama3' and 'yarn', which need it, "
                f"got {self.original_length} for {self.kind!r}"
            )
        if self.original_length is not None and self.original_length < 1:
            raise ValueError(f"original_length must be at least 1, got {self.original_length}")
        if not 0.0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor must be positive and below high_frequency_factor, got "
                f"{self.low_frequency_factor} and {self.high_frequency_factor}"
            )
        if not 0.0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"beta_slow must be positive and at most beta_fast, got {self.beta_slow} and "
                f"{self.beta_fast}"
            )
        if self.attention_factor is not None and self.attention_factor <= 0.0:
            raise ValueError(f"attention_factor must be positive, got {self.attention_factor}")
        for kind, names in (
            ("llama3", ("low_frequency_factor", "high_frequency_factor")),
            ("yarn", ("beta_fast", "beta_slow", "truncate", "attention_factor")),
        ):
            for name in names:
                value = getattr(self, name)
                if self.kind != kind and value != self.__dataclass_fields__[name].default:
                    raise ValueError(f"{name}={value} is only used by kind {kind!r}")

    @property
    def rotation_factor(self) -> float:
        """Factor of the rotated queries and keys."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0

    def scaled(self, frequencies: list[float], base: float) -> list[float]:
        """The frequencies of all pairs, given those without scaling."""
        if self.kind == "linear":
            return [frequency / self.factor for frequency in frequencies]
        if self.kind == "llama3":
            shares = self._llama3(frequencies)
        else:
            shares = self._yarn(frequencies, base)
        return [
            frequency * (share + (1.0 - share) / self.factor)
            for frequency, share in zip(frequencies, shares, strict=True)
        ]

    def _llama3(self, frequencies: list[float]) -> list[float]:
        """The share of each frequency that is left unchanged, between 0 and 1."""
        assert self.original_length is not None
        low, high = self.low_frequency_factor, self.high_frequency_factor
        turns = [self.original_length * frequency / (2 * math.pi) for frequency in frequencies]
        return [min(1.0, max(0.0, (each - low) / (high - low))) for each in turns]

    def _yarn(self, frequencies: list[float], base: float) -> list[float]:
        """The share of each frequency that is left unchanged, between 0 and 1."""
        assert self.original_length is not None
        dim, length = 2 * len(frequencies), self.original_length
        low, high = (
            dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001
        return [1.0 - min(1.0, max(0.0, (j - low) / width)) for j in range(len(frequencies))]
