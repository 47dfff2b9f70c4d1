"""A non-finite loss or gradient has no effect on a run, and is reported."""

import json
from pathlib import Path

import pytest
import torch
from forked import run_as_torchrun
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from diffmm.training import Checkpoints, NonFiniteGuard, OptimizerConfig, ScheduleConfig
from diffmm.training.resilience.non_finite import TooManyNonFiniteStepsError
from diffmm.training.resilience.replay import MicroBatch, load_batches, replay


class Stream:
    """Images, some of which have non-finite values."""

    def __init__(self, make):
        self.batches = [make.batch("image") for _ in range(6)]
        for number, batch in enumerate(self.batches):
            batch["index"] = 100 * number + torch.arange(6)
        self.bad = {name: tensor.clone() for name, tensor in make.batch("image").items()}
        self.bad["images"][2, 0, 3, 3] = float("nan")
        self.bad["index"] = 900 + torch.arange(6)

    def __call__(self, pattern):
        """`"..x."` gives a good batch for each dot, in turn, and the bad one for each x."""
        good = iter(self.batches)
        return [self.bad if mark == "x" else next(good) for mark in pattern]


@pytest.fixture
def stream(make):
    return Stream(make)


@pytest.fixture
def train(make, fit):
    """`train(batches, ...)` returns the task and its trainer, at the end or at an error."""

    def run(batches, steps=None, task=None, **settings):
        torch.manual_seed(3)
        task = task or make.task("image", optimizer=OptimizerConfig(1e-2))
        steps = steps or len(batches) // settings.get("accumulate_grad_batches", 1)
        return task, fit(task, batches, max_steps=steps, **{"logger": False, **settings})

    return run


