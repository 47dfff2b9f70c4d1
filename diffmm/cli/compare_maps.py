"""Attention maps of several runs, where their checkpoints and data allow them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffmm.analysis.exhibits import Exhibit
    from diffmm.runs.summaries import Summary

MOST_RUNS = 6
"""Maximum number of runs whose attention maps are shown."""
NUM_CLASSES = 3
"""Number of classes, of each of which one sample is shown."""
NUM_BATCHES = 20
"""Maximum number of batches that are searched for samples."""
NUM_TOKENS = 128
OWN_TO_A_RUN = ("data.seed", "data.batch_size", "data.num_workers")
"""Settings of the data that do not affect the content of samples."""


def exhibits_of(runs: Sequence["Summary"]) -> "tuple[list[Exhibit], str]":
    """Return samples with the attention maps of all runs, by the number of the run from 1, or the
    reason why there are none."""
    if len(runs) > MOST_RUNS:
        return [], f"they are drawn for up to {MOST_RUNS} runs"
    data_settings = [
        {
            name: value
            for name, value in run.resolved.items()
            if name.startswith("data.") and name not in OWN_TO_A_RUN
        }
        for run in runs
    ]
    if any(settings != data_settings[0] for settings in data_settings):
        return [], "the runs have different data"
    from diffmm.models.weights import load_model

    try:
        models = {str(n): load_model(run.path) for n, run in enumerate(runs, start=1)}
        return _exhibits(models, validation_data(runs[0].values, runs[0].path)), ""
    except (ValueError, OSError) as error:
        return [], " ".join(str(error).split()).rstrip(".")


def validation_data(
    values: Mapping[str, Any],
    run_dir: Path,
    *,
    trust: bool = False,
    prepare: Callable[[Any], object] = lambda data: None,
) -> Any:
    """The data of a recipe, ready for validation in this process.

    Args:
        values: Values of the recipe.
        run_dir: Directory of its run.
        trust: Whether to import and call classes outside the library.
        prepare: Called with the data before they are set up.

    Raises:
        ValueError, OSError: If the data are missing, or need code that is not trusted.
    """
    from diffmm.recipes.mistakes import find_mistakes, make_data

    values = {**values, "run_dir": str(run_dir)}
    if mistakes := find_mistakes(values, trust=trust).mistakes:
        raise ValueError(mistakes[0])
    data: Any = make_data(values, trust=trust)
    data.num_workers = 0
    prepare(data)
    data.setup("validate")
    return data


def _exhibits(models: Mapping[str, Any], data: Any) -> "list[Exhibit]":
    """Return attention maps of the models for some samples of the validation data."""
    from diffmm.analysis.exhibits import (
        Exhibit,
        Pieces,
        image_exhibit,
        sound_exhibit,
        text_exhibit,
    )
    from diffmm.models import AudioModel, ImageModel, TextModel

    kinds = {type(model) for model in models.values()}
    if len(kinds) > 1:
        raise ValueError("the runs have models of different kinds")
    (kind,) = kinds
    batches = islice(iter(data.val_dataloader()), NUM_BATCHES)
    if kind is TextModel:
        if not all(model.config.causal for model in models.values()):
            raise ValueError("they are drawn for causal text models")
        tokens = next(batches)["tokens"][0][: NUM_TOKENS + 1]
        pieces = Pieces(data.tokenizer)
        return [text_exhibit(models, tokens[:-1], int(tokens[-1]), pieces)]
    if kind not in (ImageModel, AudioModel) or not all(m.num_classes for m in models.values()):
        raise ValueError(f"they are drawn for classifiers and decoders, not for {kind.__name__}")
    names = data.class_names
    shown: list[Exhibit] = []
    for batch, i, label in _firsts(batches):
        if kind is ImageModel:
            shown.append(image_exhibit(models, batch["images"][i], label, names))
        else:
            waveform = batch["waveforms"][i, : batch["num_samples"][i]]
            shown.append(sound_exhibit(models, waveform, label, names))
    return shown


def _firsts(batches: Any) -> list[tuple[Any, int, int]]:
    """Return batch, row and class of the first sample of each of several classes."""
    found: dict[int, tuple[Any, int, int]] = {}
    for batch in batches:
        if batch["labels"].dim() > 1:
            raise ValueError("they are drawn for one class per sample")
        for i, label in enumerate(batch["labels"].tolist()):
            found.setdefault(label, (batch, i, label))
        if len(found) >= NUM_CLASSES:
            break
    return [found[label] for label in sorted(found)[:NUM_CLASSES]]
