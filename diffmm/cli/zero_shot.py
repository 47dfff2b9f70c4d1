"""`diffmm validate RUN --data FOLDER` for a contrastive model: classes by the names of folders."""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffmm.checkpoint_folders import find_state
from diffmm.checks import is_hidden_name
from diffmm.recipes.errors import refusing, warn
from diffmm.recipes.importing import importing

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Names of folders that are not classes if there are no others, and the splits they stand for."""

NOT_OF_CLASSES = (".csv", ".tsv", ".tar")
"""Extensions of files that have texts of their own."""

TEXT = ".txt"
"""Extension of text files beside images or sounds."""

CONTRASTIVE = "diffmm.models.ContrastiveModel"


def class_folders(path: str | Path, split: str) -> list[Path]:
    """The folders of classes in a folder, or in that of a split in it.

    Hidden files and folders are skipped, and so are files beside the folders that are of no kind
    found in them. The result is empty for other paths, and if there are texts: tables or shards, a
    text file beside an image or sound of its name, or a folder of nothing else.

    Args:
        path: The folder.
        split: `"val"` or `"test"`.
    """
    folder = Path(path)
    if not folder.is_dir():
        return []
    entries = sorted(entry for entry in folder.iterdir() if not is_hidden_name(entry.name))
    folders = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if not entry.is_dir()]
    if folders and all(entry.name.lower() in SPLITS for entry in folders):
        splits = [entry for entry in folders if SPLITS[entry.name.lower()] == split]
        return class_folders(splits[0], split) if len(splits) == 1 else []
    inside = [list(_walk(entry)) for entry in folders]
    kinds = [{path.suffix.lower() for path in paths} for paths in inside]
    if {TEXT} in kinds or any(map(_has_texts, [loose, *inside])):
        return []
    media = set().union(*kinds) - {TEXT}
    return [] if any(path.suffix.lower() in media for path in loose) else folders


def _walk(folder: Path) -> Iterator[Path]:
    """The files in a folder at any depth, without hidden ones."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden_name(name)]
        yield from (Path(parent, name) for name in names if not is_hidden_name(name))


def _has_texts(paths: Sequence[Path]) -> bool:
    """Whether there are tables or shards, or text files beside other files of their names."""
    if any(path.suffix.lower() in NOT_OF_CLASSES for path in paths):
        return True
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for path in paths:
        name = unicodedata.normalize("NFC", str(path.with_suffix("")))
        names[path.suffix.lower() == TEXT].add(name)
    return not names[True].isdisjoint(names[False])


def is_zero_shot(weights: str, path: str, split: str) -> bool:
    """Whether the model of a run knows no classes, but is to be evaluated on a folder of them.

    Raises:
        InputError: If the weights cannot be read.
    """
    from diffmm.models.weights import load_description

    if not class_folders(path, split):
        return False
    with refusing():
        description = load_description(find_state(Path(weights), warn=warn))
    return description is not None and description["class_path"] == CONTRASTIVE


def validate_zero_shot(
    weights: str, path: str, split: str, templates: Sequence[str] | None, output: Path | None
) -> int:
    """Classify the files of every class by the names of the folders, in which underscores are
    spaces; print accuracy, that of each class, and a confusion matrix.

    Args:
        weights: A run or a file of weights.
        path: A folder with one folder per class.
        split: The split to evaluate if there are such folders for each.
        templates: As in `TrainedModel.zero_shot`; its default by default.
        output: File for the results, as of `diffmm validate`.

    Raises:
        InputError: If a file cannot be read, or a class has none.
    """
    with importing():
        import torch

        from diffmm.cli.evaluate import report
        from diffmm.hub.loading import load

    folders = class_folders(path, split)
    names = [folder.name.replace("_", " ").strip() for folder in folders]
    given: dict[str, Any] = {} if templates is None else {"templates": templates}
    matrix = torch.zeros(len(names), len(names), dtype=torch.long)
    with refusing():
        trained = load(find_state(Path(weights), warn=warn), device="auto")
        classifier = trained.zero_shot_classifier(names, **given)
        for number, folder in enumerate(folders):
            for prediction in classifier.stream([folder], top_k=1):
                matrix[number, names.index(prediction.label)] += 1
    accuracy = matrix.diagonal().sum().item() / matrix.sum().item()
    print(
        f"zero-shot accuracy on {folders[0].parent}: {accuracy:.4g} ({matrix.sum().item():,} files)"
    )
    task = SimpleNamespace(
        job=SimpleNamespace(class_names=names), details={"confusion_matrix": matrix}
    )
    report([{"zero_shot/accuracy": accuracy}], task, output)
    return 0
