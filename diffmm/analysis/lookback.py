"""Lookback ratios: how much a head attends to the context, and wrong answers that they reveal."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmm.analysis.contexts import ContextBatch, wrong_samples
from diffmm.analysis.map_blocks import LayerInputs, visit_layers
from diffmm.models.text import TextModel


@dataclass(frozen=True)
class LookbackRatios:
    """The lookback ratios of some samples.

    Attributes:
        values: Mean ratio over the queries of each sample, `[B, F]` in float64 and in [0, 1], one
            per layer, map and head.
        names: Names of these, `F` of them, such as `backbone.blocks.0.attention A1 head 3`.
    """

    values: Tensor
    names: list[str]


@dataclass(frozen=True)
class Detection:
    """How well a linear detector finds wrong answers.

    Attributes:
        auroc: Mean of `folds`: the probability that a wrong sample has a higher score than a right
            one; 0.5 by chance.
        folds: AUROC on each fold, by the detector that was fitted to the others.
        detector: The detector that is fitted to all samples, a scikit-learn `LogisticRegression`;
            `predict_proba(ratios)[:, 1]` is the probability that a sample is wrong.
        names: Names of its features; see `LookbackRatios`.
    """

    auroc: float
    folds: list[float]
    detector: Any
    names: list[str]


def lookback_ratios(
    model: TextModel,
    tokens: Tensor,
    *,
    context: Tensor,
    queries: Tensor,
    max_bytes: int | None = None,
) -> LookbackRatios:
    """Compute the lookback ratios of each head (Chuang et al. 2024, "Lookback Lens", section 2.1).

        ratio = a(context) / (a(context) + a(new))

    where `a(S)` is the mean weight of a query on the tokens of `S` that it sees, and `new` are the
    tokens after the context, including the query. It is averaged over the queries of a sample, and
    is 0.5 where the weights on both are 0.

    In differential attention, `A1 - lambda A2` has negative weights, so that `a(context) + a(new)`
    may be 0 or negative and the ratio is unbounded. The ratios of both maps, `A1` and `A2`, are
    well defined and are given instead.

    Args:
        model: Causal text model.
        tokens: Token ids, `[B, N]`, on the model's device.
        context: `[B, N]` booleans, true at the tokens of the context.
        queries: `[B, N]` booleans, true at the tokens whose attention counts: those that predict
            the answer.
        max_bytes: Memory of a block of maps, in bytes; see
            `diffmm.analysis.map_blocks.LayerInputs.blocks`.

    Raises:
        ValueError: If the model is not causal, shapes or dtypes are wrong, a sample has no context
            or no queries, or a query sees no token of the context or none after it.
    """
    if not model.config.causal:
        raise ValueError("lookback ratios need a causal text model, got causal=False")
    for name, marked in (("context", context), ("queries", queries)):
        if marked.dtype != torch.bool or marked.shape != tokens.shape:
            raise ValueError(
                f"{name} must be booleans of the shape of the tokens, {tuple(tokens.shape)}, got "
                f"{tuple(marked.shape)} {marked.dtype}"
            )
        if not marked.any(dim=1).all():
            sample = int((~marked.any(dim=1)).nonzero()[0])
            raise ValueError(f"{name} marks no token of sample {sample}")
    context, queries = context.to(tokens.device), queries.to(tokens.device)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    new = place > torch.where(context, place, -1).amax(dim=1, keepdim=True)
    rows = queries.any(dim=0).nonzero().squeeze(1)
    values: list[Tensor] = []
    names: list[str] = []

    def visit(layer: LayerInputs) -> None:
        sums: dict[str, Tensor] = {}
        for block in layer.blocks(rows=rows, max_bytes=max_bytes):
            asked = queries[:, None, block.rows]  # [B, 1, R]
            seen = [block.visible & part[:, None, None] for part in (context, new)]
            counts = [part.sum(dim=-1) for part in seen]
            for count, of in zip(counts, ("of the context", "after the context"), strict=True):
                if (asked & (count == 0)).any():
                    raise ValueError(f"a query sees no token {of}, so that it has no ratio")
            maps = ("A",) if block.lam is None else ("A1", "A2")
            for name, weights in zip(maps, block.components, strict=True):
                old, recent = (
                    (weights * part).sum(dim=-1) / count.clamp(min=1)
                    for part, count in zip(seen, counts, strict=True)
                )
                total = old + recent
                ratio = torch.where(total > 0.0, old / total, 0.5).masked_fill(~asked, 0.0)
                sums[name] = sums.get(name, 0.0) + ratio.double().sum(dim=-1)
        for name, total in sums.items():
            values.append((total / queries.sum(dim=1, keepdim=True)).cpu())
            names.extend(f"{layer.name} {name} head {head}" for head in range(total.shape[1]))

    visit_layers(model, tokens, visit=visit)
    return LookbackRatios(torch.cat(values, dim=1), names)


def detect(
    ratios: LookbackRatios, wrong: Tensor, *, num_folds: int = 5, seed: int = 0
) -> Detection:
    """Fit a linear detector of wrong samples and measure it by cross-validation (section 2.2).

    Args:
        ratios: Lookback ratios of `S` samples.
        wrong: `[S]` booleans, true where a sample is wrong.
        num_folds: Number of folds, at least 2, each with the same share of wrong samples.
        seed: Seed of the assignment to folds.

    Raises:
        ValueError: If a number is out of range, or there are fewer right or wrong samples than
            folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    if num_folds < 2:
        raise ValueError(f"num_folds must be at least 2, got {num_folds}")
    if wrong.shape != ratios.values.shape[:1]:
        raise ValueError(
            f"wrong has shape {tuple(wrong.shape)}, but there are {len(ratios.values)} samples"
        )
    num_wrong = int(wrong.sum())
    for number, name in ((num_wrong, "wrong"), (len(wrong) - num_wrong, "right")):
        if number < num_folds:
            raise ValueError(
                f"{number} of {len(wrong)} samples are {name}, but each of {num_folds} folds needs "
                f"one: measure more samples, or a task on which the model is sometimes right"
            )
    features, labels = ratios.values.numpy(), wrong.cpu().numpy()
    detector = LogisticRegression(max_iter=1000)
    splits = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    folds = cross_val_score(detector, features, labels, scoring="roc_auc", cv=splits)
    return Detection(
        float(folds.mean()), folds.tolist(), detector.fit(features, labels), ratios.names
    )


