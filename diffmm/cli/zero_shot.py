"""`diffmm validate RUN --data FOLDER` for a contrastive model: classes by the names of folders."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffmm.checkpoint_folders import find_state
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

NOT_OF_CLASSES = (".txt", ".csv", ".tsv", ".tar")
"""Extensions of files that have texts of their own."""

CONTRASTIVE = "diffmm.models.ContrastiveModel"


def class_folders(path: str | Path, split: str) -> list[Path]:
    """The folders of classes in a folder that contains nothing else, or in that of a split in it;
    empty for other paths, and if there are texts beside the images or sounds, at any depth.

    Args:
        path: The folder.
        split: `"val"` or `"test"`.
    """
    folder = Path(path)
    if not folder.is_dir():
        return []
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if not all(entry.is_dir() for entry in entries):
        return []
    if all(entry.name.lower() in SPLITS for entry in entries):
        splits = [entry for entry in entries if SPLITS[entry.name.lower()] == split]
        return class_folders(splits[0], split) if len(splits) == 1 else []
    files = (name for entry in entries for *_, names in os.walk(entry) for name in names)
    has_texts = any(
        name.lower().endswith(NOT_OF_CLASSES) and not name.startswith(".") for name in files
    )
    return [] if has_texts else entries


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
