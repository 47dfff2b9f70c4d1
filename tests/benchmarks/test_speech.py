"""The folder of recorded speech: a sentence is never in both splits, in any language."""

import gzip

import numpy as np
import pytest
import soundfile

from benchmarks import speech
from datamodules.audio import SoundFolder

TEXTS = {f"prompt{number}": f"Sentence number {number}." for number in range(40)}
# The same sentences under other names.
TEXTS |= {f"vm/again{number}": f"sentence  NUMBER {number}" for number in range(40)}


@pytest.fixture
def installed(tmp_path):
    lines = ["; a comment", "", *(f"{name}: {text}" for name, text in TEXTS.items())]
    lines += ["beep: [this is a beep tone]", "short: Short."]
    (tmp_path / "texts.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for number, language in enumerate(speech.LANGUAGES):
        for name in (*TEXTS, "beep", "short", "unknown"):
            path = tmp_path / language / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            seconds = 0.1 if name == "short" else 1.0
            tone = 0.3 * np.sin(np.arange(int(8000 * seconds)) * (0.1 + 0.1 * number))
            soundfile.write(path, tone, 8000)
    return tmp_path


def test_sentences_do_not_straddle_the_splits(installed, capsys):
    folder = installed / "speech"
    given = ["--sounds", str(installed), "--transcripts", str(installed / "texts.gz")]
    speech.main([str(folder), *given, "--max-seconds", "0.5"])
    held = {}
    for path in folder.rglob("*.ogg"):
        split, language, name = path.relative_to(folder).parts
        held.setdefault((split, language), set()).add(name.removesuffix(".ogg"))
    train, val = (held[split, "en"] for split in ("train", "val"))
    assert all(held["train", language] == train for language in speech.LANGUAGES)
    assert all(held["val", language] == val for language in speech.LANGUAGES)
    assert len(train | val) == 80
    assert 4 <= len(val) <= 32
    assert all((f"vm_again{number}" in val) == (f"prompt{number}" in val) for number in range(40))
    assert f"{5 * len(train)} clips for training, {5 * len(val)} for" in capsys.readouterr().out

    splits = SoundFolder(str(folder / "train"), str(folder / "val")).splits()
    assert list(splits.class_names) == list(speech.LANGUAGES)
    clip = splits.train.read(0)
    assert len(clip) == 4000
    assert 0.25 < np.abs(clip).max() < 0.35
    with pytest.raises(SystemExit, match="exists already: choose another folder"):
        speech.main([str(folder), *given])


def test_what_is_missing_is_named(installed):
    folder, texts = installed / "speech", installed / "texts.gz"
    with pytest.raises(SystemExit, match="none does not exist: install asterisk-core-sounds-en"):
        speech.make_speech(folder, installed, installed / "none")
    (installed / "ru").rename(installed / "uk")
    with pytest.raises(SystemExit, match="ru does not exist: install asterisk-core-sounds-ru-wav"):
        speech.make_speech(folder, installed, texts)
    assert not folder.exists()
    texts.write_text("; nothing")
    with pytest.raises(SystemExit, match="has no transcripts"):
        speech.make_speech(folder, installed, texts)
