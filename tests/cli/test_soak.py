"""`python -m benchmarks.soak`: its measurements, and the end of its run."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import soak

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="reads memory from /proc"
)
ROOT = Path(__file__).parents[2]
SHARED = """
import os, sys
held = bytearray(b"x" * (64 << 20))
if os.fork() == 0:
    sys.stdin.readline()
    held[::4096] = b"y" * len(held[::4096])  # Now these pages are the child's own.
    print("rewritten", flush=True)
    sys.stdin.readline()
else:
    print("forked", flush=True)
    os.wait()
"""


def test_memory_that_is_shared_no_more_is_no_growth():
    command = [sys.executable, "-c", SHARED]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "forked\n"
        before = soak.look(parent.pid)
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "rewritten\n"
        after = soak.look(parent.pid)
        parent.stdin.write("\n")
    assert before["memory_mib"] > 2 * 64
    assert after["memory_mib"] == pytest.approx(before["memory_mib"], abs=8)
    assert (before["threads"], after["threads"]) == (2, 2)


def test_a_run_is_ended_when_its_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "SECONDS_BETWEEN_LOOKS", 0.1)
    command = [sys.executable, "-uc", "import os, time; print(os.getpid()); time.sleep(60)"]
    looks = soak.watch(command, tmp_path / "log", tmp_path, 1.0, threading.Event())
    assert len(looks) > 2
    assert looks[-1]["seconds"] >= 0.9
    assert all(look["memory_mib"] > 1 for look in looks)
    assert not Path("/proc", (tmp_path / "log").read_text().strip()).exists()


def test_a_run_that_ends_early_gives_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "SECONDS_BETWEEN_LOOKS", 0.1)
    command = [sys.executable, "-c", "print('no such recipe'); raise SystemExit(2)"]
    assert soak.watch(command, tmp_path / "log", tmp_path, 20.0, threading.Event()) == []
    assert "the run ended after" in capsys.readouterr().out


def test_the_run_ends_with_its_watcher(wait_until):
    command = [sys.executable, "-m", "benchmarks.soak"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as watcher:
        wait_until(lambda: len(soak.processes(watcher.pid)) > 1)
        _, run, *_ = soak.processes(watcher.pid)
        watcher.terminate()
        assert watcher.wait(90) == 143
    wait_until(lambda: not Path("/proc", str(run)).exists())
