"""A signal ends a run after a step, with everything saved and previous handlers restored."""

import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from forked import run_as_torchrun
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from diffmm import forks
from diffmm.training.resilience.shutdown import SIGNALS, GracefulShutdown, requeue_slurm_job
from diffmm.workers import STOP_SIGNALS, WorkerLoader, ignore_stop_signals

SCRIPT = Path(__file__).with_name("run_stops.py")
tiny = runpy.run_path(str(SCRIPT))
run, Send, Numbers = tiny["run"], tiny["Send"], tiny["Numbers"]
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT

# Lightning only inspects the loader; the datamodule saves the position in the data.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    return run(tmp_path_factory.mktemp("whole"))


def summary(result):
    return result["code"], result["step"], result["saved"]


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (USR1, 143), (INT, 130)])
def test_a_signal_ends_the_step_saves_and_exits(tmp_path, whole, number, code):
    """The checkpoint callback of `run` sends two more signals during the save."""
    before = [signal.getsignal(each) for each in SIGNALS]
    stopped = run(tmp_path, Send("on_before_backward", 4, number))
    assert summary(stopped) == (code, 5, [5, number.name])
    assert [signal.getsignal(each) for each in SIGNALS] == before
    resumed = run(tmp_path, resume=True)
    assert resumed["code"] is None
    assert resumed["weights"] == whole["weights"] != stopped["weights"]


@pytest.mark.parametrize(
    ("send", "step"),
    [
        (("on_train_batch_start", 3), 4),
        (("on_train_batch_end", 4), 4),
        (("on_validation_start", 4), 4),
        (("on_validation_batch_end", 8), 8),
        (("on_validation_end", 8), 8),
        (("on_train_epoch_end", 6), 7),
        (("on_train_epoch_start", 6), 7),
        (("on_train_batch_start", 5), 6),  # ends an epoch
        (("on_before_backward", 13), 14),  # ends the run
    ],
)
def test_at_any_moment_nothing_is_lost(tmp_path, whole, send, step):
    stopped = run(tmp_path, Send(*send, TERM))
    assert summary(stopped) == (143, step, [step, "SIGTERM"])
    resumed = run(tmp_path, resume=True)
    assert resumed["weights"] == whole["weights"]
    assert stopped["validations"] + resumed["validations"] == whole["validations"] == 3


def test_a_long_validation_is_cut_short_and_made_again(tmp_path, whole):
    stopped = run(tmp_path, Send("on_validation_batch_start", 4, TERM, nth=3))
    assert summary(stopped) == (143, 4, [4, "SIGTERM"])
    assert stopped["validations"] == 0
    # Stopped again before the resumed run made a step: the checkpoint is unchanged.
    again = run(tmp_path, Send("on_validation_batch_start", 4, TERM, nth=2), resume=True)
    assert summary(again) == (143, 4, [4, "SIGTERM"])
    resumed = run(tmp_path, resume=True)
    assert resumed["validations"] == whole["validations"]
    assert resumed["weights"] == whole["weights"]


def test_averaged_weights_are_not_mistaken_for_the_run_s(tmp_path):
    """Lightning swaps the weights for the duration of a validation."""

    def average():
        return EMAWeightAveraging(decay=0.5)

    whole = run(tmp_path / "whole", average())
    send = Send("on_validation_batch_start", 4, TERM, nth=3)
    assert summary(run(tmp_path, average(), send)) == (143, 4, [4, "SIGTERM"])
    assert run(tmp_path, average(), resume=True)["weights"] == whole["weights"]


@pytest.mark.parametrize(
    "send",
    [
        Send("on_fit_start", 0, TERM),
        Send("on_sanity_check_start", 0, TERM),
        Send("on_validation_batch_end", 0, TERM),
        Send("on_train_start", 0, TERM),
    ],
)
def test_before_the_first_step_there_is_nothing_to_save(tmp_path, send):
    assert summary(run(tmp_path, send, num_sanity_val_steps=3)) == (143, 0, None)


def test_accumulated_gradients_are_not_lost(tmp_path):
    settings = {"accumulate_grad_batches": 3, "max_steps": 4}
    whole = run(tmp_path / "whole", **settings)
    stopped = run(tmp_path, Send("on_before_backward", 0, TERM), **settings)
    assert summary(stopped) == (143, 1, [1, "SIGTERM"])
    # A validation after the first of three micro-batches.
    send = Send("on_validation_batch_start", 1, TERM)
    assert summary(run(tmp_path, send, resume=True, **settings)) == (143, 1, [1, "SIGTERM"])
    assert run(tmp_path, resume=True, **settings)["weights"] == whole["weights"]


