"""All measurements of a model on some batches: what `diffmm analyze` reports."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffmm.analysis.attention_scores import AttentionScores, ScoreMeter, Spans
from diffmm.analysis.batches import Batch, evaluate, loss_of, mask_of, seeded
from diffmm.analysis.cancellation import CancellationMeter, LayerCancellation
from diffmm.analysis.concentration import ConcentrationMeter, LayerConcentration
from diffmm.analysis.initial_gradients import LayerGradients, initial_gradients, twin_of
from diffmm.analysis.lambdas import LambdaMeter, LayerLambda
from diffmm.analysis.map_blocks import LayerInputs, visit_layers
from diffmm.analysis.outliers import OutlierMeter, Outliers, watching_blocks
from diffmm.analysis.quantization import (
    BITS,
    Effect,
    LayerMapErrors,
    MapErrorMeter,
    quantization_effects,
)
from diffmm.batch import IGNORE_INDEX, inputs_of, samples_of
from diffmm.models.text import TextModel

NUM_GRADIENT_SAMPLES = 8
"""Number of samples of the gradients at the start."""

SCORES, MAPS, EFFECTS, GRADIENTS = "scores", "maps", "quantization", "gradients"


@dataclass
class Measurements:
    """The measurements of a model; those that could not be made are empty.

    Attributes:
        concentration: See `diffmm.analysis.concentration`.
        outliers: See `diffmm.analysis.outliers`.
        lambdas: See `diffmm.analysis.lambdas`; empty for softmax attention.
        cancellation: See `diffmm.analysis.cancellation`; empty for softmax attention.
        parts: Names of the towers of a contrastive model; empty for other models.
        map_errors: See `diffmm.analysis.quantization.map_errors`.
        effects: See `diffmm.analysis.quantization.quantization_effects`.
        scores: See `diffmm.analysis.attention_scores`.
        gradients: See `diffmm.analysis.initial_gradients`.
        problems: Why measurements could not be made, by `"maps"` (concentration, outliers, lambda,
            cancellation and errors of maps), `"quantization"`, `"scores"` and `"gradients"`.
    """

    concentration: list[LayerConcentration] = field(default_factory=list)
    outliers: Outliers | None = None
    lambdas: list[LayerLambda] = field(default_factory=list)
    cancellation: list[LayerCancellation] = field(default_factory=list)
    parts: tuple[str, ...] = ()
    map_errors: list[LayerMapErrors] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    scores: AttentionScores | None = None
    gradients: Mapping[str, list[LayerGradients]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    spans: Callable[[Batch], Spans | None],
    bits: Sequence[int] = BITS,
    max_bytes: int | None = None,
    seed: int = 0,
) -> Measurements:
    """Make all measurements of a model. One that fails does not prevent the others.

    Args:
        model: A model of this library; afterwards it is as before.
        batches: At least one batch, on the model's device.
        spans: The answers and queries of a batch, for the attention scores; None if it has none.
        bits: Numbers of bits of the quantizations.
        max_bytes: Memory of a block of maps, in bytes; see `LayerInputs.blocks`.
        seed: Seed of the twins' weights and of random masks.
    """
    found = Measurements(parts=tuple(getattr(model, "towers", ())))
    device = next(model.parameters()).device

    def attempt(name: str, make: Callable[[], None]) -> None:
        try:
            make()
        except ValueError as error:
            found.problems[name] = " ".join(str(error).split())

    def maps() -> None:
        concentration = ConcentrationMeter(max_bytes=max_bytes)
        outliers = OutlierMeter(max_bytes=max_bytes)
        lambdas, errors = LambdaMeter(), MapErrorMeter(bits=bits, max_bytes=max_bytes)
        cancelled = CancellationMeter(max_bytes=max_bytes)

        def visit(layer: LayerInputs) -> None:
            meters = (concentration.add, lambdas.add, errors.add, cancelled.add)
            for add in (*meters, outliers.add_logits):
                add(layer)

        with seeded(seed, device), watching_blocks(model, outliers.add_hidden):
            for batch in batches:
                _visit(model, batch, visit)
        found.concentration, found.outliers = concentration.layers(), outliers.result()
        found.lambdas, found.map_errors = lambdas.layers(), errors.layers()
        found.cancellation = cancelled.layers()

    def quantization() -> None:
        found.effects = quantization_effects(
            model, lambda: evaluate(model, batches, seed=seed), bits=bits, max_bytes=max_bytes
        )

    def scores() -> None:
        found.scores = _scores(model, batches, spans, max_bytes)

    def gradients() -> None:
        few = samples_of(batches[0], slice(NUM_GRADIENT_SAMPLES))
        build = twin_of(model)

        def loss(twin: nn.Module) -> Tensor:
            total, count, _ = loss_of(twin, few)
            return total / max(1, count)

        found.gradients = initial_gradients(build, loss, seed=seed, device=device)

    attempt(MAPS, maps)
    attempt(EFFECTS, quantization)
    attempt(SCORES, scores)
    attempt(GRADIENTS, gradients)
    return found


def spans_of(batch: Batch, special_ids: Collection[int] = ()) -> Spans | None:
    """The answers and queries of a batch of retrieval: its `evidence`, and the positions with a
    target, whose attention finds the answer. None if the batch has no evidence.

    Args:
        batch: A `diffmm.batch.TextBatch`.
        special_ids: Ids of special tokens, which are neither evidence nor noise.
    """
    evidence = batch.get("evidence")
    if evidence is None:
        return None
    queries = (batch["targets"] != IGNORE_INDEX) & evidence.any(dim=1, keepdim=True)
    if not queries.any():
        return None
    ids = torch.tensor(sorted(special_ids), dtype=torch.int64, device=evidence.device)
    return Spans(evidence, queries, special=torch.isin(batch["tokens"], ids))


def _scores(
    model: nn.Module,
    batches: Sequence[Batch],
    spans: Callable[[Batch], Spans | None],
    max_bytes: int | None,
) -> AttentionScores | None:
    """The attention scores; None for images and sounds, which have no answers."""
    meter = ScoreMeter(max_bytes=max_bytes)
    given = [(batch, each) for batch in batches if (each := spans(batch)) is not None]
    if not given:
        if not isinstance(model, TextModel):
            return None
        way_out = ": give a text and the characters of its answer (--text TEXT --span A:B)"
        raise ValueError(
            f"the data do not say which tokens hold an answer (a field evidence)"
            f"{way_out if model.config.causal else ''}"
        )
    for batch, each in given:

        def visit(layer: LayerInputs, each: Spans = each) -> None:
            meter.add(layer, each)

        _visit(model, batch, visit)
    return meter.scores()


def _visit(model: nn.Module, batch: Batch, visit: Callable[[LayerInputs], None]) -> None:
    visit_layers(model, *inputs_of(model, batch), visit=visit, mask=mask_of(model, batch))
