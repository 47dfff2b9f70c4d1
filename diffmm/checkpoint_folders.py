"""Checkpoints on disk: folders that are whole, or found out.

    checkpoints/
      LATEST                    names the folder that was finished last
      LOGS                      the folders of the run's CSV files
      step_00001000/
        state.ckpt              the state; a folder where every process wrote a file of it
        manifest.json           every file's size and SHA-256, and what the state is of

A checkpoint is written to a hidden folder beside its place, flushed to the disk, and only then
renamed. So a folder `step_*` was whole once; whether it still is, its manifest tells. Light: this
module needs the standard library alone.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

DIRECTORY_NAME = "checkpoints"
"""Where a run keeps them."""

STATE_NAME = "state.ckpt"
MANIFEST_NAME = "manifest.json"
LATEST_NAME = "LATEST"
UNFINISHED = ".unfinished-"
"""What the names of folders that are being written start with."""
REMOVED = ".removed-"
"""What the names of folders that are being removed start with."""
SEAL = "manifest_sha256"
"""The key in a manifest that shows damage to the manifest itself."""
REPLACED = "_replaced"
"""What the name of a folder ends with for the moment in which another one takes its place."""


class Checkpoint(NamedTuple):
    """A folder with a manifest; its files may have been damaged since."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def order(self) -> int:
        """Later ones have larger ones, whatever their step."""
        return self.manifest["number"]


def start(directory: Path, step: int) -> Path:
    """A hidden, empty folder, for the files of a checkpoint."""
    unfinished = directory / f"{UNFINISHED}step_{step:08d}"
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    return unfinished


