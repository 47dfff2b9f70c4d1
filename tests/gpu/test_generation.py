"""Generation in a CUDA graph chooses the tokens of generation without one."""

import pytest
import torch

from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.models.generation import generate, stream
from diffmm.ops.kth_largest import kth_largest

pytestmark = pytest.mark.gpu


def make_model(attention):
    backbone = BackboneConfig(
        dim=256, depth=2, num_heads=4, num_kv_heads=2, attention=attention, rope="1d"
    )
    return TextModel(TextConfig(300, 600, backbone)).cuda().eval()


@pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled")  # by torch.compile in float64
@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
@pytest.mark.parametrize("compile", [False, True])
def test_the_graph_chooses_the_same_tokens(attention, compile):
    """In float64, where no two tokens are as likely up to the rounding of attention."""
    model = make_model(attention).double()
    called = torch.compile(model, dynamic=True) if compile else model
    for length in (7, 300):
        tokens = torch.randint(300, (3, length), device="cuda")
        key_padding = torch.arange(length, device="cuda") >= torch.tensor([[0], [3], [5]]).cuda()
        settings = {"max_new_tokens": 40, "key_padding": key_padding, "top_k": 20}
        found, wanted = (
            generate(
                called if graph else model,
                tokens,
                generator=torch.Generator("cuda").manual_seed(1),
                cuda_graph=graph,
                **settings,
            )
            for graph in (True, False)
        )
        assert torch.equal(found, wanted)


def test_the_first_replay_waits_for_the_capture(monkeypatch):
    """On a busy GPU, what torch does at the start of a capture comes late."""
    begin = torch.cuda.CUDAGraph.capture_begin

    def late(*args, **kwargs):
        torch.cuda._sleep(10**9)
        return begin(*args, **kwargs)

    model = make_model("diff_v2").double()
    tokens = torch.randint(300, (3, 7), device="cuda")
    found = []
    for graph in (False, True):
        if graph:
            monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", late)
        generator = torch.Generator("cuda").manual_seed(1)
        settings = {"max_new_tokens": 20, "generator": generator, "cuda_graph": graph}
        found.append(generate(model, tokens, **settings))
    assert torch.equal(*found)


def test_rows_stop_and_the_default_generator_is_left_where_it_should_be():
    model = make_model("diff_v2")
    tokens = torch.randint(300, (2, 5), device="cuda")
    stops = range(0, 300, 7)
    torch.cuda.manual_seed(3)
    wanted = generate(model, tokens, max_new_tokens=60, stop_ids=stops, cuda_graph=False)
    torch.cuda.manual_seed(3)
    found = generate(model, tokens, max_new_tokens=60, stop_ids=stops)
    assert torch.equal(found, wanted)
    assert found.shape[1] < 60


def test_low_precision_runs_and_streams():
    model = make_model("diff_v1").bfloat16()
    tokens = torch.randint(300, (1, 130), device="cuda")
    streamed = list(stream(model, tokens, max_new_tokens=30, temperature=0))
    assert len(streamed) == 30
    with_graph = torch.stack(streamed, dim=1)
    without = generate(model, tokens, max_new_tokens=30, temperature=0, cuda_graph=False)
    # The two ways round differently: the first tokens agree.
    assert torch.equal(with_graph[:, :3], without[:, :3])


@pytest.mark.parametrize("size", [300, 32000, 100288])
def test_the_kth_largest(size):
    logits = torch.randn(3, size, device="cuda")
    logits[1] = logits[1].round(decimals=1)  # ties
    for k in sorted({1, 50, min(513, size), min(514, size), size}):
        expected = logits.topk(k).values[:, -1:]
        assert torch.equal(kth_largest(logits, k), expected)
