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


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("1-sqrt", 1.0 - math.sqrt(0.5))])
def test_wsd_is_stable_and_then_decays(shape, half):
    schedule = ScheduleConfig(
        100, "wsd", warmup_steps=10, final_fraction=0.2, decay_fraction=0.3, decay_shape=shape
    )
    assert [schedule.factor(step) for step in (0, 9)] == pytest.approx([1 / 11, 10 / 11])
    assert {schedule.factor(step) for step in range(10, 71)} == {1.0}
    assert schedule.factor(71) < 1.0
    assert schedule.factor(85) == pytest.approx(0.2 + 0.8 * half)
    assert schedule.factor(100) == schedule.factor(10_000) == pytest.approx(0.2)
    factors = [schedule.factor(step) for step in range(70, 101)]
    assert factors == sorted(factors, reverse=True)


def test_wsd_by_default_decays_in_the_last_tenth_by_a_square_root():
    given = ScheduleConfig(70, "wsd", decay_fraction=0.1, decay_shape="1-sqrt")
    steps = range(80)
    assert [*map(ScheduleConfig(70, "wsd").factor, steps)] == [*map(given.factor, steps)]
    assert given.decay_start == 63
    # A short run has one step of decay, and the whole run may be the decay.
    assert ScheduleConfig(3, "wsd").decay_start == 2
    assert ScheduleConfig(10, "wsd", decay_fraction=1.0).decay_start == 0


def run_of(make, fit, batches, total_steps, max_steps, ckpt_path=None):
    """Weights, moments and the next learning rate after `max_steps` steps."""
    torch.manual_seed(0)
    schedule = ScheduleConfig(total_steps, "wsd", warmup_steps=2, decay_fraction=0.5)
    task = make.task("image", schedule=schedule, optimizer=OptimizerConfig(1e-2))
    run = fit(task, batches, max_steps=max_steps, ckpt_path=ckpt_path, logger=False)
    moments = run.optimizers[0].state_dict()["state"]
    tensors = {**task.state_dict(), **{f"{n}.{k}": t for n in moments
                                       for k, t in moments[n].items()}}  # fmt: skip
    return run, {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("total_steps", "stop"), [(8, 6), (8, 3), (16, 4)])
def test_wsd_resumes_and_extends_bitwise(make, fit, tmp_path, total_steps, stop):
    """Resumed in the decay and before it with the same length, and extended from 8 to 16 steps in
    the stable phase, a run equals one that was never stopped."""
    batches = [make.batch("image")]
    whole, expected = run_of(make, fit, batches, total_steps, total_steps)
    first, _ = run_of(make, fit, batches, 8, stop)
    first.save_checkpoint(tmp_path / "run.ckpt")
    resumed, found = run_of(
        make, fit, batches, total_steps, total_steps, ckpt_path=tmp_path / "run.ckpt"
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rates = [run.optimizers[0].param_groups[0]["lr"] for run in (whole, resumed)]
    assert rates == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize(("fraction", "steps"), [(0.1, 10), (0.0667, 7), (0.0, 0), (5.0, 5)])
def test_a_warmup_may_be_a_fraction_of_all_steps(kind, fraction, steps):
    schedule = ScheduleConfig(100, kind, warmup_steps=fraction)
    wanted = ScheduleConfig(100, kind, warmup_steps=steps)
    assert schedule.num_warmup_steps == steps
    factors = [schedule.factor(step) for step in range(101)]
    assert factors == [wanted.factor(step) for step in range(101)]


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
        ({"warmup_steps": -0.01}, "warmup_steps must be in"),
        ({"warmup_steps": 0.99}, "warmup_steps must be in"),
        ({"warmup_steps": 1.5}, "warmup_steps must be a number of steps, or a fraction of total"),
        ({"final_fraction": 2.0}, r"final_fraction must be in \[0, 1\], got 2.0"),
        ({"kind": "cosin"}, "kind must be one of .* got 'cosin'; did you mean 'cosine'?"),
        ({"decay_fraction": 0.2}, "decay_fraction=0.2 is only for kind='wsd', got kind='cosine'"),
        (
            {"decay_shape": "linear", "kind": "linear"},
            "decay_shape='linear' is only for kind='wsd'",
        ),
        ({"kind": "wsd", "decay_fraction": 0.0}, r"decay_fraction must be in \(0, 1\], got 0.0"),
        ({"kind": "wsd", "decay_fraction": 1.5}, r"decay_fraction must be in \(0, 1\], got 1.5"),
        ({"kind": "wsd", "decay_shape": "sqrt"}, "decay_shape must be one of 'linear', '1-sqrt'"),
        (
            {"kind": "wsd", "warmup_steps": 6, "decay_fraction": 0.5},
            "the decay starts at step 5 of 10, before the warmup ends: choose warmup_steps of at "
            "most 5, got 6, or a smaller decay_fraction",
        ),
    ],
)
def test_impossible_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**{"total_steps": 10, **settings})
