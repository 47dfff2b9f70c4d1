"""Checkpoints on disk: folders whose manifests reveal damage.

    checkpoints/
      LATEST                    the name of the folder that was completed last
      LOGS                      the folders of the run's CSV files
      step_00001000/
        state.ckpt              the state; a folder if every process wrote its own file
        manifest.json           size and SHA-256 of every file, and facts about the state

A checkpoint is written to a hidden folder in the same directory, flushed to the disk, and only then
renamed. A folder `step_*` was therefore complete when it was written; its manifest shows whether it
still is. This module and what it imports need only the standard library.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

from diffmm.new_folders import discard, naming

RUN_CONFIG_NAME = "config.yaml"
"""Name of the recipe in a run."""

DIRECTORY_NAME = "checkpoints"
"""Name of a run's folder of checkpoints."""

STATE_NAME = "state.ckpt"
MANIFEST_NAME = "manifest.json"
LATEST_NAME = "LATEST"
UNFINISHED = ".unfinished-"
"""Name prefix of folders that are being written."""
REMOVED = ".removed-"
"""Name prefix of folders that are being removed."""
SEAL = "manifest_sha256"
"""Key of a manifest's own hash, which reveals damage to the manifest."""
REPLACED = "_replaced"
"""Name suffix of a folder that is being replaced by another one."""


