"""Data that machines without a network are given: prepared once, compact, carried as files."""

import functools
import hashlib
import lzma
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from benchmarks.letters import find_fonts, make_letters
from benchmarks.quality.tasks import SEPARATOR, TASKS
from benchmarks.speech import SOUNDS, TRANSCRIPTS, make_speech
from datamodules.pairs.audio_text import Sounds
from datamodules.pairs.emoji import ANNOTATIONS, FONT, Emoji
from datamodules.pairs.image_text import Images
from datamodules.pairs.prompts import SpokenPrompts

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FONTS = Path("/usr/share/fonts")
VAL_FONTS = ("lato", "urw-base35")
VOCAB_SIZE = 16384
MAX_FILE_BYTES = 200_000
"""Larger Python files are mostly tables."""
VAL_FRACTION = 0.03
MAX_SECONDS = 5.0
"""Longer prompts are left out of the transcripts."""
EMOJI_SIDE = 96
"""Pixels of a side of a picture, for crops of 64."""


@dataclass(frozen=True)
class Sources:
    """Where the data comes from.

    Attributes:
        python: Folders of Python files.
        text_bytes: Maximum number of bytes of text, before compression.
        fashion_mnist: Folder of the IDX files.
        fonts: Folder of fonts; those below `VAL_FONTS` are for validation.
        per_class: Number of training images per letter.
        sounds: Folder of recorded prompts, one folder per language.
        transcripts: File of the transcripts of the English ones.
        emoji: Font of emoji.
        annotations: Folder of the names of emoji (see `datamodules.pairs.Emoji`).
    """

    python: Sequence[Path] = tuple(Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib"))
    text_bytes: int = 110 * 2**20
    fashion_mnist: Path = FASHION_MNIST
    fonts: Path = FONTS
    per_class: int = 120
    sounds: Path = SOUNDS
    transcripts: Path = TRANSCRIPTS
    emoji: Path = Path(FONT)
    annotations: Path = Path(ANNOTATIONS)


def prepare(name: str, folder: Path, sources: Sources) -> None:
    """Write the data of a task into `folder`, which does not exist.

    Raises:
        SystemExit: If a source is missing.
    """
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    write = {
        "text": _text,
        "fashion_mnist": _images,
        "letters": _letters,
        "speech": _speech,
        "emoji": _emoji,
        "transcripts": _transcripts,
    }[name]
    write(unfinished, sources)
    unfinished.rename(folder)


@functools.cache
def fingerprint(data: Path, task: str) -> str | None:
    """A short hash of the names and contents of a task's prepared files; None for a task that needs
    none.

    Raises:
        SystemExit: If they do not exist.
    """
    folder = data / task
    if not TASKS[task].prepared:
        return None
    if not folder.is_dir():
        raise SystemExit(
            f"{folder} does not exist: make it with `python -m benchmarks.quality prepare {data} "
            f"--tasks {task}`"
        )
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()[:12]


def check_same_data(
    rows: Iterable[Mapping[str, Any]], task: str, data: str | None, file: Path
) -> None:
    """Check that the runs of a task in `file` were made with the data of this fingerprint. Those
    that were kept without one are not checked.

    Raises:
        SystemExit: If one was made with other data.
    """
    for row in rows:
        if row["task"] == task and row.get("data", data) != data:
            raise SystemExit(
                f"{file} has runs of {task} that were made with other data ({row['data']}) than "
                f"these ({data}), and cannot be compared with them: set --data to their data, or "
                f"--out to a new folder"
            )


def unpack(data: Path, cache: Path) -> None:
    """Decompress the text of prepared data into `cache/text`, unless it is there.

    Raises:
        SystemExit: If the text was not prepared.
    """
    found, mark = str(fingerprint(data, "text")), cache / "text" / "fingerprint"
    if mark.exists() and mark.read_text() == found:
        return
    mark.unlink(missing_ok=True)
    mark.parent.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        packed, plain = data / "text" / f"{split}.txt.xz", cache / "text" / f"{split}.txt"
        unfinished = plain.with_suffix(f".{os.getpid()}")  # other processes may do the same
        unfinished.write_bytes(lzma.decompress(packed.read_bytes()))
        unfinished.replace(plain)
    mark.write_text(found)


def python_files(folders: Sequence[Path]) -> Iterator[tuple[int, str]]:
    """The texts of different Python files with a hash of their content."""
    seen = set()
    for folder in folders:
        for path in folder.rglob("*.py"):
            if not path.is_file() or not 0 < path.stat().st_size <= MAX_FILE_BYTES:
                continue
            content = path.read_bytes()
            number = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
            if number in seen:
                continue
            seen.add(number)
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            if SEPARATOR not in text:
                yield number, text


def _text(folder: Path, sources: Sources) -> None:
    """Python files with a byte-pair tokenizer that is trained on the training files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    # In order of their hashes, which is random and the same on every machine.
    chosen, total = [], 0
    for number, text in sorted(python_files(sources.python)):
        total += len(text.encode())
        if total > sources.text_bytes:
            break
        chosen.append((number, text))
    # The lowest hashes are a random part.
    cut = max(1, round(VAL_FRACTION * len(chosen)))
    splits = {
        "val": [text for _, text in chosen[:cut]],
        "train": [text for _, text in chosen[cut:]],
    }
    if not splits["train"]:
        raise SystemExit(f"there are no Python files in {', '.join(map(str, sources.python))}")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(splits["train"], trainer)
    folder.mkdir(parents=True)
    inner.save(str(folder / "tokenizer.json"))
    for split, texts in splits.items():
        packed = lzma.compress(SEPARATOR.join(texts).encode())
        (folder / f"{split}.txt.xz").write_bytes(packed)


def _images(folder: Path, sources: Sources) -> None:
    """The IDX files of Fashion-MNIST."""
    if not sources.fashion_mnist.is_dir():
        raise SystemExit(
            f"{sources.fashion_mnist} does not exist: install dataset-fashion-mnist, or set "
            f"--fashion-mnist"
        )
    shutil.copytree(sources.fashion_mnist, folder)


def _letters(folder: Path, sources: Sources) -> None:
    """Letters in fonts of the machine."""
    fonts = find_fonts([str(sources.fonts)])
    held_out = [font for font in fonts if any(name in str(font) for name in VAL_FONTS)]
    train = [font for font in fonts if font not in held_out]
    if not held_out or not train:
        raise SystemExit(
            f"{sources.fonts} needs fonts, and those of fonts-lato or fonts-urw-base35 "
            f"for validation: install them, or set --fonts"
        )
    make_letters(folder, train, held_out, sources.per_class)


def _emoji(folder: Path, sources: Sources) -> None:
    """Pictures of emoji with a text file of their names and keywords each."""
    source = Emoji(font=str(sources.emoji), annotations=str(sources.annotations))
    try:
        splits = source.splits(Images())
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    for split, pairs in (("train", splits.train), ("val", splits.val)):
        (folder / split).mkdir(parents=True)
        for number, texts in enumerate(pairs.texts):
            picture = pairs.media.read(number).resize((EMOJI_SIDE, EMOJI_SIDE))
            picture.save(folder / split / f"{number:04d}.png", optimize=True)
            (folder / split / f"{number:04d}.txt").write_text("\n".join(texts), encoding="utf-8")


def _transcripts(folder: Path, sources: Sources) -> None:
    """Recorded English prompts with a text file of their transcript each."""
    source = SpokenPrompts(
        max_seconds=MAX_SECONDS, folder=str(sources.sounds), transcripts=str(sources.transcripts)
    )
    try:
        splits = source.splits(Sounds())
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    for split, pairs in (("train", splits.train), ("val", splits.val)):
        (folder / split).mkdir(parents=True)
        for number, (text,) in enumerate(pairs.texts):
            rate = pairs.media.info(number).sample_rate_hz
            soundfile.write(folder / split / f"{number:04d}.flac", pairs.media.read(number), rate)
            (folder / split / f"{number:04d}.txt").write_text(text, encoding="utf-8")


def _speech(folder: Path, sources: Sources) -> None:
    """Recorded speech in five languages."""
    make_speech(folder, sources.sounds, sources.transcripts)
