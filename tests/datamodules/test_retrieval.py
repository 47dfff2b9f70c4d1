"""Generated retrieval tasks: each answer is in the context where the evidence says."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from datamodules import RetrievalData
from datamodules.text import AssociativeRecall, ManyShot, Needles
from datamodules.text.retrieval.data import TEST, TRAIN, VAL, RetrievalSamples
from datamodules.text.retrieval.sources import EOS
from diffmm.batch import IGNORE_INDEX
from diffmm.hub.readers import make_reader
from diffmm.models.job import Job

SOURCES = (
    Needles(),
    Needles(num_needles=3, num_queries=3, num_digits=1, base=99, num_cities=3, num_fillers=1),
    AssociativeRecall(),
    AssociativeRecall(num_pairs=4, num_keys=4, num_values=1, power=1.0),
    ManyShot(),
    ManyShot(num_classes=2, num_words=1, noise=0.5, num_queries=1),
)
ids = [f"{type(source).__name__}{number}" for number, source in enumerate(SOURCES)]


def drawn(source, length, seed=0):
    """Words, answers by place, and evidence of a sequence of `length + 1` tokens."""
    source.check_length(length)
    sequence = source.draw(length, np.random.default_rng(seed))
    words = np.array(source.words)
    answers = {i: words[target] for i, target in enumerate(sequence.targets) if target >= 0}
    return words[sequence.ids].tolist(), answers, sequence.evidence


@pytest.mark.parametrize("source", SOURCES, ids=ids)
def test_sequences_have_their_length_and_evidence_precedes_answers(source):
    for length in (source.least_length, source.least_length + 1, 97):
        words, answers, evidence = drawn(source, length)
        assert len(words) == len(evidence) == length + 1
        assert answers
        assert evidence.any()
        assert np.flatnonzero(evidence).max() < min(answers)
        # What is to be found is in the context.
        assert {words[i] for i in np.flatnonzero(evidence)} >= set(answers.values())


def needles_in(words):
    """The place and the digits of each needle, by city; queries come last."""
    found = {}
    for place in range(len(words) - 1):
        if words[place] == "number":
            end = place + 2
            while end < len(words) and words[end].isdigit():
                end += 1
            found.setdefault(words[place + 1], []).append((place, words[place + 2 : end]))
    return found


def test_needles_answer_the_queries():
    source = Needles(num_needles=5, num_queries=2, num_digits=3)
    for seed in range(20):
        words, answers, evidence = drawn(source, 120, seed)
        found = needles_in(words)
        asked = {city: places for city, places in found.items() if len(places) == 2}
        assert len(found) == 5
        assert len(asked) == 2
        assert all(len(digits) == 3 for places in found.values() for _, digits in places)
        held, given = [], {}
        for (first, digits), (second, again) in asked.values():
            assert digits == again
            held += range(first + 2, first + 5)
            given.update(zip(range(second + 2, second + 5), digits, strict=True))
        assert np.flatnonzero(evidence).tolist() == sorted(held)
        assert answers == given


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_that_are_asked_for_are_at_their_depth(depth):
    source = Needles(num_needles=4, num_queries=2, num_digits=1, depth=depth)
    length = source.least_length + 100
    num_fillers = 101
    for seed in range(10):
        words, _, _ = drawn(source, length, seed)
        places = sorted(where[0][0] for where in needles_in(words).values() if len(where) == 2)
        assert places[1] - places[0] == 3
        before = sum(word.startswith("filler") for word in words[: places[0]])
        assert before == round(depth * num_fillers)


def test_needles_are_asked_for_again_at_random():
    source = Needles(num_needles=3, num_queries=60, num_digits=1)
    words, answers, evidence = drawn(source, 250)
    found = needles_in(words)
    counts = sorted(len(places) - 1 for places in found.values())
    assert sum(counts) == len(answers) == 60
    assert 8 < counts[0] <= counts[-1] < 35
    assert evidence.sum() == 3
    assert all(len({tuple(digits) for _, digits in places}) == 1 for places in found.values())
    # Nothing is to be guessed from what was asked for before.
    cities = [words[place - 1] for place in sorted(answers)]
    assert any(first == second for first, second in pairwise(cities))


def test_a_heat_map_asks_for_one_needle():
    varied = Needles(num_queries=6).varied(0.25)
    assert (varied.depth, varied.num_queries, varied.words) == (0.25, 1, Needles().words)


def test_needles_are_at_all_depths_otherwise():
    source = Needles(num_needles=1, num_queries=1)
    places = [drawn(source, 100, seed)[2].argmax() for seed in range(300)]
    quarters = np.histogram(places, 4, (0, 90))[0]
    assert quarters.min() > 40


def test_recalled_values_belong_to_their_keys():
    source = AssociativeRecall(num_pairs=6)
    for seed in range(20):
        words, answers, evidence = drawn(source, 63, seed)
        pairs = dict(zip(words[0:12:2], words[1:12:2], strict=True))
        assert len(pairs) == len(answers) == 6
        assert np.flatnonzero(evidence).tolist() == list(range(1, 12, 2))
        assert all(pairs[words[place - 1]] == value for place, value in answers.items())
        # A key occurs once more and nowhere else.
        assert sum(word in pairs for word in words[12:]) == 6


def test_recall_follows_a_power_law():
    def mean_place(power):
        source = AssociativeRecall(num_pairs=1, power=power)
        return np.mean([min(drawn(source, 127, seed)[1]) for seed in range(200)])

    assert mean_place(1.0) == pytest.approx(2 + 63, abs=8)
    assert mean_place(0.1) < 40


def test_shots_give_the_label_of_a_query():
    source = ManyShot(noise=0.0, num_queries=3)
    for seed in range(20):
        words, answers, evidence = drawn(source, 89, seed)
        shots = [tuple(words[place : place + 3]) for place in range(0, 90, 3)]
        assert sorted(answers) == [83, 86, 89]
        known = {shot[:2]: shot[2] for shot in shots[:-3]}
        assert len(known) == 4, "every class has an example"
        for place in answers:
            shot = shots[place // 3]
            assert known[shot[:2]] == answers[place] == shot[2]
        asked = {answers[place] for place in answers}
        assert [bool(flag) for flag in evidence[2:81:3]] == [s[2] in asked for s in shots[:-3]]
        assert evidence.sum() == evidence[2:81:3].sum()


def test_noise_replaces_words():
    source = ManyShot(noise=0.3, num_words=1, num_classes=2, num_different_words=1000)
    own = {source.words[word] for word in source.clusters.ravel()}
    words, _, _ = drawn(source, 3999)
    shares = np.mean([word in own for word in words[::2]])
    assert shares == pytest.approx(0.7, abs=0.05)


def test_splits_epochs_and_seeds_differ_and_workers_do_not_matter():
    def tokens(split=TRAIN, epoch=0, index=0, seed=0):
        samples = RetrievalSamples(Needles(), length=64, num_samples=4, split=split, seed=seed)
        return samples[epoch, index]["tokens"].tolist()

    assert tokens() == tokens()
    others = [tokens(VAL), tokens(TEST), tokens(epoch=1), tokens(index=1), tokens(seed=1)]
    assert all(tokens() != other for other in others)
    runs = []
    for num_workers in (0, 1):
        data = RetrievalData(
            AssociativeRecall(num_pairs=2),
            sequence_length=16,
            num_samples=8,
            batch_size=4,
            num_workers=num_workers,
        )
        runs.append([batch["tokens"] for batch in data.train_dataloader()])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("source", SOURCES, ids=ids)
def test_batches(source):
    data = RetrievalData(source, sequence_length=61, batch_size=3, num_val_samples=4)
    batch, last = data.val_dataloader()
    assert [len(batch["index"]), len(last["index"])] == [3, 1]
    assert batch["tokens"].shape == batch["targets"].shape == batch["evidence"].shape == (3, 61)
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert batch["evidence"].dtype == torch.bool
    assert batch["tokens"].max() < len(source.words)
    # Targets are one place before their token.
    sequence = data.samples(VAL).source.draw(61, np.random.default_rng(0))
    row = RetrievalSamples(source, length=61, num_samples=1, split=VAL, seed=0).sample(0, 0)
    assert (row["targets"] != IGNORE_INDEX).sum() == (sequence.targets >= 0).sum()
    shown = row["tokens"][1:][row["targets"][:-1] != IGNORE_INDEX]
    if not isinstance(source, AssociativeRecall):
        assert torch.equal(shown, row["targets"][:-1][row["targets"][:-1] != IGNORE_INDEX])


def test_prompts_are_words():
    data = RetrievalData(Needles())
    reader = make_reader(Job(reader=data.describe_inputs()["reader"]), origin="the test")
    tokens = reader.read("number city3 7")["tokens"]
    assert [data.source.words[token] for token in tokens] == ["number", "city3", "7"]
    assert reader.encoder.decode(tokens) == "number city3 7"
    assert reader.encoder.eos_id == 0


def test_examination():
    lines = RetrievalData(Needles(num_digits=3), num_samples=50, batch_size=5).examine(8).lines
    assert lines["training"] == "50 samples of 128 tokens, 6 answer tokens each"
    assert list(lines) == ["training", "validation", "test"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Needles(num_needles=0), "num_needles must be an integer of at least 1, got 0"),
        (lambda: Needles(num_queries=0), "num_queries must be an integer of at least 1, got 0"),
        (lambda: Needles(base=1), "base must be an integer of at least 2, got 1"),
        (lambda: Needles(num_cities=3), "num_cities must be at least num_needles=4, got 3"),
        (lambda: Needles(depth=1.5), r"depth must be in \[0, 1\], got 1.5"),
        (lambda: Needles().varied(-1.0), r"depth must be in \[0, 1\], got -1.0"),
        (lambda: AssociativeRecall(num_keys=3), "num_keys must be at least num_pairs=8, got 3"),
        (lambda: AssociativeRecall(power=0.0), "power must be above 0, got 0.0"),
        (lambda: AssociativeRecall().varied(2.5), "num_pairs must be an integer .*, got 2.5"),
        (lambda: ManyShot(num_classes=1), "num_classes must be an integer of at least 2, got 1"),
        (lambda: ManyShot(num_labels=3), "num_labels must be at least num_classes=4, got 3"),
        (lambda: ManyShot(noise=1.0), r"noise must be in \[0, 1\), got 1.0"),
        (lambda: ManyShot(num_words=1, num_clusters=33), "give 32 different inputs"),
        (lambda: ManyShot(num_words=60), "fewer than 2 \\*\\* 62"),
        (
            lambda: RetrievalData(Needles(), sequence_length=23),
            r"sequence_length=23 is too short for Needles\(.*, which needs at least 24 tokens",
        ),
        (
            lambda: RetrievalData(Needles(), vocab_size=75),
            "has 76 words, which exceeds the model's vocab_size of 75",
        ),
        (lambda: RetrievalData(num_val_samples=0), "num_val_samples must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_tokenizer_has_the_words_and_one_special_token():
    data = RetrievalData(Needles())
    words = data.source.words
    assert data.tokenizer.vocab_size == len(words)
    assert data.tokenizer.special_ids == {words.index(EOS)}
    assert data.tokenizer.decode([words.index("number"), words.index("city3")]) == "number city3"
