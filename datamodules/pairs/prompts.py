"""Recorded speech with transcripts in five languages, from Debian's packages; needs no network."""

import gzip
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import soundfile

from datamodules.audio.clips import AudioClips
from datamodules.pairs.sources import (
    SOUNDS,
    Medium,
    Pairs,
    PairSource,
    PairSplits,
    check_fractions,
    three_splits,
)
from datamodules.shared.files import check_file
from diffmm.checks import DataError, check_choice

LANGUAGES = ("en", "es", "fr", "it", "ru")
FOLDER = "/usr/share/asterisk/sounds"
TRANSCRIPTS = "/usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
NOT_SPEECH = ("silence/", "dictate/silence")

_NOTE = re.compile(r"\s*[\[(<][^\])>]*[\])>]\.?$")
_BRACKET = re.compile(r"[\[\](){}<>]")


def read_transcripts(path: Path) -> dict[str, str]:
    """The transcript of each prompt; sounds that are not speech (`[a beep]`) are left out.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If it has no transcripts.
    """
    check_file(path, "transcripts")
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    found = {}
    for line in content.decode("utf-8-sig").splitlines():
        name, colon, words = line.partition(":")
        if colon and not line.startswith(";") and not words.strip().startswith("["):
            found[name.strip()] = words.strip()
    if not found:
        raise DataError(f"{path} has no transcripts: its lines must be NAME: TEXT")
    return found


def sentence_of(transcript: str) -> str:
    """A transcript in lower case, without punctuation and extra spaces.

    >>> sentence_of("Login  incorrect. You've reached ...")
    "login incorrect you've reached"
    """
    return " ".join(re.findall(r"\w+(?:['’]\w+)*", transcript.lower()))


def spoken(transcript: str) -> str:
    """A transcript without a note at its end (`Pour (emphase)`); empty if what is spoken is unknown
    because there are other notes in it."""
    text = _NOTE.sub("", transcript)
    return "" if _BRACKET.search(text) else text.strip()


def recordings(folder: Path, language: str, names: Iterable[str]) -> dict[str, Path]:
    """The files of those prompts that a language has, by name.

    Raises:
        FileNotFoundError: If the language is not installed.
    """
    sounds = folder / language
    if not sounds.is_dir():
        raise FileNotFoundError(
            f"{sounds} does not exist: install asterisk-core-sounds-{language}-wav, or set the "
            f"folder of sounds"
        )
    paths = {name: sounds / f"{name}.wav" for name in names if not name.startswith(NOT_SPEECH)}
    return {name: path for name, path in paths.items() if path.is_file()}


class Prompt(NamedTuple):
    """A recording of a sentence."""

    language: str
    name: str
    path: Path
    text: str


class SpokenPrompts(PairSource):
    """The prompts of a telephone system with their transcripts: about 550 sentences and words in
    each of five languages, each spoken by one person, at 8 kHz.

    On Debian, the packages asterisk-core-sounds-en-wav, -es-wav, -fr-wav, -it-wav and -ru-wav
    contain the recordings, and asterisk-core-sounds-en and so on the transcripts. Sentences are
    held out: prompts with the same text, and the same prompt in other languages, are in the same
    split.

    Args:
        languages: Some of `en`, `es`, `fr`, `it` and `ru`.
        max_seconds: Longer recordings are left out. Most take 1 to 5 seconds, and the longest more
            than a minute.
        normalize: Whether texts are in lower case without punctuation, as is common in speech
            recognition; otherwise as they are written.
        val_fraction: Fraction of sentences to hold out for validation, the same in every run.
        test_fraction: Fraction of sentences to hold out for testing.
        folder: The folder with a folder of recordings per language.
        transcripts: The files of transcripts, with `{language}` in place of the language.

    Raises:
        ValueError: If a language is unknown, or a number is out of range.
    """

    kinds = (SOUNDS,)

    def __init__(
        self,
        languages: Sequence[str] = ("en",),
        *,
        max_seconds: float = 10.0,
        normalize: bool = True,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        folder: str = FOLDER,
        transcripts: str = TRANSCRIPTS,
    ) -> None:
        if isinstance(languages, str) or not languages:
            raise ValueError(f"languages must be a list of at least one, got {languages!r}")
        for language in languages:
            check_choice("languages", language, LANGUAGES)
        if max_seconds <= 0:
            raise ValueError(f"max_seconds must be above 0, got {max_seconds}")
        check_fractions(val_fraction, test_fraction)
        self.languages = list(languages)
        self.max_seconds = max_seconds
        self.normalize = normalize
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.folder = folder
        self.transcripts = transcripts

    def splits(self, medium: Medium[AudioClips]) -> PairSplits[AudioClips]:
        prompts = [prompt for language in self.languages for prompt in self._prompts(language)]
        if not prompts:
            raise ValueError(f"{self.folder} has no prompt of at most {self.max_seconds:g} seconds")
        groups = connected([(p.name, sentence_of(p.text)) for p in prompts])
        train, val, test = (
            Pairs(
                medium.of_files([prompts[i].path for i in indices]),
                [[prompts[i].text] for i in indices],
            )
            for indices in three_splits(groups, self.val_fraction, self.test_fraction)
        )
        return PairSplits(train, val, test)

    def _prompts(self, language: str) -> list[Prompt]:
        path = Path(self.transcripts.format(language=language))
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: install asterisk-core-sounds-{language}, or set "
                f"--data.source.transcripts"
            )
        texts = {name: spoken(text) for name, text in read_transcripts(path).items()}
        if self.normalize:
            texts = {name: sentence_of(text) for name, text in texts.items()}
        files = recordings(Path(self.folder), language, [name for name, t in texts.items() if t])
        return [
            Prompt(language, name, file, texts[name])
            for name, file in sorted(files.items())
            if soundfile.info(file).duration <= self.max_seconds
        ]


def connected(keys: Sequence[Sequence[str]]) -> list[int]:
    """The group of each item: items that share one of their keys are in the same group.

    >>> connected([("a", "b"), ("c", "d"), ("e", "b"), ("f", "d")])
    [0, 1, 0, 1]
    """
    parents = list(range(len(keys)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first: dict[tuple[int, str], int] = {}
    for index, parts in enumerate(keys):
        for key in enumerate(parts):
            other = first.setdefault(key, index)
            low, high = sorted((root(index), root(other)))
            parents[high] = low
    return [root(index) for index in range(len(keys))]
