"""Invalid files: named pipes in place of files, and headers that do not match their content."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from PIL import Image

from benchmarks.faults.mutations import outcome
from benchmarks.faults.runs import Run
from benchmarks.faults.tally import Fault
from datamodules.text.data import write_token_file
from datamodules.text.token_documents import Document
from diffmm.checkpoint_folders import LATEST_NAME, MANIFEST_NAME, SEAL, STATE_NAME, seal
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.settings import load, override
from diffmm.tokenizers import load_tokenizer

QUICK: dict[str, Any] = {
    "trainer.max_steps": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.limit_val_batches": 0,
    "trainer.logger": False,
    "trainer.callbacks": [],
}

PLACES = ("config.yaml", f"checkpoints/{LATEST_NAME}", "checkpoints/LOGS")
"""Files of a run."""


def pipes(whole: Run, folder: Path) -> Iterator[Fault]:
    """Replace each kind of file by a named pipe without a writer."""
    newest = f"checkpoints/{whole.whole()[-1].path.name}"
    for place in (*PLACES, f"{newest}/{MANIFEST_NAME}", f"{newest}/{STATE_NAME}"):
        run = fresh(folder) / "run"
        shutil.copytree(whole.directory, run)
        (run / place).unlink()
        os.mkfifo(run / place)
        # The run may use other files instead, such as an earlier checkpoint.
        yield Fault("FIFOs", place).and_lost(outcome("fit", "--resume", str(run), "--trust"))
    for name in ("text", "image", "audio"):
        path, file = data(fresh(folder), name)
        file.unlink()
        os.mkfifo(file)
        yield Fault("FIFOs", f"{name} data").and_lost(refused(folder, path))
    os.mkfifo(fresh(folder) / "recipe.yaml")
    yield Fault("FIFOs", "recipe").and_lost(refused(folder, folder / "recipe.yaml"))


def lies(folder: Path) -> Iterator[Fault]:
    """Write headers that do not match the content of their files."""
    for field, value in (("num_tokens", 2**40), ("num_documents", 10**9), ("dtype", "O")):
        path, file = tokens(fresh(folder))
        header = json.loads(file.read_text())
        file.write_text(json.dumps({**header, field: value}))
        yield Fault("headers with wrong sizes", f"tokens: {field}").and_lost(refused(folder, path))
    for what, place, content in (
        ("image: width", 16, struct.pack(">I", 2**31 - 1)),
        ("image: height", 20, struct.pack(">I", 60_000)),
    ):
        path, file = data(fresh(folder), "image")
        patch(file, place, content)
        yield Fault("headers with wrong sizes", what).and_lost(refused(folder, path))
    for what, place, content in (
        ("sound: length", 40, struct.pack("<I", 2**20)),
        ("sound: channels", 22, struct.pack("<H", 60_000)),
    ):
        path, file = data(fresh(folder), "audio")
        patch(file, place, content)
        yield Fault("headers with wrong sizes", what).and_lost(refused(folder, path))


def sealed_lies(whole: Run, folder: Path) -> Iterator[Fault]:
    """Write invalid manifests of checkpoints with valid seals."""
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "no files": lambda manifest: manifest.update(files={}),
        "no step": lambda manifest: manifest.pop("step"),
        "a step of another type": lambda manifest: manifest.update(step="many"),
        "files of another type": lambda manifest: manifest.update(files=[1]),
        "a file outside": lambda manifest: manifest["files"].update({"../../x": {"size": 1}}),
    }
    for what, change in changes.items():
        run = fresh(folder) / "run"
        shutil.copytree(whole.directory, run)
        path = run / "checkpoints" / whole.whole()[-1].path.name / MANIFEST_NAME
        manifest = json.loads(path.read_text())
        change(manifest)
        manifest.pop(SEAL)
        path.write_text(json.dumps({**manifest, SEAL: seal(manifest)}))
        yield Fault("headers with wrong sizes", f"manifest: {what}").and_lost(
            outcome("fit", "--resume", str(run), "--trust")
        )


def fresh(folder: Path) -> Path:
    """Empty and return a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def patch(file: Path, place: int, value: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[place : place + len(value)] = value
    file.write_bytes(content)


def refused(folder: Path, recipe: Path) -> list[str]:
    """Return the faults of the refusal of a recipe that cannot be trained."""
    return outcome("fit", "--config", str(recipe), "--run_dir", str(folder / "run"), may=False)


def recipe_of(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    values = load([find_recipe(name)])
    for key, value in {**QUICK, **changes}.items():
        override(values, key, value)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def data(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a recipe with a folder of files; return it and a file that every epoch reads."""
    rng = np.random.default_rng(0)
    files = folder / "files"
    for number in range(8):
        place = files / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        if name == "text":
            (place / f"{number}.txt").write_text("A text of some words. " * 20)
        elif name == "image":
            pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
        else:
            sound = rng.uniform(-0.5, 0.5, 8000)
            soundfile.write(place / f"{number}.wav", sound, 8000, "PCM_16")
    kind = {
        "text": ("text/stdlib_tiny", "datamodules.text.TextFolder", {"path": str(files)}),
        "image": (
            "image/digits_tiny",
            "datamodules.image.ImageFolder",
            {"train": str(files), "val": str(files)},
        ),
        "audio": (
            "audio/sound_events_tiny",
            "datamodules.audio.SoundFolder",
            {"folder": str(files), "val": str(files)},
        ),
    }[name]
    source = {"class_path": kind[1], "init_args": kind[2]}
    changes: dict[str, Any] = {"data.source": source, "data.batch_size": 8}
    if name == "text":
        changes |= {"data.batch_size": 1, "data.validation_fraction": 0.0}
        changes |= {"data.test_fraction": 0.0}
    return recipe_of(folder, kind[0], changes), sorted(files.rglob("*.*"))[0]


def tokens(folder: Path) -> tuple[Path, Path]:
    """Write a recipe with a token file; return it and the header of that file."""
    documents = [Document(str(number), f"Text {number} of many. " * 9) for number in range(40)]
    path = write_token_file(folder / "tokens.bin", documents, load_tokenizer("bytes"))
    source = {"class_path": "datamodules.text.TokenFiles", "init_args": {"paths": [str(path)]}}
    recipe = recipe_of(folder, "text/stdlib_tiny", {"data.source": source, "data.batch_size": 1})
    return recipe, path.with_suffix(".json")
