"""Learning rates over steps."""

import math

import pytest
import torch

from diffmm.training import OptimizerConfig, ScheduleConfig
from diffmm.training.schedule import make_scheduler


@pytest.mark.parametrize(
    ("kind", "middle", "end"),
    [("cosine", 0.1 + 0.9 * 0.5, 0.1), ("linear", 0.1 + 0.9 * 0.5, 0.1), ("constant", 1.0, 1.0)],
)
def test_values(kind, middle, end):
    schedule = ScheduleConfig(110, kind=kind, warmup_steps=10, final_fraction=0.1)
    assert schedule.factor(0) == pytest.approx(1 / 11)
    assert schedule.factor(9) == pytest.approx(10 / 11)
    assert schedule.factor(10) == 1.0
    assert schedule.factor(60) == pytest.approx(middle)
    assert schedule.factor(110) == pytest.approx(end)
    assert schedule.factor(10_000) == pytest.approx(end)


def test_the_cosine_is_one():
    schedule = ScheduleConfig(100)
    assert schedule.factor(0) == 1.0
    assert schedule.factor(25) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


def test_every_group_keeps_its_proportion():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 1.0},
                                 {"params": [weights[1]], "lr": 0.1}])  # fmt: skip
    schedule = ScheduleConfig(8, kind="linear", warmup_steps=1)
    scheduler = make_scheduler(optimizer, schedule)
    for step in range(12):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([schedule.factor(step), 0.1 * schedule.factor(step)])
        optimizer.step()
        scheduler.step()


def test_a_resumed_run_follows_its_configuration(make, fit, tmp_path):
    batch, settings = make.batch("image"), {"optimizer": OptimizerConfig(1e-2)}
    schedule = ScheduleConfig(20, warmup_steps=4)

    def rates(trainer):
        return trainer.optimizers[0].param_groups[0]["lr"]

    # The trainer stops early and later resumes: the schedule keeps its configured length.
    trainer = fit(make.task("image", schedule=schedule, **settings), [batch], max_steps=6)
    assert rates(trainer) == pytest.approx(1e-2 * schedule.factor(6))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = fit(
        make.task("image", schedule=schedule, **settings),
        [batch],
        max_steps=9,
        ckpt_path=tmp_path / "run.ckpt",
        logger=False,
    )
    assert rates(resumed) == pytest.approx(1e-2 * schedule.factor(9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"total_steps": -1}, "total_steps must be at least 1, got -1"),
        ({"warmup_steps": 10}, r"warmup_steps must be in \[0, total_steps\), got 10 of 10"),
        ({"warmup_steps": -1}, "warmup_steps must be in"),
        ({"final_fraction": 2.0}, r"final_fraction must be in \[0, 1\], got 2.0"),
        ({"kind": "cosin"}, "kind must be one of .* got 'cosin'; did you mean 'cosine'?"),
    ],
)
def test_impossible_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**{"total_steps": 10, **settings})
