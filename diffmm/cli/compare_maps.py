"""Attention maps of several runs, where their checkpoints and data allow them."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmm.batch import size_of
from diffmm.recipes.importing import importing

if TYPE_CHECKING:
    from diffmm.analysis.exhibits import Exhibit
    from diffmm.runs.summaries import Summary

MOST_RUNS = 6
"""Maximum number of runs whose attention maps are shown."""
NUM_CLASSES = 3
"""Number of classes, of each of which one sample is shown; or of samples without classes."""
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
        return drawn_samples(models, validation_data(runs[0].values, runs[0].path)), ""
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
    with importing():
        from diffmm.recipes.mistakes import find_mistakes, make_data

    values = {**values, "run_dir": str(run_dir)}
    if mistakes := find_mistakes(values, trust=trust).mistakes:
        raise ValueError(mistakes[0])
    data: Any = make_data(values, trust=trust)
    data.num_workers = 0
    prepare(data)
    data.setup("validate")
    return data


def drawn_samples(models: Mapping[str, Any], data: Any) -> "list[Exhibit]":
    """Return attention maps of the models for some samples of the validation data."""
    from diffmm.models import (
        AudioModel,
        CaptioningModel,
        ContrastiveModel,
        CTCModel,
        ImageModel,
        MaskedAutoencoder,
        TextModel,
    )

    kinds = {type(model) for model in models.values()}
    if len(kinds) > 1:
        raise ValueError("the runs have models of different kinds")
    (kind,) = kinds
    batches = islice(iter(data.val_dataloader()), NUM_BATCHES)
    if kind is TextModel:
        return [_text_exhibit(models, next(batches), data)]
    if kind is MaskedAutoencoder:
        encoders = {name: model.encoder for name, model in models.items()}
        return _encoder_exhibits(encoders, next(batches))
    if kind in (CaptioningModel, ContrastiveModel, CTCModel):
        return _pair_exhibits(models, next(batches), data)
    if kind not in (ImageModel, AudioModel) or not all(m.num_classes for m in models.values()):
        raise ValueError(f"they are not drawn for a {kind.__name__} without classes")
    first = next(batches)
    if first["labels"].ndim > 1:
        return _encoder_exhibits(models, first, data.class_names)
    return _class_exhibits(models, chain([first], batches), data.class_names)


def _text_exhibit(models: Mapping[str, Any], batch: Any, data: Any) -> "Exhibit":
    """The start of a text: of causal models with the next token, of encoders with a masked one."""
    from diffmm.analysis.exhibits import Pieces, text_exhibit
    from diffmm.batch import IGNORE_INDEX

    pieces = Pieces(data.tokenizer)
    is_causal = {model.config.causal for model in models.values()}
    if len(is_causal) > 1:
        raise ValueError("the runs have causal models and encoders")
    if True in is_causal:
        tokens = batch["tokens"][0][: NUM_TOKENS + 1]
        return text_exhibit(models, tokens[:-1], int(tokens[-1]), pieces)
    tokens, targets = (batch[name][0][:NUM_TOKENS] for name in ("tokens", "targets"))
    masked = (targets != IGNORE_INDEX).nonzero().flatten().tolist()
    if not masked:
        raise ValueError(f"the first {NUM_TOKENS} tokens of the data have no target")
    query = masked[len(masked) // 2]
    return text_exhibit(models, tokens, int(targets[query]), pieces, query=query)


def _class_exhibits(models: Mapping[str, Any], batches: Any, names: Any) -> "list[Exhibit]":
    """Images or sounds of several classes."""
    from diffmm.analysis.exhibits import image_exhibit, sound_exhibit

    shown: list[Exhibit] = []
    for batch, i, label in _firsts(batches):
        if "images" in batch:
            shown.append(image_exhibit(models, batch["images"][i], label, names))
        else:
            shown.append(sound_exhibit(models, _sample(batch, i), label, names))
    return shown


def _encoder_exhibits(
    encoders: Mapping[str, Any], batch: Any, names: Sequence[str] = ()
) -> "list[Exhibit]":
    """Whole images or sounds, with the names of all their classes if given."""
    from diffmm.analysis.encoder_exhibits import encoder_exhibit

    shown: list[Exhibit] = []
    for i in range(min(NUM_CLASSES, size_of(batch))):
        title = f"sample {i + 1}"
        if names:
            has = batch["labels"][i].bool().tolist()
            title = ", ".join(name for name, is_in in zip(names, has, strict=True) if is_in)
        shown.append(encoder_exhibit(encoders, _sample(batch, i), title or "no class"))
    return shown


def _pair_exhibits(models: Mapping[str, Any], batch: Any, data: Any) -> "list[Exhibit]":
    """Images or sounds with their texts; of contrastive models a text, too, and of others the words
    that they write."""
    from diffmm.analysis.encoder_exhibits import caption_exhibit, encoder_exhibit, words_exhibit
    from diffmm.analysis.exhibits import Pieces, text_tower_exhibit
    from diffmm.models import CaptioningModel, ContrastiveModel

    tokenizer = data.evaluation_reader.encoder
    some = next(iter(models.values()))
    shown: list[Exhibit] = []
    for i in range(min(NUM_CLASSES, size_of(batch))):
        sample, tokens = _sample(batch, i), batch["tokens"][i, : batch["num_tokens"][i]]
        text = tokenizer.decode(tokens.tolist())
        if isinstance(some, CaptioningModel):
            whole = caption_exhibit(models, sample, tokens, text)
            shown.append(words_exhibit(models, sample, tokenizer, whole))
            continue
        part = "encoder"
        if isinstance(some, ContrastiveModel):
            part = "image" if "images" in batch else "audio"
        encoders = {name: getattr(model, part) for name, model in models.items()}
        whole = encoder_exhibit(encoders, sample, text)
        is_compared = isinstance(some, ContrastiveModel)
        shown.append(whole if is_compared else words_exhibit(models, sample, tokenizer, whole))
    if isinstance(some, ContrastiveModel):
        towers = {name: model.text for name, model in models.items()}
        first = batch["tokens"][0, : batch["num_tokens"][0]]
        shown.append(text_tower_exhibit(towers, first, Pieces(tokenizer)))
    return shown


def _sample(batch: Any, i: int) -> Any:
    """An image of a batch, or a sound without its padding."""
    if "images" in batch:
        return batch["images"][i]
    length = batch["num_samples"][i] if "num_samples" in batch else None
    return batch["waveforms"][i, :length]


def _firsts(batches: Any) -> list[tuple[Any, int, int]]:
    """Return batch, row and class of the first sample of each of several classes."""
    found: dict[int, tuple[Any, int, int]] = {}
    for batch in batches:
        for i, label in enumerate(batch["labels"].tolist()):
            found.setdefault(label, (batch, i, label))
        if len(found) >= NUM_CLASSES:
            break
    return [found[label] for label in sorted(found)[:NUM_CLASSES]]
