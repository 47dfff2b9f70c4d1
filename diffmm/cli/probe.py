"""`diffmm probe`: what the features of an encoder know about classes, without training it."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffmm.checkpoint_folders import find_state
from diffmm.recipes.errors import InputError, refusing, warn
from diffmm.recipes.importing import importing
from diffmm.recipes.settings import load_file
from diffmm.recipes.trust import add_trust_option
from diffmm.runs.directories import config_around, import_modules_of_run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffmm.analysis.probing import LinearProbe
    from diffmm.hub.trained import TrainedModel

DESCRIPTION = """Measure the frozen features of an image or audio encoder: the accuracy of a linear
probe and of nearest neighbors on validation data. The weight decay of the probe is chosen on every
fifth training sample of each class, never on validation data."""

SPLITS = ("train", "val")
SUBSTITUTE = "set --data.bad_samples.policy substitute (or quarantine)"


class Features(NamedTuple):
    """The features of a split, `[N, dim]`, and its labels."""

    features: "Tensor"
    labels: "Tensor"


def run(verb: str, arguments: Sequence[str]) -> int:
    """Measure, and print or save the result."""
    options = make_parser().parse_args(arguments)
    try:
        with refusing():
            probe(options)
    except InputError as error:
        # The advice of datamodules is about the settings of a recipe.
        raise InputError(
            *(line.replace(SUBSTITUTE, "use --skip-bad") for line in error.lines)
        ) from error
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="diffmm probe", allow_abbrev=False, description=DESCRIPTION
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run, a checkpoint, or model.safetensors (or its folder), such as one written by "
        "diffmm convert; of a masked autoencoder, its encoder",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="a folder with one folder per class, or a CSV file of files and labels, prepared as "
        "the model's inputs are; the run's own data by default",
    )
    parser.add_argument(
        "--pool",
        choices=("cls", "mean"),
        help="features: of the class token, or the mean over all patches; as the model's head "
        "pools by default",
    )
    parser.add_argument(
        "--neighbors",
        type=int,
        default=20,
        metavar="K",
        help="number of nearest neighbors [20]",
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        metavar="W",
        help="weight decay of the probe, instead of the best of 15 from 10 to 1e-6",
    )
    parser.add_argument(
        "--output",
        metavar="TARGET",
        help="also write the model with the probe as its head, for diffmm predict and finetune: a "
        "folder to write model.safetensors to, or a file ending in .safetensors",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="samples per forward pass [64]"
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=0,
        metavar="N",
        help="number of worker processes that read files [0]",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="report files that cannot be read, and take others in their place",
    )
    add_trust_option(parser)
    return parser


def probe(options: argparse.Namespace) -> None:
    """Measure the features.

    Raises:
        ValueError, InputError, OSError: If the model has no features to measure, the data cannot be
            read, or the target exists.
    """
    with importing():
        from diffmm.analysis.probing import fit_probes, neighbor_scores
        from diffmm.hub.loading import load
        from diffmm.models.contents import weights_file

    if options.weight_decay is not None and not 0 <= options.weight_decay < math.inf:
        raise InputError(
            f"--weight-decay must be finite and at least 0, got {options.weight_decay}"
        )
    if options.neighbors < 1:
        raise InputError(f"--neighbors must be at least 1, got {options.neighbors}")
    target = None if options.output is None else Path(options.output)
    if target is not None and (file := weights_file(target)).exists():
        raise InputError(f"{file} exists: give another target, or remove it")
    state = find_state(Path(options.run), warn=warn)
    if options.trust:
        import_modules_of_run(state)
    trained = load(state, device=options.device)
    encoder = encoder_of(trained, options.pool, saved=target is not None)
    data = data_of(trained, options)
    train, val = (features_of(encoder, data, split) for split in SPLITS)
    num_classes = len(data.class_names)
    print(
        f"{options.run}: {train.features.shape[1]} features of {len(train.labels):,} training and "
        f"{len(val.labels):,} validation samples of {num_classes} classes",
        flush=True,
    )
    if options.weight_decay is not None:
        (best,) = fit_probes(*train, num_classes, [options.weight_decay])
        choice = "given"
    else:
        best = chosen_probe(train, num_classes)
        choice = "chosen on training samples"
    described = described_scores(best.logits(val.features), val.labels)
    print(f"linear probe: {described} (weight decay {best.weight_decay:.1e}, {choice})")
    scores = neighbor_scores(*train, num_classes, val.features, options.neighbors)
    num_neighbors = min(options.neighbors, len(train.labels))
    print(f"{num_neighbors} nearest neighbors: {described_scores(scores, val.labels)}")
    if target is not None:
        print(saved_with_head(trained, encoder, best, data, target))


def encoder_of(trained: "TrainedModel", pool: str | None, *, saved: bool) -> "nn.Module":
    """The encoder, without its head.

    Args:
        trained: The model.
        pool: How features are pooled; as the model's head does by default.
        saved: Whether the probe is to become the model's head.

    Raises:
        InputError: If the model is not an encoder with a head, cannot pool like this, or has
            another head than one linear layer with a bias, into which a probe is saved.
    """
    encoder: Any = getattr(trained.model, "encoder", trained.model)
    if not hasattr(encoder, "reset_classifier"):
        raise InputError(
            f"{trained.origin} contains a {type(encoder).__name__}: only the features of image and "
            f"audio models are measured"
        )
    if saved:
        encoder.reset_classifier(1)
        if {name for name, _ in encoder.head.named_parameters()} != {"weight", "bias"}:
            raise InputError(
                f"--output: the head {encoder.config.head!r} of {trained.origin} is not a linear "
                f"layer with a bias, into which the probe could be written"
            )
    encoder.reset_classifier(0, pool)
    return encoder.eval()


def data_of(trained: "TrainedModel", options: argparse.Namespace) -> Any:
    """The labeled data, ready to be read.

    Raises:
        InputError: If the weights are not in a run and no data are given, or the data have no
            labels.
        ValueError, FileNotFoundError: If the data cannot be found.
    """
    from diffmm.recipes.mistakes import find_mistakes, make_data

    data: Any
    if options.data is not None:
        reader = trained.reader
        if reader.data_class is None:
            raise InputError(f"--data {options.data}: {type(reader).__name__} reads no labels")
        module, _, name = reader.data_class.rpartition(".")
        data = getattr(import_module(module), name).prepared_by(
            reader, options.data, batch_size=options.batch_size, num_workers=options.num_workers
        )
    else:
        if (config := config_around(Path(options.run))) is None:
            raise InputError(f"{options.run} is not in a run: give labeled data (--data)")
        values = {**load_file(config), "run_dir": str(config.parent)}
        if mistakes := find_mistakes(values, trust=options.trust).mistakes:
            raise InputError(*mistakes)
        data = make_data(values, trust=options.trust)
        if not hasattr(data, "as_evaluated"):
            raise InputError(f"{type(data).__name__} has no labels: give labeled data (--data)")
        data.batch_size, data.num_workers = options.batch_size, options.num_workers
    if options.skip_bad:
        data.bad_samples = replace(data.bad_samples, policy="substitute")
    data.prepare_data()
    data.setup("fit")
    return data


def features_of(encoder: "nn.Module", data: Any, split: str) -> Features:
    """The features of a split, on the device of the encoder."""
    import torch

    from diffmm.batch import inputs_of, to_device

    device = next(encoder.parameters()).device
    features, labels = [], []
    with torch.inference_mode():
        for batch in data.as_evaluated(split):
            moved = to_device(batch, device)
            features.append(encoder(*inputs_of(encoder, moved)).float())
            labels.append(moved["labels"])
    # Outside of inference mode, because L-BFGS needs tensors that can be saved for gradients.
    return Features(torch.cat(features).clone(), torch.cat(labels).clone())


def chosen_probe(train: Features, num_classes: int) -> "LinearProbe":
    """The probe of all training samples, with the weight decay whose loss is lowest on those that
    are held out.

    Raises:
        InputError: If no sample can be held out.
    """
    from diffmm.analysis.probing import fit_probes, is_held_out, mean_loss

    held_out = is_held_out(train.labels)
    if not held_out.any():
        raise InputError(
            f"none of {len(train.labels)} training samples can be held out to choose a weight "
            f"decay: give one (--weight-decay)"
        )
    kept = Features(train.features[~held_out], train.labels[~held_out])
    losses = {
        each.weight_decay: mean_loss(each.logits(train.features[held_out]), train.labels[held_out])
        for each in fit_probes(*kept, num_classes)
    }
    (best,) = fit_probes(*train, num_classes, [min(losses, key=lambda decay: losses[decay])])
    return best


def described_scores(scores: "Tensor", labels: "Tensor") -> str:
    """The accuracy of scores `[N, K]`, or for several labels per sample their mean average
    precision."""
    from diffmm.training.metrics import MeanAveragePrecision

    if labels.ndim > 1:
        metric = MeanAveragePrecision(labels.shape[1]).to(scores.device)
        metric.update(scores, labels)
        return f"mean average precision {float(metric.compute()):.4f}"
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    text = f"accuracy {float(hits[:, 0].float().mean()):.4f}"
    if scores.shape[1] > 5:
        text += f", top 5 {float(hits.any(1).float().mean()):.4f}"
    return text


def saved_with_head(
    trained: "TrainedModel", encoder: Any, best: "LinearProbe", data: Any, target: Path
) -> Path:
    """Write the encoder with the probe as its head."""
    import torch

    from diffmm.models.weights import save_model

    encoder.reset_classifier(len(best.bias))
    with torch.no_grad():
        encoder.head.weight.copy_(best.weight)
        encoder.head.bias.copy_(best.bias)
    encoder.job = replace(
        trained.job,
        class_names=tuple(data.class_names),
        multi_label=bool(data.splits.multi_label),
    )
    return save_model(encoder, target)
