"""Concurrent changes of a run's folders: a second process of the same run, and changed data."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.runs import NUM_STEPS, SECONDS_PER_RUN, Run, differences, wait
from benchmarks.faults.tally import Fault


def second_process(run: Run, whole: Run, how: str) -> Fault:
    """Start a run twice: the second process must be refused, and the first must be unaffected.

    Args:
        run: Run whose recipe is already written.
        whole: The same run, uninterrupted.
        how: How the second process starts it, as in `Run.start`.
    """
    first = run.start()
    wait(first, lambda: run.num_batches() > NUM_STEPS // 4, SECONDS_PER_RUN)
    second = run.start(how)
    codes = second.wait(SECONDS_PER_RUN)
    # Both processes print to the same file.
    lines = [line for line in second.printed.splitlines() if line.startswith("diffmm: error: ")]
    wrong = [] if codes == [2] else [f"exit codes {codes} of the second process"]
    if len(lines) != 1 or f"is in use by process {first.ranks[0].pid}" not in lines[0]:
        wrong.append(f"the second process prints {lines}")
    codes = first.wait(SECONDS_PER_RUN)
    wrong += [f"exit codes {codes}"] if any(codes) else differences(run, whole)
    return Fault("two runs in one folder", f"{run.name}, {how}").and_lost(wrong)


def grown(path: Path) -> None:
    with path.open("a") as file:
        file.write("One line more.\n")


def gone(path: Path) -> None:
    path.unlink()


def renamed(path: Path) -> None:
    path.rename(path.with_name(f"another_{path.name}"))


def another(path: Path) -> None:
    path.write_text(path.read_text().replace("Line", "Mine"))


CHANGES: dict[str, Callable[[Path], None]] = {
    "grown": grown,
    "gone": gone,
    "renamed": renamed,
    "another": another,
}
"""Changes of a file, by name."""


def changed_data(run: Run, whole: Run, change: str, rng: random.Random) -> Fault:
    """Change the data of a stopped run: resuming must be refused with the change, and must give a
    bitwise identical result with the original data."""
    texts, kept = run.folder / "texts", run.folder / "kept"
    run.folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run.folder.parent / "texts", texts)
    shutil.copytree(texts, kept)
    run.write_recipe(**{"data.source.init_args.path": str(texts)})
    attempt = run.start()
    wait(attempt, lambda: run.num_batches() > NUM_STEPS // 4, SECONDS_PER_RUN)
    attempt.send(signal.SIGTERM, [0])
    codes = attempt.wait(SECONDS_PER_RUN)
    wrong = [] if codes == [143] else [f"exit codes {codes} after SIGTERM"]
    before = [found.path.name for found in run.whole()]
    # Several files are changed, because any single one may be held out for validation.
    for file in sorted(texts.iterdir()):
        if rng.random() < 0.5:
            CHANGES[change](file)
    attempt = run.start("resume")
    codes = attempt.wait(SECONDS_PER_RUN)
    if codes != [2] or "differ from those of the checkpoint" not in attempt.printed:
        wrong.append(f"exit codes {codes}, not refused: {attempt.printed[-1000:]}")
    if [found.path.name for found in run.whole()] != before:
        wrong.append("the refused run has other checkpoints")
    shutil.rmtree(texts)
    kept.rename(texts)
    attempt = run.start("resume")
    codes = attempt.wait(SECONDS_PER_RUN)
    wrong += [f"exit codes {codes}"] if any(codes) else differences(run, whole)
    return Fault("changed data", f"{run.name}: files {change}").and_lost(wrong)