@pytest.mark.parametrize("seed", range(8))
def test_at_random_moments(tmp_path, whole, seed):
    """Each attempt receives one or more signals at some point; the final weights are the same."""
    rng = random.Random(seed)
    results = []
    while not results or results[-1]["code"] is not None:
        numbers = rng.choices(SIGNALS, k=rng.randint(1, 3))
        timers = [
            threading.Timer(rng.uniform(0.0, 0.1), os.kill, (os.getpid(), number))
            for number in numbers
        ]
        ignored = {each: signal.signal(each, signal.SIG_IGN) for each in SIGNALS}  # outside of fit
        for timer in timers if len(results) < 6 else ():
            timer.start()
        results.append(run(tmp_path, resume=bool(results), num_workers=seed % 2))
        for timer in timers:
            timer.cancel()
        for each, handler in ignored.items():
            signal.signal(each, handler)
    assert results[-1]["weights"] == whole["weights"]


class KillWorkers(Callback):
    """Another process sends signals to the workers of this one and, with `number`, to this one as
    well."""

    def __init__(self, number):
        self.number = number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            workers = [child.pid for child in multiprocessing.active_children()]
            assert len(workers) >= 2  # workers of earlier runs
            for number in (*SIGNALS, self.number):
                pids = [*workers, *([os.getpid()] if number is self.number else [])]
                subprocess.run(["kill", f"-{int(number)}", *map(str, pids)], check=True)


def test_workers_leave_signals_to_the_run(tmp_path, whole):
    stopped = run(tmp_path, KillWorkers(TERM), num_workers=2)
    assert summary(stopped)[:2] == (143, 4)
    assert run(tmp_path, resume=True, num_workers=1)["weights"] == whole["weights"]


def test_a_worker_ends_by_its_own_process():
    others = multiprocessing.active_children()  # of earlier runs
    workers = iter(DataLoader(Numbers(), num_workers=1, worker_init_fn=ignore_stop_signals))
    next(workers)
    (worker,) = [each for each in multiprocessing.active_children() if each not in others]
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    next(workers)
    time.sleep(1.0)  # two pending signals of the same kind are delivered once
    start = time.monotonic()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
    assert time.monotonic() - start < 5


def test_a_worker_is_born_deaf_to_signals():
    """A signal before `ignore_stop_signals` is called would end the worker, and the run."""
    context = multiprocessing.get_context("fork")
    heard = context.SimpleQueue()

    def begin(worker_id):
        heard.put(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        ignore_stop_signals(worker_id)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loader = WorkerLoader(
        Numbers(), num_workers=1, worker_init_fn=begin, multiprocessing_context=context
    )
    next(iter(loader))
    assert heard.get() >= STOP_SIGNALS
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_worker_that_is_born_dead_is_born_again(monkeypatch, caplog):
    """A worker that hangs like one forked while another thread held a lock (before Python 3.12)."""
    monkeypatch.setattr(forks, "SECONDS_TO_BE_BORN", 0.5)
    fork, tries, start = os.fork, [], time.monotonic()

    def stillborn_at_first():
        tries.append(fork())
        if tries[-1] == 0 and len(tries) <= 2:
            time.sleep(30)
            os._exit(1)
        return tries[-1]

    monkeypatch.setattr(os, "fork", stillborn_at_first)
    loader = DataLoader(Numbers(), num_workers=2, multiprocessing_context=forks.CheckedForks())
    torch.testing.assert_close(torch.cat(list(loader)), torch.stack(list(Numbers())))
    assert time.monotonic() - start < 20  # both were killed without waiting for them
    first, second, *_ = tries
    for dead in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(dead, 0)
    waits = re.findall(r"did not start within ([\d.]+) seconds", caplog.text)
    assert waits[:2] == ["0.5", "1"]  # more where a large process takes long to fork
    assert len(tries) == len(waits) + 2  # an attempt per warning and one per worker


@pytest.mark.parametrize(("method", "is_looked_after"), [("spawn", False), ("fork", True)])
def test_how_processes_start_stays_the_users_choice(monkeypatch, method, is_looked_after):
    monkeypatch.setattr("diffmm.workers.FORKS_CAN_HANG", True)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: method)
    loader = WorkerLoader(Numbers(), num_workers=1)
    monkeypatch.setattr(DataLoader, "__iter__", lambda self: iter([]))
    assert list(loader) == []
    assert isinstance(loader.multiprocessing_context, forks.CheckedForks) is is_looked_after


