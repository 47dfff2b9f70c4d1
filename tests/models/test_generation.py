"""Generation: greedy, sampled, batched, streamed, and all errors."""

import math
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.models.generation import generate, stream
from diffmm.models.sampling import Noise, Sampling

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")


def make_model(attention="diff_v1", *, causal=True, max_length=48, depth=2):
    backbone = BackboneConfig(
        dim=64, depth=depth, num_heads=8, num_kv_heads=4, attention=attention, rope="1d"
    )
    config = TextConfig(
        vocab_size=40,
        max_length=max_length,
        backbone=backbone,
        causal=causal,
        tie_embeddings=False,
    )
    model = TextModel(config).eval()
    # Large weights, so that the most likely token depends on the whole prompt.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    torch.nn.init.normal_(model.embedding.weight)
    return model


def greedy_without_cache(model, tokens, num_new):
    for _ in range(num_new):
        new = model(tokens)[:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens[:, -num_new:]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_greedy_is_what_full_forwards_would_choose(attention):
    model = make_model(attention)
    tokens = torch.randint(0, 40, (3, 7))
    new = generate(model, tokens, max_new_tokens=20, temperature=0)
    assert torch.equal(new, greedy_without_cache(model, tokens, 20))
    assert len(new.unique()) > 5, "the model repeats itself: this test would not see much"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_left_padded_prompts_go_on_as_they_would_alone(attention):
    model = make_model(attention)
    lengths = (9, 4, 1)
    prompts = [torch.randint(0, 40, (length,)) for length in lengths]
    batch = torch.full((3, 9), 39)
    key_padding = torch.zeros(3, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - len(prompt) :] = prompt
        key_padding[row, 9 - len(prompt) :] = True
    together = generate(model, batch, max_new_tokens=12, temperature=0, key_padding=key_padding)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], max_new_tokens=12, temperature=0)
        assert torch.equal(together[row], alone[0]), f"prompt of {len(prompt)} tokens"
    ignored = generate(model, batch, max_new_tokens=12, temperature=0)
    assert not torch.equal(together, ignored), "padding made no difference: a blind test"


def test_positions_count_real_tokens():
    # Rotary positions are relative, so outputs would not differ, except for the precision of long
    # prompts.
    model = make_model()
    seen = []
    model.backbone.rope.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    key_padding = torch.tensor([[False, False, True, True], [True] * 4])
    tokens = torch.randint(0, 40, (2, 4))
    generate(model, tokens, max_new_tokens=3, key_padding=key_padding)
    positions = torch.cat(seen, dim=1)
    assert positions.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_stream_gives_each_step_at_once_and_generate_gives_them_all():
    model = make_model()
    tokens = torch.randint(0, 40, (2, 5))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    steps = stream(model, tokens, max_new_tokens=6, temperature=0)
    first = next(steps)
    assert first.shape == (2,)
    assert len(calls) == 0, "the first token needs the prompt alone"
    second = next(steps)
    assert len(calls) == 1, "a step was computed before it was asked for"
    rest = list(steps)
    together = torch.stack([first, second, *rest], dim=1)
    assert torch.equal(together, generate(model, tokens, max_new_tokens=6, temperature=0))


def test_rows_stop_by_themselves_and_the_batch_when_all_have():
    model = make_model()
    tokens = torch.randint(0, 40, (3, 6))
    free = generate(model, tokens, max_new_tokens=24, temperature=0)
    stop_ids = [free[0, 3].item(), free[1, 7].item(), free[2, 5].item()]
    stopped = generate(model, tokens, max_new_tokens=24, temperature=0, stop_ids=stop_ids)
    padded = generate(model, tokens, max_new_tokens=24, temperature=0, stop_ids=stop_ids, pad_id=39)
    ends = [
        next(step for step in range(24) if free[row, step].item() in stop_ids) for row in range(3)
    ]
    assert len(set(ends)) > 1
    assert stopped.shape == (3, max(ends) + 1)
    for row, end in enumerate(ends):
        assert torch.equal(stopped[row, : end + 1], free[row, : end + 1])
        assert (stopped[row, end + 1 :] == stop_ids[0]).all()
        assert (padded[row, end + 1 :] == 39).all()


