"""Folders of image or sound files with texts in files or in their names."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from datamodules.pairs.sources import (
    Media,
    Medium,
    Pairs,
    PairSource,
    PairSplits,
    check_apart,
    hold_out_groups,
)
from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.files import composed, list_files, read_lines
from diffmm.checks import DataError, check_choice

_logger = logging.getLogger(__name__)

TEXT_EXTENSION = ".txt"


class PairFolder(PairSource):
    """Image or sound files at any depth, each with a text file of the same name beside it:
    `train/dog.jpg` and `train/dog.txt` (or `dog.TXT`), with one text per line.

    Hidden files and folders are skipped.

    Args:
        train: Folder of the training pairs and, without `val`, of the validation pairs.
        val: Folder of the validation pairs.
        test: Folder of the test pairs; the validation pairs by default.
        texts: `"files"` for text files; `"names"` if the name of a file is its text, as in
            collections of clip art, without a number at its end (`flying_goose_02.png`);
            `"folders"` if the name of its folder is, as in folders of classes. Underscores and
            hyphens in names are spaces.
        template: The text of a name, in which `{}` stands for it, such as `"a photo of a {}."`.
        val_fraction: Without `val`, the fraction of files to hold out, the same in every run. With
            `texts="names"`, files of the same text are held out together.

    Raises:
        ValueError: If `texts` is unknown, or `template` has no `{}` or is set for text files.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        *,
        texts: Literal["files", "names", "folders"] = "files",
        template: str = "{}",
        val_fraction: float = 0.1,
    ) -> None:
        check_choice("texts", texts, ("files", "names", "folders"))
        if "{}" not in template or (texts == "files" and template != "{}"):
            raise ValueError(
                f"template must contain {{}} and needs texts 'names' or 'folders', got "
                f"{template!r} for texts {texts!r}"
            )
        self.train = train
        self.val = val
        self.test = test
        self.texts = texts
        self.template = template
        self.val_fraction = val_fraction

    def splits(self, medium: Medium[Media]) -> PairSplits[Media]:
        train = self._files(self.train, medium)
        if self.val is None:
            groups = [
                text_of_name(each.media) if self.texts == "names" else str(_stem(each.media))
                for each in train
            ]
            kept, held_out = hold_out_groups(groups, self.val_fraction)
            train, val = [train[i] for i in kept], [train[i] for i in held_out]
        else:
            val = self._files(self.val, medium)
            _check_apart(train, val, "val")
        kept_pairs, held_out_pairs = self._pairs(train, medium), self._pairs(val, medium)
        if self.test is None:
            return PairSplits(kept_pairs, held_out_pairs, held_out_pairs)
        test = self._files(self.test, medium)
        _check_apart(train, test, "test")
        return PairSplits(kept_pairs, held_out_pairs, self._pairs(test, medium))

    def all_pairs(self, medium: Medium[Media]) -> Pairs[Media]:
        """All pairs of `train`, without splitting them.

        Raises:
            FileNotFoundError, ValueError: As `splits`.
        """
        return self._pairs(self._files(self.train, medium), medium)

    def _pairs(self, files: "list[Described]", medium: Medium[Media]) -> Pairs[Media]:
        media = [each.media for each in files]
        if self.texts == "files":
            texts = TextFiles([each.text for each in files if each.text is not None])
            return Pairs(medium.of_files(media), texts)
        text_of = text_of_name if self.texts == "names" else text_of_folder
        names = [[self.template.replace("{}", text_of(file))] for file in media]
        return Pairs(medium.of_files(media), names)

    def _files(self, folder: str, medium: Medium[Media]) -> "list[Described]":
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"folder {folder} does not exist")
        files = list_files(folder, (*medium.extensions, TEXT_EXTENSION))
        media = [file for file in files if file.suffix.lower() != TEXT_EXTENSION]
        if not media:
            raise ValueError(
                f"{folder} has no {medium.noun} (files ending in {', '.join(medium.extensions)})"
            )
        loose = [file for file in media if file.parent == Path(folder)]
        if loose and self.texts == "folders":
            raise ValueError(
                f"{len(loose):,} {medium.noun} in {folder} are in no folder that could name them, "
                f"such as {loose[0].name}"
            )
        # Of `dog.TXT` and `dog.txt`, the last in order is used: the latter.
        texts = {_key(file): file for file in files if file.suffix.lower() == TEXT_EXTENSION}
        found = [Described(file, texts.get(_key(file))) for file in media]
        missing = [each.media for each in found if each.text is None]
        if missing and self.texts == "files":
            raise ValueError(
                f"{len(missing):,} of the {len(media):,} {medium.noun} in {folder} have no text "
                f"file, such as {missing[0]}: write {missing[0].stem}{TEXT_EXTENSION} beside it, "
                f"or set --data.source.texts to names or folders, if the texts are their names"
            )
        if self.texts == "files" and (alone := texts.keys() - set(map(_key, media))):
            _logger.warning(
                "%s of the %s text files in %s are left out, because no %s is beside them, such "
                "as %s",
                *(f"{len(alone):,}", f"{len(texts):,}", folder, medium.noun[:-1]),
                min(texts[key] for key in alone),
            )
        return found


class Described(NamedTuple):
    """An image or sound file, and the text file beside it, if there is one."""

    media: Path
    text: Path | None


class TextFiles(Sequence[list[str]]):
    """The lines of text files, read on access.

    Access raises `BadSampleError` if a text file cannot be read or has no text.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[list[str]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> list[str]:  # type: ignore[override]
        path = self.files[index]
        try:
            lines = [line.strip() for line in read_lines(path, "text file")]
        except (DataError, FileNotFoundError) as error:
            raise BadSampleError(str(error)) from error
        if texts := [line for line in lines if line]:
            return texts
        raise BadSampleError(f"text file {path} is empty")


def text_of_name(file: Path) -> str:
    """The text in the name of a file; see `PairFolder`.

    >>> text_of_name(Path("birds/Flying_goose-02.png"))
    'Flying goose'
    """
    words = _words(file.stem)
    return re.sub(r"(?<=\D) ?\d+$", "", words).strip() or words


def text_of_folder(file: Path) -> str:
    """The text in the name of a file's folder; see `PairFolder`.

    >>> text_of_folder(Path("dogs/golden_retriever/1.jpg"))
    'golden retriever'
    """
    return _words(file.parent.name)


def _stem(file: Path) -> Path:
    return file.with_suffix("")


def _key(file: Path) -> str:
    """What an image or sound and its text file have in common, whichever form of Unicode the
    programs that wrote them use for accents."""
    return composed(str(_stem(file)))


def _check_apart(train: "list[Described]", others: "list[Described]", split: str) -> None:
    check_apart([each.media for each in train], [each.media for each in others], split)


def _words(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", composed(name)).strip()