def test_handlers_are_back_after_an_end_and_after_an_error(tmp_path):
    seen = []

    class Fails(Callback):
        def on_train_batch_end(self, *args):
            seen.append(signal.getsignal(TERM))
            raise ZeroDivisionError

    mine = lambda number, frame: None  # noqa: E731
    before = {each: signal.signal(each, mine) for each in SIGNALS}
    try:
        run(tmp_path / "a", max_steps=2)
        assert all(signal.getsignal(each) is mine for each in SIGNALS)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "b", Fails())
        assert seen[0] is not mine
        assert all(signal.getsignal(each) is mine for each in SIGNALS)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_trainer_stops_again_and_again(tmp_path, trainer):
    """The same trainer and callback, in a second fit."""
    stop = GracefulShutdown()
    run_trainer = trainer(callbacks=[Send("on_before_backward", 1, TERM), stop], max_steps=4)
    data = DataLoader(Numbers(), 4)
    with pytest.raises(SystemExit):
        run_trainer.fit(tiny["Model"](), data)
    run_trainer.fit(tiny["Model"](), data)
    assert run_trainer.global_step == 4
    assert not stop.is_stopping


def test_in_another_thread_it_does_nothing(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, max_steps=2)))
    thread.start()
    thread.join(60)
    assert summary(results[0]) == (None, 2, [2, "schedule"])


def test_without_checkpoints_of_this_library(tmp_path, trainer, caplog):
    for enabled in (True, False):
        run_trainer = trainer(
            callbacks=[Send("on_before_backward", 1, TERM), GracefulShutdown()],
            max_steps=4,
            enable_checkpointing=enabled,
        )
        with pytest.raises(SystemExit) as stop:
            run_trainer.fit(tiny["Model"](), DataLoader(Numbers(), 4))
        assert stop.value.code == 143
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["stopped_step_00000002.ckpt"]
    assert "not saved: checkpoints are disabled" in caplog.text


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A fake `scontrol` that records its calls, with an exit code."""

    def install(code=0):
        folder = tmp_path / "bin"
        folder.mkdir()
        calls = folder / "calls"
        script = folder / "scontrol"
        script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho disabled >&2\nexit {code}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return lambda: calls.read_text().splitlines() if calls.exists() else []

    return install


SLURM = {
    "SLURM_JOB_ID": "4321",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NAME": "train",
    "SLURM_NODELIST": "localhost",
}


@pytest.mark.parametrize("by_srun", [True, False])
@pytest.mark.parametrize(("number", "calls"), [(USR1, ["requeue 4321"]), (TERM, [])])
def test_slurm_requeues_once_after_the_save(
    tmp_path, monkeypatch, scontrol, number, calls, by_srun
):
    """Under srun, Lightning would install its own handler."""
    for name, value in SLURM.items():
        if by_srun or name == "SLURM_JOB_ID":
            monkeypatch.setenv(name, value)
    made = scontrol()
    stopped = run(tmp_path / "run", Send("on_before_backward", 4, number, number))
    assert summary(stopped) == (143, 5, [5, number.name])
    assert made() == calls
    assert not list((tmp_path / "run").glob("*.ckpt"))


def test_a_requeue_that_fails_says_so(monkeypatch, scontrol):
    made = scontrol(code=1)
    requeue_slurm_job()
    assert made() == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.warns(UserWarning, match=r"scontrol requeue 7` failed \(disabled\): resubmit"):
        requeue_slurm_job()
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="scontrol requeue 7` failed .*No such file"):
        requeue_slurm_job()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The results of both processes for each scenario of the script."""
    output = tmp_path_factory.mktemp("two")
    run_as_torchrun(SCRIPT, 2, [str(output)], output)
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("rank 0", (143, 5, [5, "SIGTERM"])),
        ("rank 1", (143, 5, [5, "SIGTERM"])),
        ("both", (143, 5, [5, "SIGTERM"])),
        ("rank 1 and later rank 0", (143, 5, [5, "SIGTERM"])),
        ("SIGINT to 0, SIGUSR1 to 1", (143, 5, [5, "SIGUSR1"])),
        ("within accumulation", (143, 1, [1, "SIGTERM"])),
        ("validation", (143, 8, [8, "SIGTERM"])),
        ("sanity check", (143, 0, None)),
        ("before the first step", (143, 0, None)),
    ],
)
def test_processes_stop_at_the_same_step(two_processes, scenario, expected):
    results = [process[scenario] for process in two_processes]
    assert [summary(result) for result in results] == [expected, expected]
    if "accumulation" not in scenario:
        assert all(result["resumed equals whole"] for result in results)
