"""Loggers that cannot write: one warning, and training continues."""

import csv
import resource
import signal
import warnings

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader


class Disk(Callback):
    """Limits the size of files to their current size from one step until another.

    Between the two steps, there is a column that the CSV file does not have yet.
    """

    def __init__(self, folder, full, free):
        self.folder, self.full, self.free = folder, full, free
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for logger in trainer.loggers:
            logger.save()
        if batch_idx == self.full:
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            largest = max((path.stat().st_size for path in files), default=0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 30, self.limits[1]))
        if batch_idx == self.free:
            self.restore()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.full:
            pl_module.log("a_new_column", 1.0)

    def restore(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path, full=4, free=20)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield disk
    disk.restore()
    signal.signal(signal.SIGXFSZ, before)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_full_disk_for_a_while(fit, make, tmp_path, disk):
    """No row is incomplete; the CSV file gets every row, and TensorBoard those from then on."""
    loggers = [CSVLogger(tmp_path, name="", version="csv"), TensorBoardLogger(tmp_path, name="tb")]
    with pytest.warns(UserWarning, match="could not write") as told:
        fit(make.task("image"), [make.batch("image")], max_steps=24, logger=loggers,
            callbacks=[disk], log_every_n_steps=1)  # fmt: skip
    lines = [str(w.message) for w in told if "could not write" in str(w.message)]
    assert len(lines) == 2
    assert all("Training continues" in line and "File too large" in line for line in lines)
    found = rows(tmp_path / "csv" / "metrics.csv")
    assert [int(row["step"]) for row in found if row["train/loss"]] == list(range(24))
    assert [row["step"] for row in found if row["a_new_column"]] == [
        str(step) for step in range(4, 24)
    ]
    (events,) = (tmp_path / "tb").rglob("events*")
    steps = {event.step for event in EventFileLoader(str(events)).Load() if event.summary.value}
    # The metrics of the step before a failure may arrive during it.
    assert steps >= {0, 1, 2, 20, 21, 22, 23}


class Failing(Logger):
    name, version = "failing", 0

    def __init__(self, error):
        super().__init__()
        self.error = error

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        raise self.error


def test_a_server_that_is_gone(fit, make):
    logger = Failing(ConnectionError("the server is gone"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = fit(make.task("image"), [make.batch("image")], max_steps=4, logger=logger)
    (line,) = [str(w.message) for w in told if "could not write" in str(w.message)]
    assert line == (
        "Failing could not write: the server is gone. Training continues, and further failures of "
        "this logger are not reported"
    )
    assert trainer.global_step == 4


def test_a_mistake_in_a_logger_is_none_of_a_disk(fit, make):
    with pytest.raises(KeyError, match="step"):
        fit(make.task("image"), [make.batch("image")], logger=Failing(KeyError("step")))


def test_a_logger_that_cannot_begin_ends_the_run(fit, make, tmp_path):
    (tmp_path / "taken").touch()
    logger = CSVLogger(tmp_path / "taken")
    with pytest.raises(OSError, match="taken"):
        fit(make.task("image"), [make.batch("image")], logger=logger)
