"""The list of a run's logs: files outside the run are not changed."""

import os

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from diffmm.training.resilience.checkpoints.logs import LIST_NAME, begin

ROWS = "step,loss\n0,1.0\n5,0.5\n9,0.1\n"


@pytest.fixture
def run(tmp_path):
    """A run with one CSV file, and another file outside the run."""
    for folder in ("run/csv", "run/checkpoints", "other"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("run/csv", "other"):
        (tmp_path / folder / "metrics.csv").write_text(ROWS)
    return tmp_path / "run"


def go_on(run, listed, step=5):
    (run / "checkpoints" / LIST_NAME).write_text(listed)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    begin(trainer, run / "checkpoints", step)


def test_rows_that_come_again_are_taken_back(run):
    go_on(run, "../csv\n")
    assert (run / "csv/metrics.csv").read_text().splitlines() == ["step,loss", "0,1.0"]


@pytest.mark.parametrize("how", ["dots", "absolute", "link"])
def test_files_outside_the_run_are_left_alone(run, how):
    other = run.parent / "other"
    (run / "link").symlink_to(other)
    listed = {"dots": "../../other", "absolute": str(other), "link": "../link"}[how]
    with pytest.warns(UserWarning, match="LOGS names folders outside the run"):
        go_on(run, f"{listed}\n../csv\n")
    assert (other / "metrics.csv").read_text() == ROWS
    assert len((run / "csv/metrics.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"a\0b\n"])
def test_a_damaged_list_stops_nothing(run, damage):
    (run / "checkpoints" / LIST_NAME).write_bytes(damage)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.warns(UserWarning, match="LOGS"):
        begin(trainer, run / "checkpoints", 5)
    assert (run / "csv/metrics.csv").read_text() == ROWS


def test_a_pipe_for_a_csv_file_is_not_opened(run):
    (run / "csv/metrics.csv").unlink()
    os.mkfifo(run / "csv/metrics.csv")
    go_on(run, "../csv\n")
    assert (run / "csv/metrics.csv").is_fifo()


def test_loggers_outside_the_run_are_not_listed(run):
    logger = CSVLogger(run.parent / "elsewhere")
    inside = CSVLogger(run, name="mine", version="")
    trainer = Trainer(logger=[logger, inside], accelerator="cpu", enable_progress_bar=False)
    begin(trainer, run / "checkpoints", 0)
    assert (run / "checkpoints" / LIST_NAME).read_text() == "../mine\n"
