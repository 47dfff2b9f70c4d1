"""SIGKILL at random times, including during saves; the run is then resumed to its end."""

import random
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from benchmarks.faults.processes import Attempt
from benchmarks.faults.runs import NUM_STEPS, SECONDS_PER_RUN, Run, differences, wait
from benchmarks.faults.tally import Fault
from diffmm.checkpoint_folders import LATEST_NAME, REMOVED, UNFINISHED

SECONDS_TO_NOTICE = 90.0
"""Maximum time in seconds until a process ends after another one was killed."""


def break_run(run: Run, whole: Run, rng: random.Random, num_kills: int) -> Iterator[Fault]:
    """Kill a run several times, resume it to its end, and compare the results.

    Args:
        run: Run to kill, whose recipe is already written.
        whole: The same run, uninterrupted.
        rng: Random generator for the times of the kills.
        num_kills: Number of kills.
    """
    faults = []
    for number in range(num_kills):
        if newest(run) == NUM_STEPS:
            break
        how = rng.choice(("auto", "resume")) if number else "auto"
        faults.append(_kill(run, how, rng.choice(("start", "training", "save", "save")), rng))
    place = newest(run)
    begun = run.times_begun()
    attempt = run.start("resume" if (run.directory / "config.yaml").exists() else "auto")
    codes = attempt.wait(SECONDS_PER_RUN)
    if any(codes):
        wrong = [f"exit codes {codes} at the end: {attempt.printed[-2000:]}"]
    else:
        wrong = [*resumed_elsewhere(run, begun, place), *differences(run, whole)]
    for fault in faults:
        yield fault.and_lost(wrong)


def _kill(run: Run, how: str, moment: str, rng: random.Random) -> Fault:
    """Start a run, wait for a moment, kill it, and check what is left on the disk."""
    place, begun, before = newest(run), run.times_begun(), marks_of_a_save(run.checkpoints)
    if not (run.directory / "config.yaml").exists():
        how = "auto"  # The run was killed before it could be resumed.
    attempt = run.start(how)
    everyone = range(run.num_processes)
    victims = [rng.choice(everyone)] if rng.random() < 0.5 else list(everyone)
    try:
        _wait_for(moment, run, attempt, rng)
        promised = latest(run.checkpoints)
        had_ended = not attempt.is_running
        attempt.kill(victims)
        if run.times_begun() == begun:
            # A process that waits for another to join would be ended by its launcher.
            attempt.kill(everyone)
    finally:
        codes = attempt.wait(SECONDS_TO_NOTICE)
    lost = resumed_elsewhere(run, begun, place)
    if had_ended and any(codes):
        lost.append(f"exit codes {codes} before it was killed: {attempt.printed[-2000:]}")
    if None in codes:
        lost.append(f"rank {codes.index(None)} hung when rank {victims} was killed")
    whole = [found.step for found in run.whole()]
    if promised is not None and max(whole, default=-1) < promised:
        lost.append(f"LATEST named step {promised}, complete are {whole}")
    if had_ended:
        kind = "SIGKILL, after the end"
    elif is_in_save(run, before):
        kind = "SIGKILL inside a save"
    else:
        kind = "SIGKILL outside of saves"
    who = "all" if len(victims) == run.num_processes else f"rank {victims[0]}"
    return Fault(kind, f"{run.name}: {who}, {moment}; complete: {whole}").and_lost(lost)


def newest(run: Run) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    return max((found.step for found in run.whole()), default=0)


def resumed_elsewhere(run: Run, times_begun: int, step: int) -> list[str]:
    """Return a message if training was resumed at another step than `step`."""
    steps = run.records()[0].begun_at[times_begun:]
    if steps in ([], [step]):
        return []
    return [f"it resumed at step {steps}, but step {step} was complete"]


def _wait_for(moment: str, run: Run, attempt: Attempt, rng: random.Random) -> None:
    """Wait until the given moment or the end of the run."""
    if moment == "start":
        wait(attempt, lambda: False, rng.uniform(0.0, 1.5))
        return
    begun, made = run.times_begun(), run.num_batches()
    wait(attempt, lambda: run.times_begun() > begun, SECONDS_PER_RUN)
    if moment == "training":
        steps = rng.randint(0, NUM_STEPS // 5)
        wait(attempt, lambda: run.num_batches() >= made + steps, SECONDS_PER_RUN)
        time.sleep(rng.uniform(0.0, 0.05))
        return
    for _ in range(rng.randint(1, 4)):
        before = marks_of_a_save(run.checkpoints)
        wait(attempt, partial(is_in_save, run, before), SECONDS_PER_RUN)
    time.sleep(rng.choice((0.0, 0.0, rng.uniform(0.0, 0.005))))


def is_in_save(run: Run, seen: set[tuple[str, int]]) -> bool:
    """Whether a save is in progress that has left other marks than `seen`."""
    return bool(marks_of_a_save(run.checkpoints) - seen)


def marks_of_a_save(checkpoints: Path) -> set[tuple[str, int]]:
    """Names and inodes of files that only exist during a save, or after an interrupted one."""
    found = set()
    with suppress(OSError):
        for path in checkpoints.iterdir():
            is_hidden = path.name.startswith((UNFINISHED, REMOVED, f".{LATEST_NAME}"))
            is_unnamed = (_step(path.name) or 0) > (latest(checkpoints) or 0)
            if is_hidden or is_unnamed:
                found.add((path.name, path.stat().st_ino))
    return found


def latest(checkpoints: Path) -> int | None:
    """The step that `LATEST` names."""
    with suppress(OSError):
        return _step((checkpoints / LATEST_NAME).read_text().strip())
    return None


def _step(name: str) -> int | None:
    digits = name.removeprefix("step_")
    return int(digits) if digits != name and digits.isdigit() else None
