"""Emoji and spoken prompts, in the files of Debian's packages."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from datamodules import AudioTextData
from datamodules.pairs import ClipArt, Emoji, SpokenPrompts
from datamodules.pairs import emoji as emoji_module
from datamodules.pairs.audio_text import Sounds
from datamodules.pairs.clip_art import group_of as group_of_title
from datamodules.pairs.emoji import group_of
from datamodules.pairs.image_text import Images
from datamodules.pairs.prompts import connected, spoken

XML = """<?xml version="1.0" encoding="UTF-8" ?>
<!DOCTYPE ldml SYSTEM "../../common/dtd/ldml.dtd">
<!-- Copyright © 1991-2022 Unicode, Inc. -->
<ldml>
\t<identity>
\t\t<version number="$Revision$"/>
\t\t<language type="en"/>
\t</identity>
\t<annotations>
{}
\t</annotations>
</ldml>
"""


def write_annotations(folder: Path, language: str, plain, derived):
    for name, entries in (("annotations", plain), ("annotationsDerived", derived)):
        lines = []
        for each, label, keywords in entries:
            lines += [
                f'\t\t<annotation cp="{each}">{keywords}</annotation>',
                f'\t\t<annotation cp="{each}" type="tts">{label}</annotation>',
            ]
        path = folder / name / f"{language}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(XML.format("\n".join(lines)), encoding="utf-8")


@pytest.fixture
def cldr(tmp_path):
    animals = [(chr(0x1F400 + n), f"animal {n}", f"beast | no. {n}") for n in range(20)]
    others = [("{", "open curly bracket", "brace"), ("→", "right arrow", "arrow")]
    thumbs = [("👍", "thumbs up", "hand | up")]
    tones = [(f"👍{tone}", f"thumbs up: {tone}", "hand") for tone in "🏻🏼🏽🏾🏿"]
    write_annotations(tmp_path, "en", animals + others + thumbs, tones)
    tiere = [(chr(0x1F400 + n), f"Tier {n}", "Tier") for n in range(10)]
    write_annotations(tmp_path, "de", [*tiere, ("👍", "↑↑↑", "↑↑↑")], [])
    return tmp_path


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A font that seems to have every character but arrows."""
    path = tmp_path / "font.ttf"
    path.write_bytes(b"a font")
    monkeypatch.setattr(emoji_module, "is_drawn", lambda font, each: each != "→")
    return str(path)


def test_emoji_have_names_in_every_language_and_keywords(cldr, drawn):
    source = Emoji(["en", "de"], font=drawn, annotations=str(cldr), val_fraction=0.2)
    splits = source.splits(Images())
    texts = {
        name: dict(zip(pairs.media.emoji, pairs.texts, strict=True))
        for name, pairs in vars(splits).items()
    }
    everything = texts["train"] | texts["val"] | texts["test"]
    assert len(everything) == sum(map(len, texts.values())) == 26
    for number in range(20):
        found = everything[chr(0x1F400 + number)]
        names = [f"animal {number}", *([f"Tier {number}"] if number < 10 else [])]
        more = [f"beast, no. {number}", *(["Tier"] if number < 10 else [])]
        is_trained = chr(0x1F400 + number) in texts["train"]
        assert found == names + (more if is_trained else [])
    (where,) = {name for name, each in texts.items() for e in each if e.startswith("👍")}
    assert sum(e.startswith("👍") for e in texts[where]) == 6
    assert everything["👍"][0] == "thumbs up"
    plain = Emoji(font=drawn, annotations=str(cldr), skin_tones=False, keywords=False)
    splits = plain.splits(Images())
    assert sum(len(pairs) for pairs in vars(splits).values()) == 21
    assert all(len(texts) == 1 for texts in splits.train.texts)


@pytest.mark.parametrize(
    "variants",
    ["👍👍🏽", "👨👩🧑👩🏿", "🤴👸🫅"],
)
def test_variants_are_one_group(variants):
    parts = [variants[0]]
    for character in variants[1:]:
        if character in "🏻🏼🏽🏾🏿":
            parts[-1] += character
        else:
            parts.append(character)
    assert len({group_of(part) for part in parts}) == 1


@pytest.mark.parametrize(
    "variants",
    [
        ("👩🏽‍🚀", "👨🏿‍🚀", "🧑‍🚀"),
        ("🧔", "🧔‍♂", "🧔🏾‍♀️"),
        ("👪", "👨‍👩‍👧", "👩‍👩‍👧‍👦"),
        ("💏", "👩🏻‍❤️‍💋‍👨🏿"),
        ("👭", "🧑🏻‍🤝‍🧑🏿", "👫🏽"),
        ("🤝", "🫱🏻‍🫲🏿"),
    ],
)
def test_joined_variants_are_one_group(variants):
    assert len({group_of(each) for each in variants}) == 1
    assert group_of(variants[0]) not in {
        group_of(each) for each in ("👍", "🧑‍🚒", "🐀", "🏻", "🏽")
    }