def test_the_same_generator_draws_the_same():
    model = make_model()
    tokens = torch.randint(0, 40, (2, 5))

    def drawn(seed, temperature=1.0):
        generator = torch.Generator().manual_seed(seed)
        return generate(
            model, tokens, max_new_tokens=16, temperature=temperature, generator=generator
        )

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    drawn(3)
    assert torch.equal(torch.rand(1), before), "the default generator was used"
    greedy = generate(model, tokens, max_new_tokens=16, temperature=0)
    for temperature in (1e-4, 1e-6, 1e-7, 1e-40, 5e-324):
        assert torch.equal(drawn(1, temperature=temperature), greedy)


def sample(logits, *settings, **options):
    sampling = Sampling(*settings, **options)
    noise = Noise(sampling, logits, None)
    noise.advance()
    return sampling.choose(logits, None if noise.rows is None else noise.rows[0])


def test_each_step_has_random_numbers_of_its_own():
    """Also after all rows have been used, which is when they are made anew."""
    noise = Noise(Sampling(), torch.empty(2, 50000), torch.Generator().manual_seed(0))
    assert len(noise.rows) == 2
    used = []
    for step in range(5):
        noise.advance()
        used.append(noise.rows[step % 2].clone())
    assert len({tuple(numbers[0, :3].tolist()) for numbers in used}) == 5
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(used[1], torch.empty(2, 2, 50000).exponential_(generator=generator).log()[1])
    assert Noise(Sampling(0.0), torch.empty(2, 5), None).rows is None


@pytest.mark.parametrize("lookup", [None, 3])
def test_steps_draw_independently(lookup):
    """Of a model whose tokens are almost equally likely."""
    found = generate(
        make_model(max_length=64),
        torch.zeros(1, 2, dtype=torch.long),
        max_new_tokens=50,
        temperature=1e9,
        generator=torch.Generator().manual_seed(0),
        prompt_lookup_num_tokens=lookup,
    )
    # 50 draws of 40 tokens have 28.7 different ones on average, with a deviation of 2.3.
    assert 20 < len(found.unique()) < 38
    assert len(set(zip(found[0, :-1].tolist(), found[0, 1:].tolist(), strict=True))) > 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-40, 9e-7, 1e-6, 1e-3])
def test_cold_samples_are_the_likeliest(temperature, dtype):
    logits = torch.tensor([[0.0, 3e4, -math.inf, 2e4]], dtype=dtype)
    assert sample(logits.expand(50, -1), temperature, top_p=0.9).eq(1).all()


def test_hot_samples_are_even():
    drawn = sample(torch.tensor([[0.0, 3e4]]).expand(500, -1), 1e300)
    assert 200 < drawn.sum() < 300


def frequencies(logits, **options):
    drawn = sample(logits.expand(20000, -1), **options)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / 20000


def test_sampling_follows_the_probabilities():
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    logits = probabilities.log() + 3.0
    torch.testing.assert_close(frequencies(logits), probabilities, atol=0.015, rtol=0)
    sharp = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(logits, temperature=0.5), sharp, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.66}, {1, 3, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        # Of the two tokens of top_k, the first has a probability of 0.4 / 0.65.
        ({"top_k": 2, "top_p": 0.6}, {1}),
        ({"top_k": 2, "top_p": 0.63}, {1, 3}),
    ],
)
def test_cuts_keep_the_likeliest(options, kept):
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    found = frequencies(probabilities.log(), **options)
    assert set(found.nonzero().flatten().tolist()) == kept
    expected = torch.zeros(5)
    expected[list(kept)] = probabilities[list(kept)]
    torch.testing.assert_close(found, expected / expected.sum(), atol=0.015, rtol=0)


def test_generation_fills_max_length_to_the_last_token():
    model = make_model(max_length=12)
    tokens = torch.randint(0, 40, (1, 7))
    assert generate(model, tokens, max_new_tokens=5).shape == (1, 5)


