"""Generated sequences whose answers must be found in the context.

Every source has a vocabulary of words and draws sequences of any length. A sequence marks its
answers, which are the targets, and its evidence: the earlier tokens that hold the answers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from datamodules.shared.sampling import sample_rng
from diffmm.checks import Settings

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

EOS = "<eos>"
"""The end-of-text token, id 0 of every source."""


class Drawn(NamedTuple):
    """A sequence of `N + 1` tokens."""

    ids: Ids
    """`[N + 1]`, the tokens."""
    targets: Ids
    """`[N + 1]`, the answers at their own places (not shifted), and -1 elsewhere. A target may
    differ from the token at its place."""
    evidence: Flags
    """`[N + 1]`, true at the earlier tokens that hold the answers."""


@dataclass(frozen=True)
class RetrievalSource(Settings, ABC):
    """A generator of sequences. Subclasses are plain settings.

    Attributes:
        axis: The setting that heat maps vary beside the length.
        axis_values: Values of that setting in a heat map, by default.
    """

    axis: ClassVar[str]
    axis_values: ClassVar[tuple[float, ...]]

    @property
    @abstractmethod
    def words(self) -> Sequence[str]:
        """The vocabulary, in order of the token ids; the first word is `EOS`."""

    @property
    @abstractmethod
    def least_length(self) -> int:
        """The smallest number of tokens `N` of a sequence."""

    @abstractmethod
    def draw(self, length: int, rng: Generator) -> Drawn:
        """Draw a sequence of `length + 1` tokens; `length` is at least `least_length`."""

    def varied(self, value: float) -> "RetrievalSource":
        """This source with another value of its `axis`.

        Raises:
            ValueError: If the value is out of range.
        """
        changes: dict[str, Any] = {self.axis: value}
        return replace(self, **changes)

    def check_length(self, length: int) -> None:
        """Check that sequences of `length` tokens can be drawn.

        Raises:
            ValueError: If they cannot; the message names the shortest length.
        """
        if length < self.least_length:
            raise ValueError(
                f"sequence_length={length} is too short for {self!r}, which needs at least "
                f"{self.least_length} tokens"
            )

    def _check_least(self, **least: int) -> None:
        for name, number in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < number:
                raise ValueError(f"{name} must be an integer of at least {number}, got {value}")

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: id for id, word in enumerate(self.words)}


@dataclass(frozen=True)
class Needles(RetrievalSource):
    """Multi-needle retrieval (Kamradt, 2023; differential transformer, section 3.3).

    The context is filler text with `num_needles` sentences "number CITY 4 7" at
    random places. It is followed by `num_queries` sentences about cities of the context, whose
    digits are the answers. Filler words, cities and digits are drawn uniformly; cities of one
    sequence are different.

    Args:
        num_needles: Number of needles, at least 1.
        num_queries: Number of queries, at least 1. Up to `num_needles`, they are about different
            cities; with more, each is about a random one, so that small models learn from more
            answers per sequence, and cannot guess what has not been asked for yet.
        num_digits: Number of digits of an answer, one token each.
        base: Number of different digits, at least 2.
        num_cities: Number of cities, at least `num_needles`.
        num_fillers: Number of different filler words, at least 1.
        depth: Where the needles that are asked for are in the filler text: 0 is the beginning, 1
            the end. They are then adjacent, and the others have random places. By default, all have
            random places.

    Raises:
        ValueError: If an argument is out of range.
    """

    axis: ClassVar[str] = "depth"
    axis_values: ClassVar[tuple[float, ...]] = (0.0, 0.25, 0.5, 0.75, 1.0)

    num_needles: int = 4
    num_queries: int = 2
    num_digits: int = 2
    base: int = 10
    num_cities: int = 32
    num_fillers: int = 32
    depth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(num_needles=1, num_queries=1, num_digits=1, base=2, num_cities=1)
        self._check_least(num_fillers=1)
        if self.num_cities < self.num_needles:
            raise ValueError(
                f"num_cities must be at least num_needles={self.num_needles}, got {self.num_cities}"
            )
        if self.depth is not None and not 0.0 <= self.depth <= 1.0:
            raise ValueError(f"depth must be in [0, 1], got {self.depth}")

    @cached_property
    def words(self) -> Sequence[str]:
        digits = map(str, range(self.base))
        cities = (f"city{number}" for number in range(self.num_cities))
        fillers = (f"filler{number}" for number in range(self.num_fillers))
        return (EOS, "number", *digits, *cities, *fillers)

    @property
    def _needle_length(self) -> int:
        return 2 + self.num_digits

    @property
    def least_length(self) -> int:
        return (self.num_needles + self.num_queries) * self._needle_length

    def draw(self, length: int, rng: Generator) -> Drawn:
        cities = rng.permutation(self.num_cities)[: self.num_needles]
        digits = rng.integers(self.base, size=(self.num_needles, self.num_digits))
        num_fillers = length + 1 - self.least_length
        fillers = rng.integers(self.num_fillers, size=num_fillers) + self._ids["filler0"]
        places = rng.integers(num_fillers, size=self.num_needles, endpoint=True)
        if self.num_queries <= self.num_needles:
            asked = rng.permutation(self.num_needles)[: self.num_queries]
        else:
            asked = rng.integers(self.num_needles, size=self.num_queries)
        if self.depth is not None:
            places[asked] = round(self.depth * num_fillers)
        # Needles at the same place are in random order, except that those asked for are adjacent.
        is_asked = np.isin(np.arange(self.num_needles), asked)
        order = np.lexsort((rng.random(self.num_needles), is_asked, places))

        parts: list[Ids] = []
        evidence: list[Flags] = []
        start = 0
        for needle in order:
            parts += [
                fillers[start : places[needle]],
                self._sentence(cities[needle], digits[needle]),
            ]
            evidence += [np.zeros(places[needle] - start, bool), is_asked[needle] & self._is_digit]
            start = int(places[needle])
        parts.append(fillers[start:])
        evidence.append(np.zeros(num_fillers - start, bool))
        targets = [np.full(sum(map(len, parts)), -1)]
        for needle in asked:
            sentence = self._sentence(cities[needle], digits[needle])
            parts.append(sentence)
            targets.append(np.where(self._is_digit, sentence, -1))
            evidence.append(np.zeros(self._needle_length, bool))
        return Drawn(*map(np.concatenate, (parts, targets, evidence)))

    def varied(self, value: float) -> "Needles":
        """This source with another depth, and with one query, since needles that are not asked for
        have random places."""
        return replace(self, depth=value, num_queries=1)

    @cached_property
    def _is_digit(self) -> Flags:
        place = np.arange(self._needle_length)
        return place >= 2

    def _sentence(self, city: int, digits: Ids) -> Ids:
        return np.array(
            [
                self._ids["number"],
                self._ids["city0"] + city,
                *(self._ids["0"] + digits),
            ]
        )


@dataclass(frozen=True)
class AssociativeRecall(RetrievalSource):
    """Multi-query associative recall (Arora et al. 2023, Zoology, section 4.1 and appendix C).

    `num_pairs` keys with their values are followed by random tokens among which every key occurs
    once more; its value must be predicted there. The distance of a second occurrence from the end
    of the pairs follows a power law. Keys of one sequence are different.

    Args:
        num_pairs: Number of pairs, at least 1.
        num_keys: Number of different keys, at least `num_pairs`.
        num_values: Number of different values, at least 1.
        power: Exponent of the power law, above 0; with 1, distances are uniform.

    Raises:
        ValueError: If an argument is out of range.
    """

    axis: ClassVar[str] = "num_pairs"
    axis_values: ClassVar[tuple[float, ...]] = (2, 4, 8, 16)

    num_pairs: int = 8
    num_keys: int = 64
    num_values: int = 64
    power: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(num_pairs=1, num_keys=1, num_values=1)
        if self.num_keys < self.num_pairs:
            raise ValueError(
                f"num_keys must be at least num_pairs={self.num_pairs}, got {self.num_keys}"
            )
        if self.power <= 0.0:
            raise ValueError(f"power must be above 0, got {self.power}")

    @cached_property
    def words(self) -> Sequence[str]:
        keys = (f"key{number}" for number in range(self.num_keys))
        return (EOS, *keys, *(f"value{number}" for number in range(self.num_values)))

    @property
    def least_length(self) -> int:
        return 4 * self.num_pairs

    def draw(self, length: int, rng: Generator) -> Drawn:
        num_context = 2 * self.num_pairs
        keys = 1 + rng.permutation(self.num_keys)[: self.num_pairs]
        values = 1 + self.num_keys + rng.integers(self.num_values, size=self.num_pairs)
        ids = 1 + rng.integers(len(self.words) - 1, size=length + 1)
        ids[:num_context:2], ids[1:num_context:2] = keys, values
        # A repeated key takes the first of two places; its value belongs to the second.
        num_places = (length - num_context) // 2
        weights = np.arange(1, num_places + 1) ** (self.power - 1.0)
        chosen = rng.choice(num_places, self.num_pairs, replace=False, p=weights / weights.sum())
        places = num_context + 2 * chosen
        # A key occurs twice and nowhere else.
        outside = ids[num_context:]
        is_key = np.isin(outside, keys)
        outside[is_key] = 1 + self.num_keys + rng.integers(self.num_values, size=is_key.sum())
        ids[places] = keys
        targets = np.full(length + 1, -1)
        targets[places + 1] = values
        evidence = np.zeros(length + 1, bool)
        evidence[1:num_context:2] = True
        return Drawn(ids, targets, evidence)


@dataclass(frozen=True)
class ManyShot(RetrievalSource):
    """Many-shot in-context classification.

    A sequence is a series of labeled examples followed by `num_queries` others whose labels are the
    answers. It has `num_classes` of `num_clusters` clusters, with random labels, which are
    therefore only known from the examples. An input consists of `num_words` words: those of its
    cluster, each replaced by a random word with probability `noise`. Clusters are fixed by `seed`.
    The first `num_classes` examples have different classes; the others have random ones. The end of
    the sequence is filled with examples, so that the number of shots follows from the length.

    Args:
        num_classes: Number of classes per sequence, at least 2.
        num_clusters: Number of clusters, at least `num_classes`.
        num_labels: Number of different labels, at least `num_classes`.
        num_words: Number of words per input, at least 1.
        num_different_words: Number of different words, at least 2.
        noise: Probability of a random word, in [0, 1).
        num_queries: Number of queries, at least 1.
        seed: Seed of the clusters, at least 0.

    Raises:
        ValueError: If an argument is out of range.
    """

    axis: ClassVar[str] = "num_classes"
    axis_values: ClassVar[tuple[float, ...]] = (2, 4, 6, 8)

    num_classes: int = 4
    num_clusters: int = 32
    num_labels: int = 16
    num_words: int = 2
    num_different_words: int = 32
    noise: float = 0.1
    num_queries: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(num_classes=2, num_words=1, num_different_words=2, num_queries=1, seed=0)
        for name in ("num_clusters", "num_labels"):
            if getattr(self, name) < self.num_classes:
                raise ValueError(
                    f"{name} must be at least num_classes={self.num_classes}, got "
                    f"{getattr(self, name)}"
                )
        if not 0.0 <= self.noise < 1.0:
            raise ValueError(f"noise must be in [0, 1), got {self.noise}")
        most = self.num_different_words**self.num_words
        if not self.num_clusters <= most < 2**62:
            raise ValueError(
                f"num_different_words={self.num_different_words} and num_words={self.num_words} "
                f"give {most:.3g} different inputs: there must be at least num_clusters="
                f"{self.num_clusters}, and fewer than 2 ** 62"
            )

    @cached_property
    def words(self) -> Sequence[str]:
        words = (f"word{number}" for number in range(self.num_different_words))
        return (EOS, *words, *(f"label{number}" for number in range(self.num_labels)))

    @property
    def least_length(self) -> int:
        return (self.num_classes + self.num_queries) * (self.num_words + 1)

    @cached_property
    def clusters(self) -> Ids:
        """The words of each cluster, `[num_clusters, num_words]`; no two clusters are equal."""
        shape = (self.num_different_words,) * self.num_words
        most = self.num_different_words**self.num_words
        chosen = sample_rng(self.seed).choice(most, self.num_clusters, replace=False)
        return 1 + np.stack(np.unravel_index(chosen, shape), axis=1)

    def draw(self, length: int, rng: Generator) -> Drawn:
        # The first tokens are left out where examples do not fill the sequence.
        width = self.num_words + 1
        num_examples, rest = divmod(length + 1, width)
        clusters = rng.permutation(self.num_clusters)[: self.num_classes]
        labels = rng.permutation(self.num_labels)[: self.num_classes]
        later = rng.integers(self.num_classes, size=num_examples - self.num_classes)
        classes = np.concatenate([rng.permutation(self.num_classes), later])
        inputs = self.clusters[clusters[classes]]
        others = 1 + rng.integers(self.num_different_words, size=inputs.shape)
        inputs = np.where(rng.random(inputs.shape) < self.noise, others, inputs)
        answers = 1 + self.num_different_words + labels[classes]
        ids = np.concatenate([np.zeros(rest, np.int64), np.c_[inputs, answers].ravel()])
        num_shots = num_examples - self.num_queries
        is_label = np.arange(width) == self.num_words
        is_query = np.arange(num_examples) >= num_shots
        is_asked = np.isin(classes, classes[num_shots:]) & ~is_query
        place_of = [np.outer(flags, is_label).ravel() for flags in (is_query, is_asked)]
        is_answer, evidence = (np.concatenate([np.zeros(rest, bool), each]) for each in place_of)
        return Drawn(ids, np.where(is_answer, ids, -1), evidence)