def state_of(task, trainer):
    """Everything that a step may change: weights, buffers and moments."""
    tensors = dict(task.state_dict())
    (optimizer,) = trainer.optimizers
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{name}": tensor.clone() for name, tensor in moments.items()}
    return tensors


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def news(folder):
    return [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
@pytest.mark.parametrize("pattern", ["x...", ".x..", "..xx.", "...x"])
def test_a_bad_step_changes_nothing(train, stream, pattern, settings):
    """The schedule is constant, so the run equals one without the bad steps."""
    with_it = train(stream(pattern), **settings)
    without = train(stream(pattern.replace("x", "")), **settings)
    assert_same(state_of(*with_it), state_of(*without))
    assert with_it[1].global_step == len(pattern)
    assert all(tensor.isfinite().all() for tensor in state_of(*with_it).values())


@pytest.mark.parametrize("pattern", ["..x...", "...x..", "..xx.."])
def test_a_bad_micro_batch_takes_its_step_along(train, stream, tmp_path, pattern):
    good = stream.batches
    batches = [*good[:2], *stream(pattern)[2:4], *good[4:6]]
    with_it = train(batches, accumulate_grad_batches=2)
    without = train([*good[:2], *good[4:6]], accumulate_grad_batches=2)
    assert_same(state_of(*with_it), state_of(*without))
    (told,) = news(tmp_path)
    # Only the indices of the micro-batches at fault are recorded.
    assert told["processes"][0]["samples"] == [*range(900, 906)] * pattern.count("x")


def test_the_schedule_and_the_data_go_on(make, train, stream):
    schedule = ScheduleConfig(10, kind="linear")
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            seen.append((batch["index"][0].item(), trainer.global_step, round(rate, 6)))

    task = make.task("image", optimizer=OptimizerConfig(1e-2), schedule=schedule)
    train(stream(".x."), task=task, callbacks=[Watch()])
    assert seen == [(0, 1, 0.009), (900, 2, 0.008), (100, 3, 0.007)]


def bad_gradient(loss, task):
    return loss + (0.0 * task.model.head.weight.sum()).sqrt()


def bad_loss(loss, task):
    return loss + float("inf")


def changing(monkeypatch, task, change, only=None):
    """Change the loss of a task, in every batch or only in batch `only`."""
    loss_sum = type(task).loss_sum

    def changed(self, batch, number):
        found = loss_sum(self, batch, number)
        if only not in (None, number):
            return found
        return found._replace(total=change(found.total, self))

    monkeypatch.setattr(type(task), "loss_sum", changed)


@pytest.mark.parametrize(("change", "kind"), [(bad_gradient, "gradient"), (bad_loss, "loss")])
def test_one_of_the_two_is_enough(make, train, stream, monkeypatch, tmp_path, caplog, change, kind):
    """A finite loss with a non-finite gradient, and vice versa."""
    torch.manual_seed(3)
    task = make.task("image", optimizer=OptimizerConfig(1e-2))
    changing(monkeypatch, task, change, only=1)
    with_it = train(stream("..."), task=task)
    monkeypatch.undo()
    first, _, third = stream("...")
    assert_same(state_of(*with_it), state_of(*train([first, third])))
    (told,) = news(tmp_path)
    (process,) = told["processes"]
    assert (told["step"], told["bad"], process["rank"]) == (2, kind, 0)
    assert process["samples"] == [*range(100, 106)]
    assert (process["losses"] == ["inf"]) == (kind == "loss")
    assert f"step 2 skipped (1 in a row): its {kind} is not finite; rank 0: loss " in caplog.text
    assert "samples 100, 101, 102, 103, 104, 105\n" in caplog.text
    assert with_it[1].callback_metrics["train/skipped_steps"] == 1


def test_weights_of_layers_that_keep_statistics_stay_finite(trainer):
    """A plain Lightning module with batch normalization."""

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))

        def training_step(self, batch, batch_idx):
            return self.layers(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    data = torch.randn(12, 3)
    data[5] = float("nan")
    results = []
    for rows in (data, torch.cat([data[:4], data[8:]])):
        torch.manual_seed(0)
        model = Model()
        run = trainer(callbacks=[NonFiniteGuard()], max_steps=len(rows) // 4, logger=False)
        run.fit(model, DataLoader(rows, 4))
        results.append(model.state_dict())
    assert_same(*results)
    assert results[0]["layers.0.num_batches_tracked"] == 2


@pytest.fixture
def stopped(train, stream, tmp_path):
    """A run that stopped at its third consecutive bad step, and the error."""
    keeper = Checkpoints(every_n_steps=1, every_minutes=None, keep_last=9)
    callbacks = [NonFiniteGuard(max_in_a_row=3), keeper]
    with pytest.raises(TooManyNonFiniteStepsError) as error:
        train(stream(".x.xxx."), callbacks=callbacks, enable_checkpointing=True)
    return str(error.value)


def checkpoint(folder, step):
    path = folder / "checkpoints" / f"step_{step:08d}" / "state.ckpt"
    return torch.load(path, weights_only=True)


def test_too_many_in_a_row_stop_the_run(stopped, tmp_path, stream):
    saved = tmp_path / "checkpoints" / "step_00000006"
    assert stopped == (
        f"3 steps in a row had a loss or gradient that is not finite, the last of them step 6: "
        f"none of them changed the weights, which are saved in {saved}. The batches of that step "
        f"are in {tmp_path}/bad_batch_step_*.pt (`diffmm replay RUN` repeats the step). Fix the "
        f"data, lower the learning rate, or resume from an earlier checkpoint"
    )
    assert [told["step"] for told in news(tmp_path)] == [2, 4, 5, 6]
    assert [path.name for path in tmp_path.glob("*.pt")] == ["bad_batch_step_00000006_rank_0.pt"]
    content = load_batches(tmp_path / "bad_batch_step_00000006_rank_0.pt")
    assert {**content, "batches": 0} == {
        "step": 6,
        "epoch": 0,
        "rank": 0,
        "batch_indices": [5],
        "batches": 0,
    }
    (batch,) = content["batches"]
    torch.testing.assert_close(batch, stream.bad, equal_nan=True, rtol=0, atol=0)
    # The last good checkpoint is intact, and the weights are unchanged.
    assert_same(checkpoint(tmp_path, 3)["state_dict"], checkpoint(tmp_path, 6)["state_dict"])
    assert checkpoint(tmp_path, 6)["callbacks"]["NonFiniteGuard"] == {
        "num_in_a_row": 0,
        "num_skipped": 4,
    }


def test_the_step_can_be_made_again(stopped, make, trainer, tmp_path):
    task = make.task("image", optimizer=OptimizerConfig(1e-2))
    task.load_state_dict(checkpoint(tmp_path, 6)["state_dict"])
    content = load_batches(tmp_path / "bad_batch_step_00000006_rank_0.pt")
    (found,) = replay(trainer(), task, content)
    assert found.fields == ["images"]
    assert found.samples == [902]
    assert found.module == "patch_embedding.proj"
    assert not torch.tensor(found.loss).isfinite()
    assert len(found.gradients) > 10
    content["batches"][0]["images"].nan_to_num_()
    (mended,) = replay(trainer(), task, content)
    assert mended == MicroBatch(mended.loss, [], None, [], [])
    assert 0 < mended.loss < 10


def test_a_file_that_is_no_batch_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError, match="there is no file .*x.pt"):
        load_batches(path)
    for content in ({"step": 1}, [1], b"xyz"):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match="x.pt is not a batch saved by a stopped run: give a"):
            load_batches(path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_a_resumed_run_counts_on(train, stream, tmp_path):
    """Two bad steps, a save, and one more bad step count as three in a row."""
    keeper = Checkpoints(every_n_steps=3, every_minutes=None)
    settings = {"enable_checkpointing": True, "logger": False}
    train(stream(".xx"), callbacks=[NonFiniteGuard(3), keeper], **settings)
    assert checkpoint(tmp_path, 3)["callbacks"]["NonFiniteGuard"]["num_in_a_row"] == 2
    path = tmp_path / "checkpoints" / "step_00000003" / "state.ckpt"
    with pytest.raises(TooManyNonFiniteStepsError, match="^3 steps in a row .* step 4:"):
        train(
            stream("x.."),
            steps=6,
            callbacks=[NonFiniteGuard(3), Checkpoints(every_minutes=None)],
            ckpt_path=path,
            **settings,
        )


# The gradient scaler skips the first steps.
first_skipped = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


@first_skipped
def test_with_a_gradient_scaler_infinite_gradients_are_its_own_affair(train, stream, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-20)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    task, _ = train(stream("......"), plugins=[plugin])
    assert scaler.get_scale() == 2.0**10
    assert not (tmp_path / "bad_steps.jsonl").exists()
    assert all(weight.isfinite().all() for weight in task.parameters())
    scales = (
        torch.amp.GradScaler("cpu", init_scale=4.0),
        torch.amp.GradScaler("cpu", init_scale=4.0),
    )
    one, two = (
        train(stream(pattern), plugins=[MixedPrecision("16-mixed", "cpu", each)])
        for pattern, each in zip((".x", "."), scales, strict=True)
    )
    assert_same(state_of(*one), state_of(*two))
    assert [told["step"] for told in news(tmp_path)] == [2]


@first_skipped
def test_a_scale_of_one_is_no_excuse(make, train, stream, monkeypatch, tmp_path):
    task = make.task("image", optimizer=OptimizerConfig(1e-2))
    changing(monkeypatch, task, bad_gradient)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train(stream("...."), task=task, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert [told["step"] for told in news(tmp_path)] == [3, 4]


def test_a_log_that_cannot_be_written_stops_nothing(train, stream, tmp_path, caplog):
    (tmp_path / "bad_steps.jsonl").mkdir()
    _, trainer = train(stream(".x."))
    assert trainer.global_step == 3
    assert "could not write to" in caplog.text


def test_the_norm_is_that_of_clipping(train, stream):
    """The norm is computed once, and also logged for a skipped step."""
    _, clipped = train(stream("."), gradient_clip_val=1e-3)
    _, free = train(stream("."))
    norms = [each.callback_metrics["train/grad_norm"] for each in (clipped, free)]
    assert norms[0] == norms[1] > 1e-3
    _, bad = train(stream("x"), gradient_clip_val=1e-3)
    assert bad.callback_metrics["train/grad_norm"].isnan()


def test_refusals():
    with pytest.raises(ValueError, match="max_in_a_row must be at least 1, got 0"):
        NonFiniteGuard(0)


@pytest.mark.slow
def test_processes_skip_alike(tmp_path):
    script = Path(__file__).with_name("run_bad_numbers.py")
    run_as_torchrun(script, 2, [str(tmp_path)], tmp_path)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    (many, poisoned), (_, poisoned_too) = one.pop("errors"), two.pop("errors")
    assert one == two
    # The weights of only one process are not finite: both processes end and save nothing.
    assert poisoned.startswith("weights are not finite in another process after step 2: they")
    assert poisoned_too.startswith("1 of 2 weights (the first is layer.bias) are not finite after")
    assert [path.name for path in (tmp_path / "poisoned").glob("step_*")] == ["step_00000001"]
    weights = one["weights"]
    changed = [weights[step] != weights[step - 1] for step in range(1, len(weights))]
    assert changed == [False, True, False, True, False, False]
    # One all-reduce per step besides DDP's own, and another about the weights in a bad step.
    assert one["num_reduces"] == [1, 2, 1, 2, 1, 2, 2]
    skipped = [
        (told["step"], told["bad"], [(p["rank"], p["samples"]) for p in told["processes"]])
        for told in news(tmp_path)
    ]

    def both(step):
        return [(rank, [100 * rank + 10 * step + each for each in range(4)]) for rank in range(2)]

    assert skipped == [
        (2, "loss", both(1)[1:]),
        (4, "gradient", both(3)),
        (6, "loss", both(5)),
        (7, "loss", both(6)[1:]),
    ]
    assert many.startswith("2 steps in a row had a loss or gradient that is not finite")
    assert [path.name for path in tmp_path.glob("*.pt")] == ["bad_batch_step_00000007_rank_1.pt"]
    assert checkpoint(tmp_path, 7)["global_step"] == 7
