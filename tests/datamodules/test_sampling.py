"""Samplers distribute and shuffle; random numbers depend on (seed, epoch, index) only."""

import math
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import datamodules
from datamodules.shared.evaluation import EvaluationLoader, EvaluationSampler
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.sampling import (
    EpochSampler,
    SeededDataset,
    sample_generator,
    sample_rng,
    seeded,
)
from diffmm.batch import REPEATED


class Draws(SeededDataset[torch.Tensor]):
    """Returns the index, the epoch and a random draw."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def sample(self, epoch: int, index: int) -> torch.Tensor:
        with seeded(3, epoch, index):
            draws = torch.rand(1).item(), random.random(), np.random.rand()
        return torch.tensor([index, epoch, *draws], dtype=torch.float64)


class Numbered(Draws):
    """Returns the index only, in a dict like a batch."""

    def sample(self, epoch: int, index: int) -> dict[str, int]:  # type: ignore[override]
        return {"index": index}


def sampler(num_samples: int = 10, **changes: object) -> EpochSampler:
    return EpochSampler(num_samples, **{"shuffle": True, "seed": 1, **changes})  # type: ignore[arg-type]


def all_draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]


def test_random_numbers_follow_their_key() -> None:
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0), (0,)]
    for make in (
        lambda *key: sample_rng(*key).random(4).tolist(),
        lambda *key: torch.rand(4, generator=sample_generator(*key)).tolist(),
    ):
        draws = [make(*key) for key in keys]
        assert draws == [make(*key) for key in keys]
        assert all(a != b for a, b in pairwise(sorted(draws)))


def test_seeded_fixes_the_body_and_restores_the_rest() -> None:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    undisturbed = all_draws()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with seeded(5, 1, 2):
        inside = all_draws()
    assert all_draws() == undisturbed
    with seeded(5, 1, 2):
        assert all_draws() == inside
    with seeded(5, 2, 2):
        assert not set(all_draws()) & set(inside)


def test_seeded_restores_after_an_error() -> None:
    state = torch.get_rng_state(), random.getstate()
    with pytest.raises(KeyError), seeded(0, 0, 0):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


@given(
    num_samples=st.integers(5, 50),
    world_size=st.integers(1, 5),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_processes_share_samples_evenly_and_repeat_none(
    num_samples: int, world_size: int, shuffle: bool, epoch: int
) -> None:
    shares = []
    for rank in range(world_size):
        share = sampler(num_samples, shuffle=shuffle, rank=rank, world_size=world_size)
        share.set_epoch(epoch)
        shares.append(list(share))
        assert len(shares[-1]) == len(share)
    assert len({len(share) for share in shares}) == 1
    indices = [index for share in shares for _, index in share]
    assert len(set(indices)) == len(indices) == num_samples // world_size * world_size
    assert {of for share in shares for of, _ in share} == {epoch}


def test_two_processes_make_the_batches_of_one() -> None:
    one = list(sampler(12))
    two = [list(sampler(12, rank=r, world_size=2)) for r in range(2)]
    for start in range(0, 12, 4):
        together = two[0][start // 2 : start // 2 + 2] + two[1][start // 2 : start // 2 + 2]
        assert set(together) == set(one[start : start + 4])


def test_the_order_follows_epoch_and_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        it = sampler(30, seed=seed)
        it.set_epoch(epoch)
        return [index for _, index in it]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(*pair)) for pair in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_resumes_where_it_stopped(world_size: int) -> None:
    whole = sampler(12)
    whole.set_epoch(3)
    order = list(whole)
    state = whole.state_dict(position=4)
    rest = []
    for rank in range(world_size):
        resumed = sampler(12, rank=rank, world_size=world_size)
        resumed.load_state_dict(state)
        resumed.set_epoch(3)  # as Lightning does at the start of every epoch
        rest.append(list(resumed))
        resumed.set_epoch(4)
        assert len(list(resumed)) == 12 // world_size
    assert [key for keys in zip(*rest, strict=True) for key in keys] == order[4:]


def test_resuming_another_order_is_refused() -> None:
    state = sampler(10).state_dict(position=3)
    with pytest.raises(ValueError, match=r"'seed': 1.*'seed': 2.*same data and seed"):
        sampler(10, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="2 processes cannot resume at sample 3"):
        sampler(10, world_size=2).load_state_dict(state)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="0 samples are too few for 1 process"):
        sampler(0)
    with pytest.raises(ValueError, match="3 samples are too few for 4 process"):
        sampler(3, world_size=4)
    with pytest.raises(ValueError, match="at least one sample to evaluate, got 0"):
        EvaluationSampler(0, batch_size=1)


def test_evaluation_is_in_order_and_knows_no_epoch() -> None:
    it = EvaluationSampler(5, batch_size=2)
    it.set_epoch(7)
    assert list(it) == [(0, index) for index in range(5)]


@given(
    num_samples=st.integers(1, 30),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 4),
)
def test_evaluation_counts_each_sample_once_in_as_many_batches_everywhere(
    num_samples: int, world_size: int, batch_size: int
) -> None:
    counted, lengths = [], set()
    for rank in range(world_size):
        it = EvaluationSampler(num_samples, batch_size=batch_size, rank=rank, world_size=world_size)
        loader = EvaluationLoader(Numbered(num_samples), batch_size, sampler=it)
        batches = list(loader)
        lengths |= {len(batches), len(loader)}
        counted += [b["index"].tolist() for b in batches if REPEATED not in b]
        repeated = [b for b in batches if REPEATED in b]
        assert all(b[REPEATED].all() and b[REPEATED].shape == b["index"].shape for b in repeated)
        assert len(repeated) < 2
    assert sorted(index for batch in counted for index in batch) == list(range(num_samples))
    assert lengths == {math.ceil(math.ceil(num_samples / world_size) / batch_size)}


def test_a_dataset_takes_keys_and_plain_indices() -> None:
    dataset = Draws(3)
    assert torch.equal(dataset[1], dataset[0, 1])
    assert not torch.equal(dataset[1], dataset[1, 1])
    assert len(list(dataset)) == 3  # type: ignore[call-overload]
    with pytest.raises(IndexError, match="index 3 is out of range for 3 samples"):
        dataset[3]


def test_workers_change_nothing_and_persistent_ones_know_the_epoch() -> None:
    def epochs(num_workers: int) -> list[torch.Tensor]:
        module = SeededDataModule(batch_size=2, num_workers=num_workers, seed=1)
        loader = module.training_loader(Draws(7))
        batches = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            batches.append(torch.stack(list(loader)))
        return batches

    alone, helped = epochs(0), epochs(2)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert alone[0].shape == (3, 2, 5)
    assert (alone[0][..., 1] == 0).all()
    assert (alone[1][..., 1] == 1).all()


def test_evaluation_loader_keeps_the_last_partial_batch() -> None:
    module = SeededDataModule(batch_size=4, num_workers=0, seed=1)
    loader = module.evaluation_loader(Draws(6))
    assert isinstance(loader, DataLoader)
    assert [len(batch) for batch in loader] == [4, 2]


def test_loader_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SeededDataModule(batch_size=0, num_workers=0, seed=0)
    with pytest.raises(ValueError, match="num_workers must be at least 0, got -1"):
        SeededDataModule(batch_size=1, num_workers=-1, seed=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -3"):
        SeededDataModule(batch_size=1, num_workers=0, seed=-3)
    module = SeededDataModule(batch_size=8, num_workers=0, seed=0)
    with pytest.raises(ValueError, match=r"6 training samples do not fill.*batch_size is 8"):
        module.training_loader(Draws(6))


def test_the_package_is_light_and_names_its_modules() -> None:
    code = "import sys, datamodules; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"TextData", "ImageData", "AudioData"} <= set(dir(datamodules))
    with pytest.raises(AttributeError, match="'datamodules' has no attribute 'VideoData'"):
        _ = datamodules.VideoData
