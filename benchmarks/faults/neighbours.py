"""Others at work in a run's folders: a second process of the same run, and whoever changes data."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.runs import NUM_STEPS, SECONDS_A_RUN, Run, differences, wait
from benchmarks.faults.tally import Fault


def second_process(run: Run, whole: Run, how: str) -> Fault:
    """Start a run again while it runs: the second process is refused, the first loses nothing.

    Args:
        run: its recipe is written.
        whole: the same run, undisturbed.
        how: the second process starts it, as in `Run.start`.
    """
    first = run.start()
    wait(first, lambda: run.num_batches() > NUM_STEPS // 4, SECONDS_A_RUN)
    second = run.start(how)
    codes = second.wait(SECONDS_A_RUN)
    # Both print to one file.
    told = [line for line in second.printed.splitlines() if line.startswith("diffmm: error: ")]
    wrong = [] if codes == [2] else [f"exit codes {codes} of the second process"]
    if len(told) != 1 or f"is in use by process {first.ranks[0].pid}" not in told[0]:
        wrong.append(f"the second process says {told}")
    codes = first.wait(SECONDS_A_RUN)
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
"""What may become of a file."""


def changed_data(run: Run, whole: Run, change: str, rng: random.Random) -> Fault:
    """Change a stopped run's data: it is refused with what changed; and goes on to the same bits
    with the data as they were."""
    texts, kept = run.folder / "texts", run.folder / "kept"
    run.folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run.folder.parent / "texts", texts)
    shutil.copytree(texts, kept)
    run.write_recipe(**{"data.source.init_args.path": str(texts)})
    attempt = run.start()
    wait(attempt, lambda: run.num_batches() > NUM_STEPS // 4, SECONDS_A_RUN)
    attempt.send(signal.SIGTERM, [0])
    codes = attempt.wait(SECONDS_A_RUN)
    wrong = [] if codes == [143] else [f"exit codes {codes} after SIGTERM"]
    before = [found.path.name for found in run.whole()]
    # Of many files, any of which may be held out for validation.
    for file in sorted(texts.iterdir()):
        if rng.random() < 0.5:
            CHANGES[change](file)
    attempt = run.start("resume")
    codes = attempt.wait(SECONDS_A_RUN)
    if codes != [2] or "differ from those of the checkpoint" not in attempt.printed:
        wrong.append(f"exit codes {codes}, not refused: {attempt.printed[-1000:]}")
    if [found.path.name for found in run.whole()] != before:
        wrong.append("the refused run has other checkpoints")
    shutil.rmtree(texts)
    kept.rename(texts)
    attempt = run.start("resume")
    codes = attempt.wait(SECONDS_A_RUN)
    wrong += [f"exit codes {codes}"] if any(codes) else differences(run, whole)
    return Fault("changed data", f"{run.name}: files {change}").and_lost(wrong)
