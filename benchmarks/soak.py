"""A long run that checks whether memory, open files and threads stay constant.

    python -m benchmarks.soak [RECIPE] [--minutes 60] [--out FOLDER] [--set KEY VALUE ...]

Trains a recipe (text/stdlib_tiny by default) for that long, with a checkpoint every 50 steps and a
validation every 200, and samples the memory of the run and its workers, its open files and its
threads. Memory is what each process has allocated; shared pages count for each process, because
they stop being shared when a process writes to them. Prints one line per minute and, at the end,
the change of memory from the second fifth of the run, after warmup, to the last fifth.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

SECONDS_BETWEEN_LOOKS = 10


def processes(root: int) -> list[int]:
    """A process and all its descendants."""
    found = [root]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(pid) for pid in children.read_text().split()]
    return found


def look(root: int) -> dict[str, float]:
    """Memory in MiB, open files and threads of a process and its descendants."""
    memory, files, threads = 0, 0, 0
    for pid in processes(root):
        folder = Path(f"/proc/{pid}")
        try:
            rollup = (folder / "smaps_rollup").read_text()
            for kind in ("Anonymous:", "Pss_Shmem:"):
                memory += int(rollup.split(kind)[1].split()[0])
            files += len(list((folder / "fd").iterdir()))
            threads += len(list((folder / "task").iterdir()))
        except (OSError, IndexError):  # The process has just ended.
            continue
    return {"memory_mib": memory / 1024, "files": files, "threads": threads}


def steps_done(run_dir: Path) -> int:
    """The step of the newest checkpoint."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks the memory of a long run.")
    parser.add_argument("recipe", nargs="?", default="text/stdlib_tiny")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, help="folder for soak.json")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
        help="a setting of the recipe, such as --set vars.attention softmax",
    )  # fmt: skip
    options = parser.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        parser.error("benchmarks.soak reads memory from /proc, which only Linux has")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        settings = {"vars.steps": 10**9, "trainer.val_check_interval": 200}
        settings["model.schedule.warmup_steps"] = 100
        settings["trainer.callbacks.0.init_args.every_n_steps"] = 50
        settings |= dict(options.set)
        command = [sys.executable, "-m", "diffmm.cli", "fit", "--config", options.recipe]
        command += ["--run_dir", str(run_dir)]
        for key, value in settings.items():
            command += [f"--{key}", str(value)]
        looks = watch(command, Path(folder) / "log", run_dir, 60 * options.minutes, ended)
        steps = steps_done(run_dir)
    if ended.is_set():
        return 128 + signal.SIGTERM
    if not looks:
        return 1
    fifth = max(len(looks) // 5, 1)
    first = median(x["memory_mib"] for x in looks[fifth : 2 * fifth] or looks)
    last = median(x["memory_mib"] for x in looks[-fifth:])
    print(
        f"{options.recipe}: {options.minutes:g} minutes, {steps} steps; memory {first:.0f} MiB in "
        f"the second fifth, {last:.0f} MiB in the last ({100 * (last / first - 1):+.1f} %), files "
        f"{looks[fifth]['files']:.0f} and {looks[-1]['files']:.0f}, threads "
        f"{looks[fifth]['threads']:.0f} and {looks[-1]['threads']:.0f}"
    )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "soak.json").write_text(json.dumps({"steps": steps, "looks": looks}))
    return 0


def watch(
    command: list[str], log: Path, run_dir: Path, seconds: float, ended: threading.Event
) -> list[dict[str, float]]:
    """Run a command for `seconds`, or until `ended`, and sample its memory; return an empty list if
    the command ended early."""
    looks: list[dict[str, float]] = []
    with log.open("w") as file:
        run = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        start = time.monotonic()
        try:
            while (elapsed := time.monotonic() - start) < seconds:
                if ended.wait(min(SECONDS_BETWEEN_LOOKS, seconds - elapsed)):
                    break
                if run.poll() is not None:
                    print(f"the run ended after {elapsed:.0f} s:\n{log.read_text()[-2000:]}")
                    return []
                looks.append({"seconds": time.monotonic() - start, **look(run.pid)})
                if len(looks) % 6 == 1:
                    now = looks[-1]
                    print(
                        f"{now['seconds'] / 60:5.1f} min  {steps_done(run_dir):7d} steps  "
                        f"{now['memory_mib']:7.1f} MiB  {now['files']:4.0f} files  "
                        f"{now['threads']:3.0f} threads",
                        flush=True,
                    )
        finally:
            run.terminate()
            try:
                run.wait(60)
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
    return looks


if __name__ == "__main__":
    sys.exit(main())
