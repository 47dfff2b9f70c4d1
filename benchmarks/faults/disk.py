"""Full disks, temporarily or permanently."""

import csv
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from benchmarks.faults.processes import Attempt
from benchmarks.faults.runs import NUM_STEPS, SECONDS_PER_RUN, Run, differences, wait
from benchmarks.faults.tally import Fault

DISK_MIB = 64
SMALL_FILE_BYTES = 2**16
"""Limit of file sizes in bytes, which logs do not reach and checkpoints exceed."""


class Disk(Protocol):
    """The disk of a run's directory, including its checkpoints and logs."""

    name: str

    def fill(self, attempt: Attempt) -> None: ...

    def free(self, attempt: Attempt) -> None: ...


class Tmpfs:
    """A small separate file system in memory, which is filled by a large file."""

    name = "a tmpfs"

    def __init__(self, folder: Path) -> None:
        self.ballast = folder / "ballast"

    def fill(self, attempt: Attempt) -> None:
        with self.ballast.open("wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def free(self, attempt: Attempt) -> None:
        self.ballast.unlink()


class FileLimit:
    """A limit on the size of files that a process writes, for systems where mounting fails."""

    name = "a limit on files"

    def fill(self, attempt: Attempt) -> None:
        self._limit(attempt, SMALL_FILE_BYTES)

    def free(self, attempt: Attempt) -> None:
        self._limit(attempt, resource.RLIM_INFINITY)

    def _limit(self, attempt: Attempt, size: int) -> None:
        for process in attempt.ranks:
            if process.is_alive():
                assert process.pid is not None
                _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """Create `folder` on a disk that can be filled."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield FileLimit()
        return
    try:
        yield Tmpfs(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_for_a_while(run: Run, whole: Run) -> Fault:
    """Some saves fail; the run continues, and saves again once there is space."""
    run.write_recipe(**{"trainer.callbacks.0.max_failed_saves": 1000})
    with small_disk(run.directory) as disk:
        attempt = run.start()
        wait(attempt, lambda: run.num_batches() > NUM_STEPS // 4, SECONDS_PER_RUN)
        before = {found.step for found in run.whole()}
        disk.fill(attempt)
        wait(attempt, lambda: "failed saves in a row, so far" in attempt.printed, SECONDS_PER_RUN)
        during = {found.step for found in run.whole()}
        disk.free(attempt)
        codes = attempt.wait(SECONDS_PER_RUN)
        wrong = []
        if any(codes):
            wrong.append(f"exit codes {codes}: {attempt.printed[-2000:]}")
        else:
            wrong += differences(run, whole) + rows_missing(run)
        if before and not during:
            wrong.append(f"{before} were complete, none was when the disk was full")
        if "could not be written" not in attempt.printed:
            wrong.append("the failed save was not reported")
        return Fault(f"full disk for a while ({disk.name})", run.name).and_lost(wrong)


def rows_missing(run: Run) -> list[str]:
    """Return a message if the steps in a run's CSV file are missing or repeated."""
    with (run.directory / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    return [] if steps == list(range(NUM_STEPS)) else [f"the CSV file has the steps {steps}"]


def full_for_good(run: Run, whole: Run) -> Fault:
    """The run ends with a message, and can be resumed once there is space."""
    with small_disk(run.directory) as disk:
        attempt = run.start()
        wait(attempt, lambda: run.num_batches() > NUM_STEPS // 4, SECONDS_PER_RUN)
        disk.fill(attempt)
        codes = attempt.wait(SECONDS_PER_RUN)
        wrong = [] if codes[0] == 1 else [f"exit codes {codes}"]
        (message, *more) = [
            line for line in attempt.printed.splitlines() if line.startswith("diffmm: error: ")
        ] or [""]
        if more or "could not be written" not in message or "free there" not in message:
            wrong.append(f"the cause of its end is not reported: {attempt.printed[-2000:]}")
        if not run.whole():
            wrong.append("no checkpoint is left")
        if isinstance(disk, Tmpfs):
            disk.free(attempt)
        attempt = run.start("resume")
        codes = attempt.wait(SECONDS_PER_RUN)
        if any(codes):
            wrong.append(f"exit codes {codes} when it was resumed: {attempt.printed[-2000:]}")
        else:
            wrong += differences(run, whole)
        return Fault(f"disk stays full ({disk.name})", run.name).and_lost(wrong)
