"""Training by the fused kernels goes as training by torch's: the same loss curve, to noise.

Two runs that differ in rounding alone drift apart, some by ten times as much as others. So each
backend trains several times, from weights that differ by what bfloat16 rounds away, and the two
mean curves are compared: they may be at most `LIMIT` times as far apart as the spread of the sdpa
runs lets expect of the means of two such sets. (Both backends start from the same weights, which
brings them nearer than that, if anything.)

What this can see, on one H100 (v1, v2): the kernels were 0.38 and 0.40 of that apart; without
lambda's gradient 6.6 and 51, without that of the second key 13 and 1346, with noise as large as the
gradient of values 5.9 and 30. Half of the second query's gradient was 2.2 and 9.1 apart, and so
goes by in v1. Two sets of sdpa runs are beyond the limit in about 1 % of cases (v1, by bootstrap).
The learning rate decides it: at 2e-3 noise hid the first three (on a CPU).
"""

import sysconfig
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.gradients import make_decoder

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
STEPS, BATCH, LENGTH = 200, 16, 256
LEARNING_RATE, WARMUP = 5e-4, 20
NUM_RUNS, LIMIT = 8, 3.0
# Half of the distance between two bfloat16 numbers, relative.
ROUNDING = 2.0**-9


@pytest.fixture(scope="module")
def batches():
    """The same crops of Python's own sources for every run, as bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    corpus = b"".join(
        (folder / f"{name}.py").read_bytes() for name in ("argparse", "typing", "ast")
    )
    data = torch.frombuffer(bytearray(corpus), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(data) - LENGTH - 1, (STEPS, BATCH, 1), generator=generator)
    return data[starts + torch.arange(LENGTH + 1)].to(DEVICE)


def perturbed(weights, seed):
    """`weights` moved by up to what bfloat16 rounds away; seed 0 moves nothing."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def move(weight):
        noise = torch.rand(weight.shape, device=DEVICE, generator=generator) * 2 - 1
        return weight * (1 + (ROUNDING * noise if seed else 0.0))

    return {name: move(weight) for name, weight in weights.items()}


def train(model, forward, batches):
    """The loss of every step, `[STEPS]`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = forward(batch[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def distance(baselines, found):
    """How far the mean curves `[runs, STEPS]` are apart, in units of what is expected of noise.

    Root mean squares over curves that are averaged over 10 steps.
    """
    baselines, found = (c.unflatten(1, (-1, 10)).mean(dim=2) for c in (baselines, found))
    noise = baselines.var(dim=0) * (1 / len(baselines) + 1 / len(found))
    apart = baselines.mean(dim=0) - found.mean(dim=0)
    return (apart.square().mean() / noise.mean()).sqrt().item()


def curves(attention, backend, batches):
    """The losses of all runs, `[NUM_RUNS, STEPS]`."""
    model = make_decoder(attention, head_dim=32, backend=backend, dim=128, depth=2).to(DEVICE)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    forward = torch.compile(model)
    runs = []
    for seed in range(NUM_RUNS):
        model.load_state_dict(perturbed(weights, seed))
        runs.append(train(model, forward, batches))
    return torch.stack(runs)


@pytest.fixture(scope="module", params=["diff_v1", "diff_v2"])
def baselines(request, batches):
    """An attention, and its curves by torch's kernels."""
    found = curves(request.param, "sdpa", batches)
    assert found[:, -20:].mean() < 0.7 * found[:, :5].mean(), "it has learned nothing"
    return request.param, found


def test_both_backends_train_alike(baselines, batches):
    attention, by_torch = baselines
    assert distance(by_torch, curves(attention, "triton", batches)) <= LIMIT


def test_a_lost_gradient_is_seen(baselines, batches, monkeypatch):
    from diffmm.ops.diff_attention.triton import op

    backward = op.backward

    def without_lambda(*args, **kwargs):
        *gradients, lam = backward(*args, **kwargs)
        return *gradients, torch.zeros_like(lam)

    monkeypatch.setattr(op, "backward", without_lambda)
    attention, by_torch = baselines
    assert distance(by_torch, curves(attention, "triton", batches)) > LIMIT
