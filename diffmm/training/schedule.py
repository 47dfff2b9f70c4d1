"""Learning rate schedules over optimizer steps."""

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffmm.checks import Settings, check_choice


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """A factor on the peak learning rate: a linear warmup, then `kind`.

    The horizon is given here and not asked of the trainer, so that a resumed or prolonged run has
    the schedule that it started with.

    Attributes:
        total_steps: optimizer steps until the factor reaches `final_fraction`, where it then
            stays; usually the trainer's `max_steps`.
        kind: `"cosine"`, `"linear"`, or `"constant"`, which stays at the peak.
        warmup_steps: steps before the peak; step `s` of them has the factor
            `(s + 1) / (warmup_steps + 1)`, so that no step is wasted on a factor of 0.
        final_fraction: of the peak, at the end, in [0, 1].

    Raises:
        ValueError: naming the field and the value.
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
                f"of {self.total_steps}"
            )
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(f"final_fraction must be in [0, 1], got {self.final_fraction}")

    def factor(self, step: int) -> float:
        """The factor of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        left = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.final_fraction + (1.0 - self.final_fraction) * left


def make_scheduler(optimizer: Optimizer, config: ScheduleConfig) -> LambdaLR:
    """A torch scheduler that scales every group's learning rate by `config.factor(step)`."""
    return LambdaLR(optimizer, config.factor)


def set_learning_rates(scheduler: LambdaLR) -> None:
    """Give every group the learning rate that the scheduler, which may have been changed, has for
    the next step."""
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, (base, factor) in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
