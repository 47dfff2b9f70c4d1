"""`diffmm validate RUN --data FOLDER` for a contrastive model: classes by the names of folders."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffmm.checkpoint_folders import find_state
from diffmm.recipes.errors import refusing, warn

SPLITS = {"train", "val", "validation", "test"}
"""Names of folders that are not classes if there are no others."""

CONTRASTIVE = "diffmm.models.ContrastiveModel"


def class_folders(path: str) -> list[Path]:
    """The folders of classes in a folder that contains nothing else; empty for other paths, for
    splits (`train`, `val`), and if there are texts beside the images or sounds."""
    folder = Path(path)
    if not folder.is_dir():
        return []
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if not all(entry.is_dir() for entry in entries) or {e.name for e in entries} <= SPLITS:
        return []
    files = (file for entry in entries for file in entry.iterdir())
    return [] if any(file.suffix.lower() == ".txt" for file in files) else entries


def is_zero_shot(weights: str, path: str) -> bool:
    """Whether the model of a run knows no classes, but is to be validated on a folder of them.

    Raises:
        InputError: If the weights cannot be read.
    """
    from diffmm.models.weights import load_description

    if not class_folders(path):
        return False
    with refusing():
        description = load_description(find_state(Path(weights), warn=warn))
    return description is not None and description["class_path"] == CONTRASTIVE


def validate_zero_shot(
    weights: str, path: str, templates: Sequence[str] | None, output: Path | None
) -> int:
    """Classify the files of every class by the names of the folders; print accuracy, that of each
    class, and a confusion matrix.

    Args:
        weights: A run or a file of weights.
        path: A folder with one folder per class.
        templates: As in `TrainedModel.zero_shot`; its default by default.
        output: File for the results, as of `diffmm validate`.

    Raises:
        InputError: If a file cannot be read, or a class has none.
    """
    import torch

    from diffmm.cli.evaluate import report
    from diffmm.hub.trained import load

    folders = class_folders(path)
    names = [folder.name for folder in folders]
    given: dict[str, Any] = {} if templates is None else {"templates": templates}
    matrix = torch.zeros(len(names), len(names), dtype=torch.long)
    with refusing():
        trained = load(find_state(Path(weights), warn=warn), device="auto")
        classifier = trained.zero_shot_classifier(names, **given)
        for number, folder in enumerate(folders):
            for prediction in classifier.stream([folder], top_k=1):
                matrix[number, names.index(prediction.label)] += 1
    accuracy = matrix.diagonal().sum().item() / matrix.sum().item()
    print(f"zero-shot accuracy on {path}: {accuracy:.4g} ({matrix.sum().item():,} files)")
    task = SimpleNamespace(
        job=SimpleNamespace(class_names=names), details={"confusion_matrix": matrix}
    )
    report([{"zero_shot/accuracy": accuracy}], task, output)
    return 0