class Checkpoint(NamedTuple):
    """A folder with a manifest; its files may be damaged."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def order(self) -> int:
        """A number that increases with every checkpoint of a run, independent of the step."""
        return self.manifest["number"]


def start(directory: Path, step: int) -> Path:
    """Create a hidden, empty folder for the files of a checkpoint."""
    unfinished = directory / f"{UNFINISHED}step_{step:08d}"
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    return unfinished


def finish(
    unfinished: Path, facts: Mapping[str, Any], hashes: Mapping[str, tuple[int, str]] | None = None
) -> Path:
    """Write the manifest of a complete folder and give the folder its final name.

    Args:
        unfinished: A folder created by `start`.
        facts: Plain values for the manifest, including the `step`.
        hashes: Size and SHA-256 of files by name, if known; other files are read.

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
        # A checkpoint of the same step: damaged, or from before the run was resumed.
        remove(aside)
        final.rename(aside)
    unfinished.rename(final)
    flush(directory)
    write_text(directory / LATEST_NAME, f"{final.name}\n")
    remove(aside)
    return final


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically and flush it to the disk.

    Raises:
        OSError: If it cannot be written; it names `path`.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            unfinished.write_text(text, encoding="utf-8")
            flush(unfinished)
            unfinished.replace(path)
    finally:
        discard(unfinished)
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure(path: Path) -> tuple[int, str]:
    """Compute the size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def seal(manifest: dict[str, Any]) -> str:
    """Compute the SHA-256 of a manifest's contents."""
    content = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove(folder: Path) -> None:
    """Remove a folder, which is renamed first so that an interrupted removal leaves no damaged
    checkpoint."""
    if folder.exists():
        hidden = folder.with_name(f"{REMOVED}{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def clean(directory: Path) -> None:
    """Undo or complete interrupted writes and removals."""
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
    """All folders with a valid manifest, from first to last."""
    found = []
    for folder in directory.glob("step_*"):
        manifest = read_manifest(folder)
        if manifest is not None:
            found.append(Checkpoint(folder, manifest))
    return sorted(found, key=lambda checkpoint: checkpoint.order)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read a folder's manifest; `None` if it is missing or damaged."""
    path = folder / MANIFEST_NAME
    try:
        # Reading anything but a regular file, such as a pipe, might block.
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        is_whole = _is_manifest(manifest) and manifest[SEAL] == seal(manifest)
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if is_whole else None


def _is_manifest(found: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a manifest has all required entries with the right types, including at least one
    file."""
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
    """Whether a file name stays within its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def fault(folder: Path, *, read: bool = True) -> str | None:
    """Describe the damage of a checkpoint; `None` if it is complete.

    Args:
        folder: Folder of the checkpoint.
        read: Whether to compare the contents of files and not only their sizes.
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
                return f"{name} is not a regular file"
            if size != entry["size"]:
                return f"{name} has {size} bytes of {entry['size']}"
            if read and measure(path)[1] != entry["sha256"]:
                return f"the contents of {name} have changed since it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def find_whole(directory: Path, *, warn: Callable[[str], object] = warnings.warn) -> Path | None:
    """Find the newest complete checkpoint of a directory; `None` if it has no checkpoints.

    Args:
        directory: The directory `RUN/checkpoints`.
        warn: Called with a one-line message if newer checkpoints are skipped, with their faults.

    Raises:
        ValueError: If there are checkpoints, but none is complete.
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
                    f"{directory}: using {checkpoint.path.name} instead of {', '.join(faults)}: "
                    f"remove the damaged ones"
                )
            return checkpoint.path
        faults.append(f"{checkpoint.path.name} ({wrong})")
    if faults:
        raise ValueError(f"no checkpoint in {directory} is complete: {', '.join(faults)}")
    return None


def find_state(path: Path, *, warn: Callable[[str], object] = warnings.warn) -> Path:
    """Find the state file of a checkpoint folder, or of the newest complete checkpoint of a run or
    its `checkpoints` folder. Any other path is returned unchanged.

    Args:
        path: A path given by the user.
        warn: As in `find_whole`.

    Raises:
        ValueError: If there are checkpoints, but none is complete; the message names their faults.
    """
    if path.name.startswith("step_") and path.is_dir():
        wrong = fault(path)
        if wrong is not None:
            raise ValueError(f"checkpoint {path} is damaged: {wrong}")
        return path / STATE_NAME
    for directory in (path / DIRECTORY_NAME, path):
        whole = find_whole(directory, warn=warn)
        if whole is not None:
            return whole / STATE_NAME
        # Checkpoints of Lightning's own callback.
        files = directory.glob("*.ckpt") if directory.name == DIRECTORY_NAME else ()
        latest = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
        if latest is not None:
            return latest
    return path


def why_no_weights(path: Path) -> str | None:
    """Why a folder in which `find_state` finds nothing has no weights: it is a run without a
    checkpoint, or a folder of runs. `None` for other paths."""
    if (path / RUN_CONFIG_NAME).is_file():
        return (
            f"{path} has no checkpoint yet: continue the run until it has one "
            f"(diffmm fit --resume {path})"
        )
    for pattern in ("*", "*/*"):
        runs = sorted(found.parent for found in path.glob(f"{pattern}/{RUN_CONFIG_NAME}"))
        if runs:
            names = [run.relative_to(path).as_posix() for run in runs[:3]]
            listed = ", ".join([*names, *["..."] * (len(runs) > len(names))])
            return f"{path} is a folder of runs ({listed}): name one of them, such as {runs[0]}"
    return None


def unfinished_after(directory: Path, step: int) -> list[str]:
    """Names of later checkpoints whose writing was interrupted."""
    prefix = f"{UNFINISHED}step_"
    names = [folder.name for folder in directory.glob(f"{prefix}*")]
    return [
        f"{name} (it is incomplete)"
        for name in names
        if (digits := name.removeprefix(prefix)).isdigit() and int(digits) > step
    ]


def best(directory: Path, monitor: str, mode: str) -> list[Checkpoint]:
    """The checkpoints with a metric, from best to worst; of equal ones the later first.

    Args:
        directory: The directory `RUN/checkpoints`.
        monitor: Name of the metric.
        mode: `min` if lower values are better, `max` if higher ones are.
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
    """Remove all checkpoints except the last and the best ones.

    Args:
        directory: The directory `RUN/checkpoints`.
        keep_last: Number of last checkpoints to keep, at least 1. Damaged folders do not count and
            are kept.
        keep_best: Number of best checkpoints by `monitor` to keep.
        monitor: Name of the metric, as in `best`.
        mode: `min` or `max`, as in `best`.
    """
    ranked = best(directory, monitor, mode) if monitor is not None else []
    whole = [found for found in checkpoints(directory) if fault(found.path, read=False) is None]
    kept = {found.path for found in (*whole[-keep_last:], *ranked[:keep_best])}
    for found in whole:
        if found.path not in kept:
            remove(found.path)