@pytest.mark.skipif(not Path(emoji_module.FONT).is_file(), reason="needs fonts-noto-color-emoji")
def test_emoji_are_drawn_in_color():
    font = emoji_module.FONT
    assert emoji_module.is_drawn(font, "👩🏽‍🚀")
    assert not emoji_module.is_drawn(font, "→")
    assert not emoji_module.is_drawn(font, "🐀🐀")
    red, green = (
        np.asarray(emoji_module.DrawnEmoji([each], font).read(0)).astype(int) for each in "🔴🟢"
    )
    assert red.shape == (136, 136, 3)
    assert red[68, 68, 0] > 2 * red[68, 68, 1]
    assert green[68, 68, 1] > green[68, 68, 0]
    assert (red[0, 0] == 255).all()


def test_what_is_missing_for_emoji_is_named(cldr, drawn, tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="none.ttf does not exist: install fonts-noto-color"
    ):
        Emoji(font="none.ttf", annotations=str(cldr)).splits(Images())
    with pytest.raises(FileNotFoundError, match="install unicode-cldr-core, or set"):
        Emoji(font=drawn, annotations=str(tmp_path / "none")).splits(Images())
    with pytest.raises(FileNotFoundError, match=r"dee.xml .* another language; did you mean 'de'"):
        Emoji(["dee"], font=drawn, annotations=str(cldr)).splits(Images())
    with pytest.raises(ValueError, match="languages must be a list of at least one, got 'en'"):
        Emoji("en")
    with pytest.raises(ValueError, match=r"below 1 together, got 0.5 and 0.5"):
        Emoji(val_fraction=0.5, test_fraction=0.5)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"font.ttf is not a font of bitmaps of 109 points"):
        Emoji(font=drawn, annotations=str(cldr)).splits(Images())
    (cldr / "annotations/en.xml").write_text("<ldml>")
    with pytest.raises(ValueError, match="en.xml is not an XML file"):
        Emoji(font=drawn, annotations=str(cldr)).splits(Images())


