"""Learning-rate schedules over optimizer steps."""

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffmm.checks import Settings, check_choice


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """Learning-rate schedule: a linear warmup to the peak, followed by a decay of the given kind.

    The number of steps is set here and not taken from the trainer, so that a resumed or extended
    run keeps the schedule that it started with.

    Attributes:
        total_steps: Number of optimizer steps until the learning rate reaches `final_fraction` of
            its peak, where it stays; usually the trainer's `max_steps`.
        kind: Shape of the decay: "cosine", "linear" or "constant" (stays at the peak).
        warmup_steps: Number of warmup steps. Step `s`, counted from 0, has
            `(s + 1) / (warmup_steps + 1)` times the peak, so that no step has a learning rate of 0.
        final_fraction: Final learning rate as a fraction of the peak, in [0, 1].

    Raises:
        ValueError: If a field is invalid; the message names the field and the value.
    """

    total_steps: int
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, ("cosine", "linear", "constant"))
        if self.total_steps < 1:
            raise ValueError(
                f"total_steps must be at least 1, got {self.total_steps}: give the number of "
                f"optimizer steps of the whole run"
            )
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"warmup_steps must be in [0, total_steps), got {self.warmup_steps} "
                f"of {self.total_steps}: a shorter run also needs a shorter warmup "
                f"(--model.schedule.warmup_steps {max(0, self.total_steps // 10)})"
            )
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(f"final_fraction must be in [0, 1], got {self.final_fraction}")

    def factor(self, step: int) -> float:
        """Return the factor on the peak learning rate at optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        left = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
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