def finish(
    unfinished: Path, facts: Mapping[str, Any], hashes: Mapping[str, tuple[int, str]] | None = None
) -> Path:
    """Give a filled folder its manifest and its name, for good.

    Args:
        unfinished: made by `start`.
        facts: for the manifest, plain values; with the `step`.
        hashes: size and SHA-256 of files by name, where they are known; the others are read.

    Returns:
        The folder `step_...`.
    """
    directory = unfinished.parent
    known = dict(hashes or {})
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    entries = {}
    for path in files:
        name = path.relative_to(unfinished).as_posix()
        size, digest = known[name] if name in known else measure(path)
        entries[name] = {"size": size, "sha256": digest}
        flush(path)
    number = 1 + max((found.order for found in checkpoints(directory)), default=0)
    manifest = {**facts, "number": number, "files": entries}
    manifest[SEAL] = seal(manifest)
    write_text(unfinished / MANIFEST_NAME, json.dumps(manifest, indent=1))
    for folder in (unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())):
        flush(folder)
    final = directory / unfinished.name.removeprefix(UNFINISHED)
    aside = final.with_name(f"{final.name}{REPLACED}")
    if final.exists():
        # Of the same step: a damaged one, or of a run that then went another way.
        remove(aside)
        final.rename(aside)
    unfinished.rename(final)
    flush(directory)
    write_text(directory / LATEST_NAME, f"{final.name}\n")
    remove(aside)
    return final


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all, and onto the disk."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        flush(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def seal(manifest: dict[str, Any]) -> str:
    """The SHA-256 of all that a manifest says."""
    told = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def remove(folder: Path) -> None:
    """Remove a folder; one that is cut off on the way is no checkpoint any more."""
    if folder.exists():
        hidden = folder.with_name(f"{REMOVED}{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def clean(directory: Path) -> None:
    """Undo or end what writes and removals that were cut off have begun."""
    for start_of_name in (UNFINISHED, REMOVED):
        for folder in directory.glob(f"{start_of_name}*"):
            shutil.rmtree(folder, ignore_errors=True)
    for file in directory.glob(f".{LATEST_NAME}.*"):
        file.unlink()
    for aside in directory.glob(f"*{REPLACED}"):
        final = aside.with_name(aside.name.removesuffix(REPLACED))
        if fault(final) is None:
            remove(aside)
        else:
            remove(final)
            aside.rename(final)


def checkpoints(directory: Path) -> list[Checkpoint]:
    """All folders with a readable manifest, from first to last."""
    found = []
    for folder in directory.glob("step_*"):
        manifest = read_manifest(folder)
        if manifest is not None:
            found.append(Checkpoint(folder, manifest))
    return sorted(found, key=lambda checkpoint: checkpoint.order)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder's manifest says; `None` if there is none, or it is damaged."""
    path = folder / MANIFEST_NAME
    try:
        # Anything but a file, such as a pipe, might never answer.
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        is_whole = _is_manifest(manifest) and manifest[SEAL] == seal(manifest)
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if is_whole else None


def _is_manifest(found: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a manifest has all that is asked of it, of the right types. One that names no file
    vouches for nothing."""
    if not isinstance(found, dict) or not isinstance(found.get(SEAL), str):
        return False
    files, metrics = found.get("files"), found.get("metrics", {})
    return (
        all(_is_count(found.get(name)) for name in ("step", "number"))
        and isinstance(metrics, dict)
        and all(isinstance(value, int | float) for value in metrics.values())
        and isinstance(files, dict)
        and bool(files)
        and all(_is_inside(name) and _is_entry(entry) for name, entry in files.items())
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and _is_count(entry.get("size"))
        and isinstance(entry.get("sha256"), str)
    )


def _is_inside(name: str) -> bool:
    """Whether the name of a file stays in its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def fault(folder: Path, *, read: bool = True) -> str | None:
    """What is wrong with a checkpoint; `None` if it is whole.

    Args:
        folder: of the checkpoint.
        read: compare the contents of its files, too; otherwise only their sizes.
    """
    if not (folder / MANIFEST_NAME).exists():
        return f"it has no {MANIFEST_NAME}"
    manifest = read_manifest(folder)
    if manifest is None:
        return f"its {MANIFEST_NAME} is damaged"
    for name, entry in manifest["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if not path.is_file():
                return f"{name} is no file"
            if size != entry["size"]:
                return f"{name} has {size} bytes of {entry['size']}"
            if read and measure(path)[1] != entry["sha256"]:
                return f"{name} has other contents than when it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def find_whole(directory: Path, *, warn: Callable[[str], object] = warnings.warn) -> Path | None:
    """The newest whole checkpoint of a directory, or `None` where there has never been one.

    Args:
        directory: `RUN/checkpoints`.
        warn: called with one line, if newer ones are passed over, that names each and its fault.

    Raises:
        ValueError: if there are checkpoints, but none is whole.
    """
    known = checkpoints(directory)
    named = {checkpoint.path.name for checkpoint in known}
    broken = [path for path in directory.glob("step_*") if path.name not in named]
    faults = [f"{path.name} ({fault(path)})" for path in sorted(broken, reverse=True)]
    for checkpoint in reversed(known):
        wrong = fault(checkpoint.path)
        if wrong is None:
            faults += unfinished_after(directory, checkpoint.step)
            if faults:
                warn(
                    f"{directory}: uses {checkpoint.path.name}, and not {', '.join(faults)}: "
                    f"remove what is broken"
                )
            return checkpoint.path
        faults.append(f"{checkpoint.path.name} ({wrong})")
    if faults:
        raise ValueError(f"no checkpoint in {directory} is whole: {', '.join(faults)}")
    return None


def find_state(path: Path, *, warn: Callable[[str], object] = warnings.warn) -> Path:
    """The state that is meant by the path of a checkpoint's folder, of a run or of its
    `checkpoints`: of the latter two the newest whole one. Any other path is returned as it is.

    Args:
        path: what a user gave.
        warn: as in `find_whole`.

    Raises:
        ValueError: naming the fault of each, if there are checkpoints, but none that is whole.
    """
    if path.name.startswith("step_") and path.is_dir():
        wrong = fault(path)
        if wrong is not None:
            raise ValueError(f"checkpoint {path} is not whole: {wrong}")
        return path / STATE_NAME
    for directory in (path / DIRECTORY_NAME, path):
        whole = find_whole(directory, warn=warn)
        if whole is not None:
            return whole / STATE_NAME
        # As Lightning's own callback writes them.
        files = directory.glob("*.ckpt") if directory.name == DIRECTORY_NAME else ()
        latest = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
        if latest is not None:
            return latest
    return path


def unfinished_after(directory: Path, step: int) -> list[str]:
    """Names of later checkpoints that were being written when a run was cut off."""
    prefix = f"{UNFINISHED}step_"
    names = [folder.name for folder in directory.glob(f"{prefix}*")]
    return [
        f"{name} (it was never finished)"
        for name in names
        if (digits := name.removeprefix(prefix)).isdigit() and int(digits) > step
    ]


def best(directory: Path, monitor: str, mode: str) -> list[Checkpoint]:
    """The checkpoints that a metric is known of, from best to worst; of equals the later first.

    Args:
        directory: `RUN/checkpoints`.
        monitor: the metric.
        mode: whether the `min` or the `max` of it is best.
    """
    sign = 1.0 if mode == "min" else -1.0
    measured = [
        (sign * found.manifest["metrics"][monitor], -found.order, found)
        for found in checkpoints(directory)
        if monitor in found.manifest.get("metrics", {})
    ]
    return [found for _, _, found in sorted(measured, key=lambda item: item[:2])]


def prune(
    directory: Path, *, keep_last: int, keep_best: int, monitor: str | None, mode: str
) -> None:
    """Remove all checkpoints but the last and the best ones.

    Args:
        directory: `RUN/checkpoints`.
        keep_last: how many, at least 1. Folders that are visibly broken do not count, and stay.
        keep_best: how many of the best by `monitor`.
        monitor, mode: as in `best`.
    """
    ranked = best(directory, monitor, mode) if monitor is not None else []
    whole = [found for found in checkpoints(directory) if fault(found.path, read=False) is None]
    kept = {found.path for found in (*whole[-keep_last:], *ranked[:keep_best])}
    for found in whole:
        if found.path not in kept:
            remove(found.path)