def draw_clip_art(path, title=None, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    if title is not None:
        text.add_text("Title", title)
    Image.new("RGBA", (6, 4), (200, 0, 0, 0)).save(path, pnginfo=text, **settings)


@pytest.fixture
def clip_art(tmp_path):
    """Sixteen pictures of twelve titles, and some that are left out."""
    words = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay"]
    for number, word in enumerate(words):
        draw_clip_art(tmp_path / "animals" / "some_birds" / f"{number}.png", f"{word}_no. {number}")
    for number in range(3):
        draw_clip_art(tmp_path / "food" / f"cake{number}.png", f"Red  Cake {number}")
        draw_clip_art(tmp_path / f"top{number}.png", f"Caf&eacute;-{number}")
    for number in range(4):
        draw_clip_art(tmp_path / "themes" / f"{number}.png", f"A theme {number}")
    draw_clip_art(tmp_path / "untitled.png")
    draw_clip_art(tmp_path / "number.png", "007")
    (tmp_path / "link.png").symlink_to(tmp_path / "top0.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def test_clip_art_is_held_out_by_title(clip_art):
    splits = ClipArt(root=str(clip_art), val_fraction=0.25, test_fraction=0.25).splits(Images())
    found = {
        name: dict(zip(pairs.media.paths, pairs.texts, strict=True))
        for name, pairs in vars(splits).items()
    }
    assert sum(map(len, found.values())) == 16
    titles = [{group_of_title(texts[0]) for texts in each.values()} for each in found.values()]
    assert sum(map(len, titles)) == len(set.union(*titles)) == 12
    assert [len(each) for each in titles] == [6, 3, 3]
    for name, each in found.items():
        for path, texts in each.items():
            folders = {"some_birds": "animals, some birds", "food": "food"}.get(path.parent.name)
            assert texts[1:] == ([folders] if folders and name == "train" else [])
    everything = {path.name: texts[0] for each in found.values() for path, texts in each.items()}
    assert everything["0.png"] == "ant no. 0"
    assert everything["cake1.png"] == "Red Cake 1"
    assert everything["top2.png"] == "Café-2"
    # Transparent pixels are white.
    assert np.asarray(splits.val.media.read(0)).min() == 255
    more = ClipArt(root=str(clip_art), categories=False, most_alike=4).splits(Images())
    assert sum(map(len, vars(more).values())) == 20
    assert all(len(texts) == 1 for texts in more.train.texts)


def test_what_is_missing_for_clip_art_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none does not exist: install openclipart-png"):
        ClipArt(root=str(tmp_path / "none")).splits(Images())
    draw_clip_art(tmp_path / "untitled.png")
    with pytest.raises(ValueError, match="has no PNG files with titles: set --data.source.root"):
        ClipArt(root=str(tmp_path)).splits(Images())
    with pytest.raises(ValueError, match="most_alike must be .*, got 0"):
        ClipArt(most_alike=0)
    with pytest.raises(ValueError, match=r"below 1 together, got 0.9 and 0.1"):
        ClipArt(val_fraction=0.9)


@pytest.fixture
def prompts(tmp_path):
    """Twenty prompts in two languages, some of them equal."""
    texts = {f"p{n}": f"Prompt, number {n}!" for n in range(20)}
    texts |= {f"digits/again{n}": f"prompt number  {n}." for n in range(5)}
    french = {name: text.replace("Prompt", "Phrase") for name, text in texts.items()}
    for language, each, notes in (
        (
            "en",
            texts,
            ["beep: [a beep]", "letters/at: at [@]", "odd: You [now] know", "long: Long."],
        ),
        ("fr", french, ["other: Phrase, number 3", "for: Pour (emphase)"]),
    ):
        lines = [
            "\ufeff; Core sounds",
            "",
            *(f"{name}: {text}" for name, text in each.items()),
            *notes,
        ]
        path = tmp_path / f"core-sounds-{language}.txt.gz"
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
        for name in (*each, "beep", "letters/at", "odd", "long", "other", "for", "silence/1"):
            path = tmp_path / language / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.full(24000 if name == "long" else 800, 0.1), 8000)
    return tmp_path


def spoken_prompts(folder, **arguments):
    return SpokenPrompts(
        folder=str(folder), transcripts=f"{folder}/core-sounds-{{language}}.txt.gz", **arguments
    )


def test_prompts_are_held_out_by_sentence_in_all_languages(prompts):
    source = spoken_prompts(prompts, languages=["en", "fr"], max_seconds=2.0, val_fraction=0.3)
    splits = source.splits(Sounds())
    found = {
        name: [
            (path.parent.name, path.stem, texts[0])
            for path, texts in zip(p.media.paths, p.texts, strict=True)
        ]
        for name, p in vars(splits).items()
    }
    everything = [each for part in found.values() for each in part]
    assert len(everything) == 25 + 1 + 25 + 2
    assert {"at", "pour", "prompt number 7", "phrase number 7"} < {text for *_, text in everything}
    assert not {"beep", "odd", "long"} & {name for _, name, _ in everything}
    numbers = [{text.split()[-1] for *_, text in part} for part in found.values()]
    assert not numbers[0] & numbers[1]
    assert not numbers[0] & numbers[2]
    assert all(numbers)
    written = spoken_prompts(prompts, normalize=False).splits(Sounds())
    assert ["Prompt, number 7!"] in [*written.train.texts, *written.val.texts, *written.test.texts]
    data = AudioTextData(source, sample_rate_hz=8000, batch_size=4)
    data.setup()
    assert next(iter(data.train_dataloader()))["waveforms"].shape == (4, 800)


def test_notes_are_not_spoken():
    assert spoken("Pour (emphase)") == "Pour"
    assert spoken("Точка [.].") == "Точка"
    assert spoken("Sus saludos [temporales] estan") == ""
    assert spoken("<beep ascending>") == ""


def test_items_that_share_a_key_are_connected():
    assert connected([("a", "x"), ("b", "y"), ("c", "x"), ("b", "z"), ("d", "z")]) == [
        0,
        1,
        0,
        1,
        1,
    ]


def test_what_is_missing_for_prompts_is_named(prompts):
    with pytest.raises(FileNotFoundError, match="does not exist: install asterisk-core-sounds-it,"):
        spoken_prompts(prompts, languages=["it"]).splits(Sounds())
    (prompts / "fr").rename(prompts / "french")
    with pytest.raises(FileNotFoundError, match="fr does not exist: install .*-fr-wav"):
        spoken_prompts(prompts, languages=["fr"]).splits(Sounds())
    with pytest.raises(ValueError, match="languages must be one of .*, got 'de'"):
        SpokenPrompts(["de"])
    with pytest.raises(ValueError, match="has no prompt of at most 0.01 seconds"):
        spoken_prompts(prompts, max_seconds=0.01).splits(Sounds())
