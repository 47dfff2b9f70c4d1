"""`diffmm validate WEIGHTS --data DATA` for a classifier in no run, such as a converted one."""

from dataclasses import replace
from pathlib import Path

from diffmm.cli.zero_shot import class_folders
from diffmm.recipes.errors import InputError, refusing
from diffmm.recipes.importing import importing


def evaluate_weights(
    verb: str, weights: str, path: str, output: Path | None, *, sorted_classes: bool = False
) -> int:
    """Evaluate a classifier on labeled data, with the preprocessing and the classes of its file.

    Args:
        verb: `"validate"` or `"test"`, the split to evaluate if the data have several.
        weights: A file of weights or its folder, or the name of a repository on the Hugging Face
            hub.
        path: A folder with one folder per class, or a CSV file of files and labels.
        output: File for the results, as of `diffmm validate`.
        sorted_classes: Whether the folders, sorted by name, are the model's classes in order, as
            ImageNet's are, instead of their names.

    Raises:
        InputError: If the weights or the data cannot be read, or the weights are not those of a
            classifier, or do not say what its classes are or how its inputs are prepared.
    """
    with importing():
        from lightning.pytorch import Trainer

        from diffmm.cli.evaluate import report
        from diffmm.cli.weights_data import labelled_data
        from diffmm.hub.loading import load
        from diffmm.recipes.trainer import silence_noise
        from diffmm.training import Classification, OptimizerConfig, ScheduleConfig
        from diffmm.training.lightning_internals import leave_signals_alone

    silence_noise()
    with refusing():
        trained = load(weights)
        reader, split = trained.reader, "test" if verb == "test" else "val"
        names = trained.job.class_names
        if sorted_classes:
            names = sorted_names(path, split, len(trained.class_names))
        if names is None or reader.data_class is None:
            raise InputError(
                f"--data {path}: {weights} does not name the classes of its model, with which the "
                f"labels are matched: if the folders in alphabetical order are its classes, add "
                f"--sorted-classes"
            )
        data, summary = labelled_data(trained, path, names, split)
    print(f"data: {summary}", flush=True)
    task = Classification(
        trained.model,
        OptimizerConfig(learning_rate=1e-3),  # not used
        ScheduleConfig(total_steps=1),  # not used
        multi_label=bool(trained.job.multi_label),
    )
    task.job = replace(trained.job, class_names=names)
    task.measure_classes()
    trainer = Trainer(accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
    leave_signals_alone(trainer)
    with refusing():
        results = getattr(trainer, verb)(task, datamodule=data)
    report(results, task, output)
    return 0


def sorted_names(path: str, split: str, num_classes: int) -> tuple[str, ...]:
    """The names of the folders of classes, sorted.

    Raises:
        InputError: If they are not as many as the model's classes.
    """
    names = tuple(folder.name for folder in class_folders(path, split))
    if len(names) != num_classes:
        raise InputError(
            f"--sorted-classes: {path} has {len(names)} folders of classes, but the model has "
            f"{num_classes} classes"
        )
    return names
