"""Stop signals to any process of a run, which is then resumed to its end."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

from benchmarks.faults.processes import Attempt
from benchmarks.faults.runs import SECONDS_PER_RUN, Run, differences, wait
from benchmarks.faults.tally import Fault
from diffmm.checkpoint_folders import find_whole, read_manifest

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
SECONDS_TO_STOP = 60.0


def stop_run(run: Run, whole: Run, rng: random.Random) -> Iterator[Fault]:
    """Stop a run by every signal to every process, resume it to its end, and compare the results.

    Args:
        run: Run to stop, whose recipe is already written.
        whole: The same run, uninterrupted.
        rng: Random generator for the times of the signals and for second signals.
    """
    targets = [[rank] for rank in range(run.num_processes)]
    if run.num_processes > 1:
        targets.append(list(range(run.num_processes)))
    faults = []
    for number in EXIT_CODES:
        for ranks in targets:
            with_workers = ranks == targets[-1]
            faults.append(_stop(run, number, ranks, with_workers, rng))
    attempt = run.start("resume")
    codes = attempt.wait(SECONDS_PER_RUN)
    wrong = differences(run, whole)
    if any(codes):
        wrong = [f"exit codes {codes} at the end: {attempt.printed[-2000:]}"]
    for fault in faults:
        yield fault.and_lost(wrong)


def _stop(
    run: Run, number: signal.Signals, ranks: list[int], with_workers: bool, rng: random.Random
) -> Fault:
    """Start a run, send the signal during one of its next steps, and check how it ends."""
    begun, made = run.times_begun(), run.num_batches()
    attempt = run.start("resume" if begun else "auto")
    try:
        wait(attempt, lambda: run.times_begun() > begun, SECONDS_PER_RUN)
        steps = rng.randint(0, 2)
        wait(attempt, lambda: run.num_batches() > made + steps, SECONDS_PER_RUN)
        for _ in range(rng.randint(1, 2)):
            _send(attempt, number, ranks, with_workers)
            time.sleep(rng.uniform(0.0, 0.01))
    finally:
        codes = attempt.wait(SECONDS_TO_STOP)
    lost = []
    if codes != [EXIT_CODES[number]] * run.num_processes:
        lost.append(f"exit codes {codes}: {attempt.printed[-2000:]}")
    if attempt.printed.count("stopped: resume with `diffmm fit --resume ") != 1:
        lost.append(f"it did not report how to resume: {attempt.printed[-500:]}")
    places = [list(record.batches) for record in run.records()]
    if any(each != places[0] for each in places):
        lost.append("its processes stopped at different steps")
    path = find_whole(run.checkpoints)
    saved = None if path is None else (read_manifest(path) or {}).get("step")
    if saved != len(places[0]):
        lost.append(f"{len(places[0])} steps were made, step {saved} is saved")
    who = "all" if len(ranks) == run.num_processes else f"rank {ranks[0]}"
    where = f"{run.name}: {who}{' and workers' if with_workers else ''}, step {saved}"
    return Fault(number.name, where).and_lost(lost)


def _send(attempt: Attempt, number: int, ranks: list[int], with_workers: bool) -> None:
    for rank in ranks:
        pid = attempt.ranks[rank].pid
        assert pid is not None
        with suppress(ProcessLookupError):
            (os.killpg if with_workers else os.kill)(pid, number)