def test_generated_tokens_can_be_trained_on():
    model = make_model()
    tokens = torch.randint(0, 40, (1, 4))
    new = next(stream(model, tokens, max_new_tokens=4))
    model.train()(new[:, None]).sum().backward()
    assert model.embedding.weight.grad is not None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_under_autocast_and_in_half_precision(attention):
    model = make_model(attention)
    tokens = torch.randint(0, 40, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, tokens, max_new_tokens=4).shape == (2, 4)
    assert generate(model.bfloat16(), tokens, max_new_tokens=4).shape == (2, 4)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_a_compiled_model_writes_the_same_and_is_compiled_a_bounded_number_of_times(
    attention, monkeypatch
):
    model = make_model(attention, depth=1)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    # Prompts are compiled separately: to machine code in one of the cases, which takes long.
    prompts = CompileCounterWithBackend("inductor" if attention == "diff_v1" else "eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=prompts))
    tokens = torch.randint(0, 40, (2, 9))
    key_padding = torch.ones(2, 9, dtype=torch.bool)
    key_padding[0, :2] = False

    def check(tokens, **options):
        options = {"max_new_tokens": 20, "temperature": 0} | options
        assert torch.equal(
            generate(compiled, tokens, **options), generate(model, tokens, **options)
        )

    check(tokens)
    # Once for the first length of the cache, and once for all others.
    assert counter.frame_count <= 2
    for length in (3, 8):
        check(tokens[:, :length], max_new_tokens=24)
    counts = [counter.frame_count]
    for length in (9, 7, 5):
        check(tokens[:, -length:], key_padding=key_padding[:, -length:])
        counts.append(counter.frame_count)
    assert counts[0] <= 3
    assert counts[-1] <= 5
    assert prompts.frame_count <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        (
            {"max_new_tokens": 44},
            "prompt of 5 tokens plus max_new_tokens=44 exceeds the model's max_length=48",
        ),
        ({"temperature": -0.1}, r"temperature must be finite and at least 0 \(greedy\), got -0.1"),
        ({"temperature": math.nan}, "temperature must be finite and .*, got nan"),
        ({"temperature": math.inf}, "temperature must be finite and .*, got inf"),
        ({"temperature": -math.inf}, "temperature must be finite and .*, got -inf"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": 2.5}, "top_k must be an integer of at least 1, got 2.5"),
        ({"top_k": math.nan}, "top_k must be an integer of at least 1, got nan"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer of at least 1, got 2.5"),
        ({"max_new_tokens": math.nan}, "max_new_tokens must be an integer .*, got nan"),
        ({"max_new_tokens": 10**30}, "exceeds the model's max_length=48"),
        ({"top_p": math.nan}, r"top_p must be in \(0, 1\], got nan"),
        ({"top_p": math.inf}, r"top_p must be in \(0, 1\], got inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        (
            {"key_padding": torch.tensor([[True] * 5, [True] * 4 + [False]])},
            "padded on the left and end with a real token, but row 1 does not",
        ),
        (
            {"key_padding": torch.tensor([[True, False, True, True, True], [True] * 5])},
            "padded on the left and end with a real token, but row 0 does not",
        ),
        (
            {"key_padding": torch.tensor([[True] * 5, [False] * 5])},
            "padded on the left and end with a real token, but row 1 does not",
        ),
        (
            {"key_padding": torch.ones(2, 4, dtype=torch.bool)},
            r"key_padding must be booleans of the prompts' shape \(2, 5\), .* of shape \(2, 4\)",
        ),
        ({"key_padding": torch.ones(2, 5)}, "key_padding must be booleans .* got torch.float32"),
        ({"stop_ids": 5}, r"stop_ids must be integers, such as \[0, 5\], got 5"),
        ({"stop_ids": [5.5]}, r"stop_ids must be integers, .* got \[5.5\]"),
        ({"stop_ids": "end"}, "stop_ids must be integers, .* got 'end'"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_first_step(options, message):
    tokens = torch.randint(0, 40, (2, 5))
    with pytest.raises(ValueError, match=message):
        stream(make_model(), tokens, **({"max_new_tokens": 4} | options))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[1, 40, 2]]), r"ids from 0 to 39 .*vocab_size is 40\), got 40"),
        (torch.tensor([[1, -1]]), "ids from 0 to 39 .* got -1"),
        (torch.tensor([[1.0]]), "tokens must be int64 or int32, got torch.float32"),
        (torch.ones(1, 48, dtype=torch.int64), "48 tokens leaves no room .*max_length=48: shorten"),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        stream(make_model(), tokens, max_new_tokens=1)


def test_ids_that_stop_may_be_a_tensor():
    model, tokens = make_model(), torch.randint(0, 40, (2, 5))
    first = generate(model, tokens, max_new_tokens=1, temperature=0.0)[:, 0]
    stopped = generate(model, tokens, max_new_tokens=9, temperature=0.0, stop_ids=first.unique())
    assert torch.equal(stopped, first[:, None])


@pytest.mark.parametrize("shape", [(5,), (2, 0), (0, 5)])
def test_prompts_without_a_token_are_refused(shape):
    with pytest.raises(ValueError, match=r"prompts must be \[B, N\] with at least one token"):
        generate(make_model(), torch.zeros(shape, dtype=torch.long), max_new_tokens=4)


def test_models_that_cannot_write_are_refused():
    tokens = torch.randint(0, 40, (2, 5))
    with pytest.raises(ValueError, match=r"the model is an encoder \(causal=False\)"):
        generate(make_model(causal=False), tokens, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"training mode: call model.eval\(\)"):
        generate(make_model().train(), tokens, max_new_tokens=4)


class Replayed:
    """In a CUDA graph's place: does again what the graph would do."""

    def __init__(self, steps):
        self.replay = steps.step


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_of_a_graph_choose_the_same_tokens(attention, padded, monkeypatch):
    """Whole buffers and a mask that grows, in place of a cache that grows."""
    from diffmm.models import decoding
    from diffmm.models.prompt import text_prompt

    model = make_model(attention, max_length=300)
    tokens = torch.randint(0, 40, (3, 9))
    key_padding = torch.arange(9) >= torch.tensor([[0], [4], [8]]) if padded else None
    settings = {"max_new_tokens": 30, "temperature": 0.7, "top_k": 9, "stop_ids": [3, 5]}

    def tokens_by(cuda_graph):
        generator = torch.Generator().manual_seed(5)
        choice = decoding.Choice(Sampling(0.7, 9), (3, 5), 3, generator)
        with torch.no_grad():
            prompt = text_prompt(model.forward_features, tokens, key_padding)
            steps = decoding.prepare(model, model, prompt, 30, choice, cuda_graph=cuda_graph)
            return torch.stack([steps.first, *(steps.next() for _ in range(29))], dim=1), steps

    monkeypatch.setattr(decoding.GraphedSteps, "_capture", lambda steps: Replayed(steps))
    wanted, _ = tokens_by(cuda_graph=False)
    found, steps = tokens_by(cuda_graph=True)
    assert torch.equal(found, wanted)
    assert int(steps.cache.length) == 9 + 29
    generator = torch.Generator().manual_seed(5)
    told = generate(
        model, tokens, key_padding=key_padding, generator=generator, **settings
    )  # until every row has stopped
    assert torch.equal(told, wanted[:, : told.shape[1]])


def test_a_graph_needs_a_gpu():
    with pytest.raises(
        ValueError, match="cuda_graph=True needs a CUDA device, but the prompts are"
    ):
        stream(make_model(), torch.zeros(1, 3, dtype=torch.long), max_new_tokens=9, cuda_graph=True)


def test_tokens_keep_the_type_of_the_prompt():
    new = generate(make_model(), torch.zeros(2, 3, dtype=torch.int32), max_new_tokens=4)
    assert new.dtype == torch.int32
