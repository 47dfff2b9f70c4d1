"""Damage to checkpoints: bytes flipped or zeroed, files truncated or missing."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults.runs import SECONDS_PER_RUN, Run, differences
from benchmarks.faults.tally import Fault
from diffmm.checkpoint_folders import LATEST_NAME, find_whole


def flip(path: Path, rng: random.Random) -> str:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= rng.randrange(1, 256)
    path.write_bytes(content)
    return f"byte {place}"


def truncate(path: Path, rng: random.Random) -> str:
    """Truncate the file."""
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"to {size} bytes"


def blank(path: Path, rng: random.Random) -> str:
    """Replace a part by zeros, as a power failure may leave a file."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((16, 4096, len(content))))
    if not any(content[start:end]):
        return flip(path, rng)
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    return f"bytes {start} to {end}"


def delete(path: Path, rng: random.Random) -> str:
    """Remove the file."""
    path.unlink()
    return "gone"


WAYS: dict[str, Callable[[Path, random.Random], str]] = {
    "bytes flipped": flip,
    "files cut off": truncate,
    "bytes blanked": blank,
    "files missing": delete,
}


def damage_checkpoints(
    whole: Run, way: str, count: int, folder: Path, rng: random.Random
) -> Iterator[Fault]:
    """Damage copies of a run's checkpoints, and check which checkpoint is used.

    Args:
        whole: A finished run.
        way: Kind of damage, a key of `WAYS`.
        count: Number of cases, each with one to all checkpoints damaged.
        folder: Folder for the copies.
        rng: Random generator for the places of the damage.
    """
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole.checkpoints, folder)
        order = [found.path.name for found in whole.whole()]
        hit = rng.sample(order, rng.choices(range(1, len(order) + 1), (6, 2, 1)[: len(order)])[0])
        done = []
        for name in hit:
            file = rng.choice(sorted(path for path in (folder / name).iterdir() if path.is_file()))
            done.append(f"{name}/{file.name} {WAYS[way](file, rng)}")
        if rng.random() < 0.2:
            done.append(f"{LATEST_NAME} {WAYS[way](folder / LATEST_NAME, rng)}")
        best = next((name for name in reversed(order) if name not in hit), None)
        wrong = _wrong_choice(folder, best, [name for name in hit if best is None or name > best])
        yield Fault(f"checkpoints: {way}", ", ".join(done)).and_lost(wrong)


def _wrong_choice(folder: Path, best: str | None, damaged: list[str]) -> list[str]:
    """Return the faults of the choice of a checkpoint, and of its messages."""
    messages: list[str] = []
    used = None
    try:
        path = find_whole(folder, warn=messages.append)
        used = path and path.name
    except ValueError as error:
        messages.append(str(error))
    wrong = [] if used == best else [f"{used} is used instead of {best}"]
    if len(messages) > 1:
        wrong.append(f"it is not reported in one line: {messages}")
    unnamed = [name for name in damaged if name not in str(messages)]
    return wrong + [f"{name} is not named in {messages}" for name in unnamed]


def resume_damaged(run: Run, whole: Run, way: str, rng: random.Random) -> Fault:
    """Damage the newest checkpoints of an interrupted run, and resume it to its end."""
    shutil.copytree(whole.directory, run.directory)
    shutil.copytree(whole.samples, run.samples)
    # The copy looks like a run that was killed after its best checkpoint.
    config = run.directory / "config.yaml"
    config.write_text(config.read_text().replace(str(whole.directory), str(run.directory)))
    names = [found.path.name for found in whole.whole()]
    done = []
    for name in names[1:]:
        file = rng.choice(sorted((run.checkpoints / name).iterdir()))
        done.append(f"{name}/{file.name} {WAYS[way](file, rng)}")
    attempt = run.start("resume")
    codes = attempt.wait(SECONDS_PER_RUN)
    wrong = []
    if any(codes):
        wrong.append(f"exit codes {codes}: {attempt.printed[-2000:]}")
    else:
        wrong += differences(run, whole)
    if f"using {names[0]} instead of" not in attempt.printed:
        wrong.append(f"the checkpoint it uses is not reported: {attempt.printed[-2000:]}")
    return Fault(f"resumed, {way}", f"{run.name}: {', '.join(done)}").and_lost(wrong)
