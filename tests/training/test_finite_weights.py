"""Non-finite weights end a run, and never replace good ones in a checkpoint."""

import signal

import pytest
import torch
from lightning.pytorch import Callback

from diffmm.checkpoint_folders import checkpoints, fault
from diffmm.training import Checkpoints, GracefulShutdown
from diffmm.training.resilience.checkpoints import NonFiniteWeightsError


class Poison(Callback):
    """Makes one weight non-finite after a step, like an overflow in the optimizer."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    def on_train_batch_end(self, trainer, task, *args):
        if trainer.global_step == self.step:
            with torch.no_grad():
                task.model.head.weight[1, 2] = self.value


class Stop(GracefulShutdown):
    """Receives a signal after a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            self._got = signal.SIGTERM
        super().on_train_batch_end(trainer, *args)


@pytest.fixture
def poisoned(make, fit, tmp_path):
    """`poisoned(value, ...)` returns the error of a run in which a weight becomes `value` after
    step 3."""

    def run(value, *callbacks, **settings):
        with pytest.raises(NonFiniteWeightsError) as error:
            fit(
                make.task("image"),
                [make.batch("image")],
                callbacks=[Poison(3, value), *callbacks],
                max_steps=9,
                logger=False,
                **settings,
            )
        return str(error.value)

    return run


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_no_checkpoint_holds_them(poisoned, make, tmp_path, value, every_n_steps):
    """They are detected at the next save or by the loss of the next step, whichever comes first."""
    keeper = Checkpoints(tmp_path / "kept", every_n_steps=every_n_steps, every_minutes=None)
    message = poisoned(value, keeper, enable_checkpointing=True)
    kept = checkpoints(tmp_path / "kept")
    assert [each.step for each in kept] == ([1, 2] if every_n_steps == 1 else [2])
    for each in kept:
        assert fault(each.path) is None
        state = torch.load(each.path / "state.ckpt", weights_only=True)["state_dict"]
        assert all(weight.isfinite().all() for weight in state.values())
    num_weights = len(list(make.image().parameters()))
    assert message == (
        f"1 of {num_weights} weights (the first is model.head.weight) are not finite after step 3: "
        f"they are not saved in a checkpoint, the last good one is {kept[-1].path}. The step that "
        f"caused this had a finite gradient: lower the learning rate, raise the optimizer's eps, "
        f"or train in another precision"
    )


def test_without_checkpoints_the_next_step_finds_them(poisoned, tmp_path):
    assert "there is no earlier one" in poisoned(float("nan"))
    assert not (tmp_path / "bad_steps.jsonl").exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_stop_does_not_save_them(poisoned, tmp_path, own):
    """With the checkpoints of this library and with Lightning's."""
    callbacks = [Checkpoints(every_minutes=None)] if own else []
    poisoned(float("nan"), Stop(3), *callbacks, enable_checkpointing=True)
    assert not list(tmp_path.rglob("*.ckpt"))
