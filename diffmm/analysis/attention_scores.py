"""Attention scores: the share of attention to an answer and to the noise around it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmm.analysis.map_blocks import LayerInputs, visit_layers
from diffmm.analysis.row_means import RowMeans, mean_over
from diffmm.ops import AttentionMask

SMALLEST_SUM = 0.05
"""Queries whose weights sum to less in size, `|1 - lambda|`, are left out: divided by this sum, a
weight would grow more than twentyfold, and without bound where lambda reaches 1."""


@dataclass(frozen=True)
class Spans:
    """Which tokens of a batch hold the answer, and which ask for it.

    Attributes:
        evidence: `[B, M]` booleans, true at the tokens of the context that hold the answer.
        queries: `[B, N]` booleans, true at the tokens whose attention is measured: usually those
            that predict the answer.
        context: `[B, M]` booleans, true at all tokens of the context; its noise is what is not
            evidence. By default all tokens but the special ones.
        special: `[B, M]` booleans, true at special tokens, which are neither evidence nor noise.
            By default there are none.

    Raises:
        ValueError: If a tensor is not `[B, N]` booleans or shapes differ, no query is given, or a
            sample with queries has no evidence.
    """

    evidence: Tensor
    queries: Tensor
    context: Tensor | None = None
    special: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in vars(self).items():
            if tensor is None:
                continue
            if tensor.dtype != torch.bool or tensor.ndim != 2:
                raise ValueError(
                    f"{name} must be [B, N] booleans, got {tuple(tensor.shape)} {tensor.dtype}"
                )
            if tensor.shape != self.evidence.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, but evidence has "
                    f"{tuple(self.evidence.shape)}"
                )
        asks = self.queries.any(dim=1)
        if not asks.any():
            raise ValueError("queries marks no token, so that there is no attention to measure")
        without = (asks & ~self.evidence.any(dim=1)).nonzero()
        if len(without):
            raise ValueError(f"sample {int(without[0])} has queries, but no evidence")

    @property
    def noise(self) -> Tensor:
        """`[B, M]` booleans, true at the tokens of the context that are not evidence."""
        context = ~self.evidence if self.context is None else self.context & ~self.evidence
        return context if self.special is None else context & ~self.special


@dataclass(frozen=True)
class LayerScores:
    """The scores of one layer, per head, `[H]` in float64 each; NaN for a head all of whose queries
    are left out.

    Attributes:
        name: Name of the layer in its model.
        answer: Share of the attention to the evidence.
        noise: Share of the attention to the noise.
        left_out: Share of the queries that are left out, in [0, 1].
        above_one: Share of all queries at which lambda exceeds 1, in [0, 1].
    """

    name: str
    answer: Tensor
    noise: Tensor
    left_out: Tensor
    above_one: Tensor


@dataclass(frozen=True)
class QueryScores:
    """The scores of the first, second, ... query of each sample, usually the tokens of an answer:
    means over samples, layers and heads.

    Attributes:
        answer: Share of the attention to the evidence; NaN if all queries are left out.
        noise: Share of the attention to the noise, likewise.
    """

    answer: float
    noise: float


@dataclass(frozen=True)
class AttentionScores:
    """The scores of all layers, and their means over layers and heads.

    Attributes:
        layers: The scores of each layer and head, means over queries.
        queries: The scores of each query, in the order of the queries of a sample.
    """

    layers: list[LayerScores]
    queries: list[QueryScores]

    @property
    def answer(self) -> float:
        """Mean share of the attention to the evidence."""
        return mean_over([layer.answer for layer in self.layers])

    @property
    def noise(self) -> float:
        """Mean share of the attention to the noise."""
        return mean_over([layer.noise for layer in self.layers])

    @property
    def signal_to_noise(self) -> float:
        """`answer / noise`, the ratio of the two shares (figure 1); infinite without noise, and NaN
        if `noise` is negative, because a ratio then says nothing."""
        if self.noise < 0.0:
            return math.nan
        return self.answer / self.noise if self.noise else math.inf

    @property
    def left_out(self) -> float:
        """Mean share of the queries that are left out, in [0, 1]."""
        return mean_over([layer.left_out for layer in self.layers])

    @property
    def above_one(self) -> float:
        """Mean share of the queries at which lambda exceeds 1, in [0, 1]."""
        return mean_over([layer.above_one for layer in self.layers])


class ScoreMeter:
    """Accumulates attention scores over batches.

    Args:
        max_bytes: Memory of a block of maps, in bytes; see `LayerInputs.blocks`.
    """

    def __init__(self, *, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._means = RowMeans()
        self._names: dict[str, None] = {}
        # Of the first, second, ... query of each sample: sums of scores, and their numbers.
        self._sums = {name: torch.zeros(0, dtype=torch.float64) for name in ("answer", "noise")}
        self._counts = torch.zeros(0, dtype=torch.float64)

    def add(self, layer: LayerInputs, spans: Spans) -> None:
        """Add the scores of one layer for one batch.

        Raises:
            ValueError: If the spans are not of as many tokens as the layer has keys.
        """
        wanted = (len(layer.k), layer.k.shape[1])
        if tuple(spans.evidence.shape) != wanted or layer.q.shape[1] != wanted[1]:
            raise ValueError(
                f"evidence has shape {tuple(spans.evidence.shape)}, but {layer.name} has "
                f"{layer.q.shape[1]} queries and keys of shape {wanted}"
            )
        device = layer.q.device
        evidence, noise, queries = (
            tensor.to(device) for tensor in (spans.evidence, spans.noise, spans.queries)
        )
        self._names[layer.name] = None
        rows = queries.any(dim=0).nonzero().squeeze(1)
        numbers = queries.cumsum(dim=1) - 1  # of each query in its sample
        for block in layer.blocks(rows=rows, max_bytes=self.max_bytes):
            weights = block.combined
            asked = (queries[:, block.rows] & block.is_real)[:, None]
            total = 1.0 if block.lam is None else 1.0 - block.lam
            total = torch.as_tensor(total, device=device).expand(weights.shape[:3])
            counted = asked & (total.abs() >= SMALLEST_SUM)
            for name, chosen in (("answer", evidence), ("noise", noise)):
                score = (weights * chosen[:, None, None]).sum(dim=-1) / total
                self._means.add((layer.name, name), score, counted)
                self._sums[name] = _added(self._sums[name], score, counted, numbers[:, block.rows])
            ones = torch.ones_like(weights[..., 0])
            self._counts = _added(self._counts, ones, counted, numbers[:, block.rows])
            self._means.add((layer.name, "left_out"), (~counted).to(weights.dtype), asked)
            self._means.add((layer.name, "above_one"), (total < 0.0).to(weights.dtype), asked)

    def scores(self) -> AttentionScores:
        """The scores of all batches so far."""
        return AttentionScores(
            [
                LayerScores(
                    layer,
                    *(
                        self._means.mean((layer, name))
                        for name in ("answer", "noise", "left_out", "above_one")
                    ),
                )
                for layer in self._names
            ],
            [
                QueryScores(float(answer), float(noise))
                for answer, noise in zip(
                    self._sums["answer"] / self._counts,
                    self._sums["noise"] / self._counts,
                    strict=True,
                )
            ],
        )


def _added(sums: Tensor, values: Tensor, counted: Tensor, numbers: Tensor) -> Tensor:
    """Add values, `[B, H, R]`, where they are counted, to the sums of the numbers of their queries,
    `[B, R]`; the sums grow if there are more queries."""
    some = counted.expand_as(values)
    places = numbers[:, None].expand_as(values)[some].cpu()
    missing = int(places.max()) + 1 - len(sums) if len(places) else 0
    grown = torch.cat([sums, sums.new_zeros(max(0, missing))])
    return grown.index_add_(0, places, values[some].to("cpu", torch.float64))


def attention_scores(
    model: nn.Module,
    *inputs: Tensor | None,
    spans: Spans,
    mask: AttentionMask | None = None,
    max_bytes: int | None = None,
) -> AttentionScores:
    """Measure the attention to the answer and to the noise (Ye et al. 2025, table 3).

        score(S) = mean over queries, heads and layers of  sum_{m in S} w_m / (1 - lambda)

    with `w = A1 - lambda A2`, whose rows sum to `1 - lambda`, so that the scores of all tokens sum
    to 1; softmax attention is the case `lambda = 0`. With `combine="add"` lambda is negative and
    the same formula holds. Factors that follow the maps (the headwise norm, `1 - lambda_init`,
    gates) do not enter.

    Where lambda is near 1 the quotient is unbounded: queries with `|1 - lambda|` below
    `SMALLEST_SUM` are left out, and `left_out` is their share. Where lambda exceeds 1, weights and
    their sum are mostly negative; the quotients still sum to 1, but a positive score then means
    tokens that are subtracted. `above_one` is the share of such queries, which are not left out.

    Args:
        model: See `diffmm.analysis.map_blocks.visit_layers`.
        inputs: See `diffmm.analysis.map_blocks.visit_layers`.
        spans: The answer and the queries. For images and sounds, tokens include the class and
            register tokens.
        mask: See `diffmm.analysis.map_blocks.visit_layers`.
        max_bytes: Memory of a block of maps, in bytes; see `LayerInputs.blocks`.

    Raises:
        ValueError: If the model has no attention layers, or the spans do not fit its tokens.
    """
    meter = ScoreMeter(max_bytes=max_bytes)
    visit_layers(model, *inputs, visit=lambda layer: meter.add(layer, spans), mask=mask)
    return meter.scores()
