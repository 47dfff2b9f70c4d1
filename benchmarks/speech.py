"""Makes a folder of recorded speech: which of five languages is spoken, held out by sentence.

    python -m benchmarks.speech FOLDER [--sounds DIR] [--transcripts FILE] [--max-seconds 2]

On Debian, the packages asterisk-core-sounds-en-wav, -es-wav, -fr-wav, -it-wav and -ru-wav install
the prompts of a telephone system in five languages, and asterisk-core-sounds-en their transcripts.
Each prompt has the same name in all languages. Prompts with the same English transcript are one
sentence, and all recordings of a sentence are either for training or for validation.

FOLDER gets `train/<language>/*.ogg` and `val/<language>/*.ogg`, mono, at the rate of the recordings
(8 kHz), from the beginning up to `--max-seconds`. `datamodules.audio.SoundFolder` reads it. Every
language is spoken by one speaker, so the voice also tells the language; it is a test of listening,
not of knowing languages.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import soundfile

from datamodules.pairs import prompts
from datamodules.pairs.prompts import LANGUAGES, read_transcripts, recordings, sentence_of
from diffmm.checks import DataError

SOUNDS = Path(prompts.FOLDER)
TRANSCRIPTS = Path(prompts.TRANSCRIPTS.format(language="en"))
MIN_SECONDS = 0.4
"""Shorter recordings are left out."""


def is_held_out(sentence: str, fraction: float) -> bool:
    """Whether a sentence is for validation, by its hash."""
    number = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:8], "big")
    return number < fraction * 2**64


def make_speech(
    folder: Path,
    sounds: Path,
    transcripts: Path,
    *,
    max_seconds: float = 2.0,
    val_fraction: float = 0.2,
) -> dict[str, int]:
    """Write the folder, and return the number of clips of each split.

    Raises:
        SystemExit: If files are missing.
    """
    if not transcripts.is_file():
        raise SystemExit(
            f"{transcripts} does not exist: install asterisk-core-sounds-en, or set --transcripts"
        )
    try:  # before anything is written
        texts = read_transcripts(transcripts)
        found = {language: recordings(sounds, language, texts) for language in LANGUAGES}
    except (DataError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
    counts = {"train": 0, "val": 0}
    for language, paths in found.items():
        for name, path in paths.items():
            split = "val" if is_held_out(sentence_of(texts[name]), val_fraction) else "train"
            with soundfile.SoundFile(path) as file:
                if file.frames < MIN_SECONDS * file.samplerate:
                    continue
                clip = file.read(int(max_seconds * file.samplerate), always_2d=True).mean(axis=1)
                rate_hz = file.samplerate
            target = folder / split / language / f"{name.replace('/', '_')}.ogg"
            target.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(target, clip, rate_hz, format="OGG", subtype="VORBIS")
            counts[split] += 1
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speech",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--sounds", type=Path, default=SOUNDS, metavar="DIR")
    parser.add_argument("--transcripts", type=Path, default=TRANSCRIPTS, metavar="FILE")
    parser.add_argument("--max-seconds", type=float, default=2.0, metavar="S")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        raise SystemExit(f"{options.folder} exists already: choose another folder")
    if options.max_seconds < MIN_SECONDS:
        parser.error(f"--max-seconds must be at least {MIN_SECONDS}, got {options.max_seconds}")
    counts = make_speech(
        options.folder, options.sounds, options.transcripts, max_seconds=options.max_seconds
    )
    print(f"{counts['train']} clips for training, {counts['val']} for validation")


if __name__ == "__main__":
    main()