@torch.no_grad()
def lookback_lens(
    model: TextModel,
    batches: Iterable[ContextBatch],
    *,
    num_folds: int = 5,
    seed: int = 0,
    max_bytes: int | None = None,
) -> Detection:
    """Measure how well lookback ratios find the samples with a wrong answer.

    The queries are the tokens that predict answers, given the right previous tokens. The paper
    counts the whole prompt as context; here a question after the context counts as new, so that the
    first token of an answer has a ratio, too.

    Args:
        model: Causal text model, on whose device the batches are measured.
        batches: Sequences with answers in their context.
        num_folds: See `detect`.
        seed: See `detect`.
        max_bytes: See `lookback_ratios`.

    Raises:
        ValueError: See `lookback_ratios` and `detect`.
    """
    found: list[LookbackRatios] = []
    wrong: list[Tensor] = []
    device = next(model.parameters()).device
    for batch in batches:
        batch = batch.to(device)
        found.append(
            lookback_ratios(
                model,
                batch.tokens,
                context=batch.context,
                queries=batch.is_target,
                max_bytes=max_bytes,
            )
        )
        wrong.append(wrong_samples(model, batch))
    if not found:
        raise ValueError("batches is empty, so that there is nothing to detect")
    values = torch.cat([ratios.values for ratios in found])
    return detect(
        LookbackRatios(values, found[0].names), torch.cat(wrong), num_folds=num_folds, seed=seed
    )
