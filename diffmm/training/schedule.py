"""Learning-rate schedules over optimizer steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffmm.checks import Settings, check_choice

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "1-sqrt": lambda done: 1.0 - math.sqrt(done),
}
"""What is left of a decay, from 1 to 0, when a part of it is done."""

KINDS = ("cosine", "linear", "constant", "wsd")
DECAY_FRACTION, DECAY_SHAPE = 0.1, "1-sqrt"
"""Defaults of "wsd"."""


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """Learning-rate schedule: a linear warmup to the peak, followed by a decay of the given kind.

    The number of steps is set here and not taken from the trainer, so that a resumed or extended
    run keeps the schedule that it started with.

    Warmup-stable-decay ("wsd"; Hu et al. 2024, MiniCPM, with an exponential decay) stays at the
    peak after the warmup and decays only in the last `decay_fraction` of the steps. A run that is
    extended (by a larger `total_steps`) before its decay starts therefore equals one that was
    longer from the start; its decay moves to the new end. With "cosine" and "linear", a longer
    schedule changes the rate of every step.

    Attributes:
        total_steps: Number of optimizer steps until the learning rate reaches `final_fraction` of
            its peak, where it stays; usually the trainer's `max_steps`.
        kind: Shape of the decay: "cosine", "linear", "constant" (stays at the peak) or "wsd".
        warmup_steps: Number of warmup steps, or, as a float below 1, their fraction of
            `total_steps`, rounded. Step `s` of `W` warmup steps, counted from 0, has
            `(s + 1) / (W + 1)` times the peak, so that no step has a learning rate of 0.
        final_fraction: Final learning rate as a fraction of the peak, in [0, 1].
        decay_fraction: Part of `total_steps` in which "wsd" decays, in (0, 1], rounded to whole
            steps, at least one; 0.1 by default. Only for "wsd".
        decay_shape: Shape of the decay of "wsd" with the part `t` of it done: "linear" (`1 - t`) or
            "1-sqrt" (`1 - sqrt(t)`), the default; both are from Hägele et al. 2024, who found the
            second better. Only for "wsd".

    Raises:
        ValueError: If a field is invalid; the message names the field and the value.
    """

    total_steps: int
    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int | float = 0
    final_fraction: float = 0.0
    decay_fraction: float | None = None
    decay_shape: Literal["linear", "1-sqrt"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, KINDS)
        if self.total_steps < 1:
            raise ValueError(
                f"total_steps must be at least 1, got {self.total_steps}: give the number of "
                f"optimizer steps of the whole run"
            )
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(
                f"warmup_steps must be a number of steps, or a fraction of total_steps below 1, "
                f"got {self.warmup_steps}"
            )
        if not 0 <= self.num_warmup_steps < self.total_steps or self.warmup_steps < 0:
            raise ValueError(
                f"warmup_steps must be in [0, total_steps), got {self.warmup_steps} "
                f"of {self.total_steps}: a shorter run also needs a shorter warmup "
                f"(--model.schedule.warmup_steps {max(0, self.total_steps // 10)})"
            )
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(f"final_fraction must be in [0, 1], got {self.final_fraction}")
        if self.kind == "wsd":
            self._check_decay()
            return
        for name in ("decay_fraction", "decay_shape"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is only for kind='wsd', got "
                    f"kind={self.kind!r}: drop {name}, or choose kind='wsd'"
                )

    def _check_decay(self) -> None:
        if self.decay_fraction is not None and not 0.0 < self.decay_fraction <= 1.0:
            raise ValueError(f"decay_fraction must be in (0, 1], got {self.decay_fraction}")
        if self.decay_shape is not None:
            check_choice("decay_shape", self.decay_shape, ("linear", "1-sqrt"))
        if self.num_warmup_steps > self.decay_start:
            raise ValueError(
                f"the decay starts at step {self.decay_start} of {self.total_steps}, before the "
                f"warmup ends: choose warmup_steps of at most {self.decay_start}, got "
                f"{self.warmup_steps}, or a smaller decay_fraction"
            )

    @property
    def num_warmup_steps(self) -> int:
        """The number of warmup steps."""
        if self.warmup_steps < 1:
            return round(self.warmup_steps * self.total_steps)
        return int(self.warmup_steps)

    @property
    def decay_start(self) -> int:
        """The step, counted from 0, from which on the learning rate decays."""
        if self.kind == "constant":
            return self.total_steps
        if self.kind != "wsd":
            return self.num_warmup_steps
        fraction = DECAY_FRACTION if self.decay_fraction is None else self.decay_fraction
        return self.total_steps - max(1, round(fraction * self.total_steps))

    def factor(self, step: int) -> float:
        """Return the factor on the peak learning rate at optimizer step `step`, counted from 0."""
        if step < self.num_warmup_steps:
            return (step + 1) / (self.num_warmup_steps + 1)
        if self.kind == "constant" or step < self.decay_start:
            return 1.0
        done = min(1.0, (step - self.decay_start) / (self.total_steps - self.decay_start))
        shape = (self.decay_shape or DECAY_SHAPE) if self.kind == "wsd" else self.kind
        left = SHAPES[shape](done)
        return self.final_fraction + (1.0 - self.final_fraction) * left


def make_scheduler(optimizer: Optimizer, config: ScheduleConfig) -> LambdaLR:
    """Return a torch scheduler that scales the learning rate of every group by
    `config.factor(step)`."""
    return LambdaLR(optimizer, config.factor)


def set_learning_rates(scheduler: LambdaLR) -> None:
    """Set the learning rate of every group to the scheduler's value for the next step; needed when
    a resumed run changes the schedule."""
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, (base, factor) in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
