"""A run directory belongs to one process at a time."""

import os
import signal
import sys
from pathlib import Path

import pytest

from diffmm.recipes.errors import InputError
from diffmm.runs.claims import LOCK_NAME, claimed, is_first_process

HOLD = """
import sys, time
from pathlib import Path
from diffmm.runs.claims import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_cannot_have_one_folder(run, recipe):
    path = recipe()
    with claimed(Path("runs/mine")):
        result = run("fit", "--config", path, "--run_dir", "runs/mine")
        assert result.code == 2
        (mistake,) = result.mistakes
        assert f"runs/mine is in use by process {os.getpid()} on " in mistake
        assert mistake.endswith("wait for it, stop it, or choose another directory")
        assert [path.name for path in Path("runs/mine").iterdir()] == [LOCK_NAME]
    assert run("fit", "--config", path, "--run_dir", "runs/mine").code == 0
    assert not Path("runs/mine", LOCK_NAME).exists()
    before = sorted(Path("runs/mine").rglob("*"))
    with claimed(Path("runs/mine")):
        result = run("fit", "--resume", "runs/mine", "--trainer.max_steps", "3")
        assert result.code == 2
        assert "is in use by process" in result.err
    assert sorted(Path("runs/mine").rglob("*")) == before


def test_the_kernel_lets_go_of_a_dead_owner(start, tmp_path, wait_until):
    folder = tmp_path / "run"
    with start([sys.executable, "-c", HOLD, str(folder)], {}) as process:
        wait_until(lambda: (folder / LOCK_NAME).exists() and (folder / LOCK_NAME).stat().st_size)
        with (
            pytest.raises(InputError, match=f"in use by process {process.pid} on"),
            claimed(folder),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert (folder / LOCK_NAME).exists()
    with claimed(folder):
        assert f'"process": {os.getpid()}' in (folder / LOCK_NAME).read_text()
    assert not (folder / LOCK_NAME).exists()


def test_a_forked_worker_does_not_hold_it(tmp_path):
    read, write = os.pipe()
    with claimed(tmp_path):
        worker = os.fork()
        if worker == 0:
            os.read(read, 1)
            os._exit(0)
    with claimed(tmp_path):
        held = (tmp_path / LOCK_NAME).read_text()
    assert f'"process": {os.getpid()}' in held
    os.write(write, b"x")
    assert os.waitpid(worker, 0) == (worker, 0)


def test_folders_that_were_made_for_a_refused_run_are_removed(tmp_path):
    with pytest.raises(InputError, match="no"), claimed(tmp_path / "a" / "b"):
        raise InputError("no")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="no"), claimed(tmp_path / "a"):
        raise InputError("no")
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"])
def test_the_first_process_owns_it_for_all(name, tmp_path, monkeypatch):
    with claimed(tmp_path):
        monkeypatch.setenv(name, "1")
        assert not is_first_process()
        with claimed(tmp_path):
            pass
        monkeypatch.setenv(name, "0")
        assert is_first_process()
        with pytest.raises(InputError, match="in use"), claimed(tmp_path):
            pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="cannot be written: .*file"),
        claimed(tmp_path / "file/run"),
    ):
        pass


def test_auto_passes_over_a_broken_neighbour(run, recipe):
    path = recipe()
    broken = Path("runs/recipe/broken/config.yaml")
    broken.parent.mkdir(parents=True)
    broken.write_text("a: [")
    result = run("fit", "--config", path, "--resume", "auto")
    assert result.code == 0, result.err
    assert "warning: runs/recipe/broken is skipped: " in result.err
