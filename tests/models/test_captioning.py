"""The captioning model: its mask, packed rows, several media, padding, and generation, for media
as a prefix and for cross-attention."""

import dataclasses
import re

import pytest
import torch

from diffmm.batch import IGNORE_INDEX
from diffmm.models import (
    AudioConfig,
    BackboneConfig,
    CaptioningConfig,
    CaptioningModel,
    ImageConfig,
    TextConfig,
)
from diffmm.models.cross_attention import cross_attentions
from diffmm.models.decoding import Choice, GraphedSteps, Prompt, prepare
from diffmm.models.generation import generate, stream
from diffmm.models.sampling import Sampling

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")
KINDS = ("image", "audio")
CROSS = {"media": "cross_attention"}
ROADS = pytest.mark.parametrize(
    "road", [{}, CROSS, {**CROSS, "cross_attention_every": 2}], ids=["prefix", "cross", "every 2nd"]
)
BOTH = pytest.mark.parametrize("road", [{}, CROSS], ids=["prefix", "cross"])


def backbone(rope, attention="diff_v1", **changes):
    given = {"dim": 32, "depth": 2, "num_heads": 4, "init_std": 0.15} | changes
    return BackboneConfig(**given, attention=attention, rope=rope)


def encoder(kind="image", learned=False, attention="diff_v1"):
    given = {"backbone": backbone("none" if learned else "2d", attention)}
    given |= {"learned_positions": learned, "num_reg_tokens": 2}
    if kind == "image":
        return ImageConfig(**given, image_size=8, patch_size=4)
    return AudioConfig(
        **given,
        sample_rate_hz=4000,
        num_mels=8,
        window_seconds=0.064,
        hop_seconds=0.032,
        patch_size=(2, 4),
        clip_seconds=0.5,
    )


def config(kind="image", *, learned=False, attention="diff_v1", **changes):
    decoder = TextConfig(40, 200, backbone("1d", attention), tie_embeddings=False)
    return CaptioningConfig(encoder=encoder(kind, learned, attention), decoder=decoder, **changes)


def make(*args, **settings):
    model = CaptioningModel(config(*args, **settings)).eval()
    torch.nn.init.normal_(model.decoder.embedding.weight)
    for layer in cross_attentions(model.decoder.backbone).values():
        torch.nn.init.normal_(layer.attention.out_proj.weight, std=0.15)
    return model


def media(kind, *sizes):
    """Media, and the arguments of the model for them: sounds of different lengths, all padded."""
    if kind == "image":
        return torch.randn(*sizes, 3, 8, 8), {}
    num_samples = torch.randint(500, 1300, sizes)
    waveforms = torch.rand(*sizes, 1600) - 0.5
    waveforms[torch.arange(1600) >= num_samples[..., None]] = 0.0
    return waveforms, {"num_samples": num_samples}


def apart(given, *index):
    return {name: tensor[index] for name, tensor in given.items()}


def padded(texts):
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=3)
    lengths = torch.tensor([len(text) for text in texts])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


@ROADS
@pytest.mark.parametrize("kind", KINDS)
def test_logits_depend_on_all_media_and_the_text_before(kind, road):
    model = make(kind, **road)
    found, given = media(kind, 1)
    found.requires_grad_(True)
    embedded = []
    model.decoder.embedding.register_forward_hook(
        lambda _, __, out: embedded.append(out.requires_grad_(True))
    )
    logits = model(torch.randint(40, (1, 5)), found, **given)
    for place in range(5):
        of_media, of_text = torch.autograd.grad(
            logits[0, place].norm(), [found, embedded[0]], retain_graph=True, materialize_grads=True
        )
        seen = of_text[0].abs().sum(dim=1) > 0
        assert seen.tolist() == [n < place for n in range(5)]
        parts = of_media[0, :, ::4, ::4] if kind == "image" else of_media[0, : given["num_samples"]]
        assert (parts != 0).float().mean() > 0.9


def test_tokens_of_media_see_each_other_and_no_text():
    model = make()
    images, tokens = torch.randn(1, 3, 8, 8), torch.randint(40, (1, 5))
    row = model.row(tokens, images)
    assert row.mask.to_bool(9, 9)[0, 0].int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]


@BOTH
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_separate_ones(kind, learned, attention, road):
    """Three documents in two rows; one of them has two images or sounds."""
    model = make(kind, learned=learned, attention=attention, **road)
    found, given = media(kind, 2, 2)
    texts = [torch.randint(4, 40, (length,)) for length in (6, 1, 4)]
    # Row 0: documents of one medium each, their texts in the other order. Row 1: one document.
    rows = [torch.cat([texts[1], texts[0]]), texts[2]]
    tokens, real = padded(rows)
    document_ids = torch.tensor([[1, 0, 0, 0, 0, 0, 0], [0] * 7])
    media_documents = torch.tensor([[0, 1], [0, 0]])
    targets = tokens.masked_fill(~real, IGNORE_INDEX)

    def gradients(losses):
        model.zero_grad()
        sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    packed = model(
        tokens,
        found,
        **given,
        document_ids=document_ids,
        media_documents=media_documents,
        targets=targets,
    )
    together = gradients([packed.total])
    alone = [
        model(text[None], found[place][None], **{n: t[place][None] for n, t in given.items()},
              targets=text[None])
        for text, place in zip(texts, [(0, 0), (0, 1), 1], strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(packed.each[0, 1:], alone[0].each[0])
    torch.testing.assert_close(packed.each[0, :1], alone[1].each[0])
    torch.testing.assert_close(packed.each[1, :4], alone[2].each[0])
    assert not packed.each[1, 4:].any()
    for name, expected in gradients([losses.total for losses in alone]).items():
        torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-5, msg=name)
        assert expected.any() or "reg" in name, name
    mixed = model(
        tokens,
        found,
        **given,
        document_ids=document_ids,
        media_documents=media_documents.flip(1),
        targets=targets,
    )
    assert not torch.allclose(mixed.each[0], packed.each[0], rtol=1e-3), "a blind test"


def test_positions_count_within_documents():
    model = make("audio")
    found, _ = media("audio", 1, 3)
    num_samples = torch.tensor([[1600, 700, 1600]])
    tokens, document_ids = torch.randint(40, (1, 6)), torch.tensor([[2, 2, 0, 0, 0, 1]])
    row = model.row(
        tokens,
        found,
        num_samples,
        document_ids=document_ids,
        media_documents=torch.tensor([[0, 1, 2]]),
    )
    per_item = row.num_prefix // 3
    short = int(row.real[0, per_item : 2 * per_item].sum())
    assert 0 < short < per_item
    positions = row.positions[0]
    assert positions[:per_item].tolist() == list(range(per_item))
    assert positions[per_item : per_item + short].tolist() == list(range(short))
    assert positions[3 * per_item :].tolist() == [
        *(per_item, per_item + 1),
        *(per_item, per_item + 1, per_item + 2),
        short,
    ]


def test_start_tokens_are_the_first_of_their_documents():
    model = make("audio", **CROSS)
    found, given = media("audio", 1, 3)
    document_ids = torch.tensor([[2, 2, 0, 0, 0, 1]])
    row = model.row(
        torch.randint(40, (1, 6)),
        found,
        **given,
        document_ids=document_ids,
        media_documents=torch.tensor([[0, 1, 2]]),
    )
    assert row.num_prefix == 3
    assert row.positions.tolist() == [[0, 0, 0, 1, 2, 1, 2, 3, 1]]
    assert row.documents.tolist() == [[0, 1, 2, 2, 2, 0, 0, 0, 1]]
    assert row.mask.to_bool(9, 9)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 1, 1, 0],
        [0, 1, 0, 0, 0, 0, 0, 0, 1],
    ]
    per_item = row.context.x.shape[1] // 3
    seen = row.context.mask.to_bool(9, 3 * per_item + 9)[0, 0, :, : 3 * per_item]
    seen = seen.unflatten(1, (3, per_item)).any(dim=2).int()
    assert seen.argmax(dim=1).tolist() == row.documents[0].tolist()
    assert seen.sum(dim=1).tolist() == [1] * 9
    # Padding of sounds is not seen.
    real = model.media_tokens(found, given["num_samples"])[1][0]
    assert row.context.mask.to_bool(9, 3 * per_item + 9)[0, 0].sum(dim=1).tolist() == [
        int(real[document].sum()) for document in row.documents[0]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_media_in_a_document_has_no_effect_in_cross_attention(kind):
    found, given = media(kind, 2, 3)
    tokens = torch.randint(40, (2, 5))
    turned = found.flip(1), {name: tensor.flip(1) for name, tensor in given.items()}
    for road, has_order in (({}, True), (CROSS, False)):
        model = make(kind, **road)
        one, other = model(tokens, found, **given), model(tokens, turned[0], **turned[1])
        assert torch.allclose(one, other, atol=1e-5) != has_order


def test_a_context_takes_no_part_of_the_decoders_length():
    model = make("image", **CROSS)
    tokens = torch.randint(40, (1, 199))
    assert model(tokens, torch.randn(1, 80, 3, 8, 8)).shape == (1, 199, 40)  # 320 tokens of images
    assert model.num_prefix_tokens(torch.randn(1, 80, 3, 8, 8)) == 1
    for road, expected in (({}, 196), (CROSS, 199)):
        assert config(**road).input_shapes(2)["tokens"][0] == (2, expected)


@BOTH
@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_padding_of_sounds_and_texts_changes_nothing(projector, road):
    model = make("audio", projector=projector, **road)
    waveforms, given = media("audio", 3)
    tokens, real = padded([torch.randint(4, 40, (length,)) for length in (5, 2, 7)])
    targets = tokens.masked_fill(~real, IGNORE_INDEX)
    together = model(tokens, waveforms, **given, targets=targets)
    for row in range(3):
        sound = waveforms[row : row + 1, : given["num_samples"][row]]
        text = tokens[row : row + 1, real[row]]
        alone = model(text, sound, targets=text)
        torch.testing.assert_close(together.each[row, real[row]], alone.each[0])


@BOTH
def test_losses_are_those_of_the_logits(road):
    model = make(**road)
    tokens, images = torch.randint(40, (2, 5)), torch.randn(2, 3, 8, 8)
    logits = model(tokens, images)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(model(tokens, images, targets=tokens).total / 10, expected)


def greedy_without_cache(model, found, given, prompt, count):
    tokens = prompt
    for _ in range(count):
        longer = torch.cat([tokens, tokens.new_zeros(len(tokens), 1)], dim=1)
        new = model(longer, found, **given)[:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens[:, prompt.shape[1] :]


@ROADS
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize(("kind", "sizes"), [("image", (3,)), ("audio", (3,)), ("image", (3, 2))])
def test_greedy_is_what_full_forwards_would_choose(kind, sizes, length, attention, road):
    model = make(kind, attention=attention, **road)
    found, given = media(kind, *sizes)
    prompt = torch.randint(40, (3, length))
    with torch.no_grad():
        expected = greedy_without_cache(model, found, given, prompt, 12)
    tokens = None if length == 0 else prompt
    settings = {"media": found, **given, "max_new_tokens": 12, "temperature": 0}
    assert torch.equal(generate(model, tokens, **settings), expected)
    assert torch.equal(torch.stack(list(stream(model, tokens, **settings)), dim=1), expected)
    assert len(expected.unique()) > 3, "the model repeats itself: a blind test"
    others = media(kind, *sizes)
    settings |= {"media": others[0], **others[1]}
    assert not torch.equal(generate(model, tokens, **settings), expected)


@ROADS
def test_padded_prompts_and_sounds_are_continued_as_alone(road):
    model = make("audio", **road)
    found, given = media("audio", 3)
    prompts = [torch.randint(40, (length,)) for length in (4, 1, 2)]
    tokens, real = (x.flip(1) for x in padded([prompt.flip(0) for prompt in prompts]))
    settings = {"max_new_tokens": 9, "temperature": 0}
    together = generate(model, tokens, media=found, **given, key_padding=real, **settings)
    for row, prompt in enumerate(prompts):
        sound = found[row : row + 1, : given["num_samples"][row]]
        assert torch.equal(generate(model, prompt[None], media=sound, **settings)[0], together[row])


@BOTH
def test_rows_stop_at_the_end(road):
    model = make(**road)
    images = torch.randn(4, 3, 8, 8)
    free = generate(model, media=images, max_new_tokens=10, temperature=0)
    stop = int(free[0, 2])
    found = generate(model, media=images, max_new_tokens=10, temperature=0, stop_ids=[stop])
    for row, expected in zip(found.tolist(), free.tolist(), strict=True):
        end = expected.index(stop) + 1 if stop in expected else 10
        assert row[:end] == expected[: len(row)][:end]
        assert set(row[end:]) <= {stop}


@BOTH
def test_steps_of_a_graph_choose_the_same_tokens(monkeypatch, road):
    model = make("audio", **road)
    found, given = media("audio", 2)
    num_prefix = model.num_prefix_tokens(found)
    monkeypatch.setattr(GraphedSteps, "_capture", lambda steps: _Replayed(steps))

    def tokens_by(cuda_graph):
        tokens = torch.empty(2, 0, dtype=torch.int64)
        prompt = Prompt(
            tokens, lambda cache: model.read_prefix(cache, tokens, found, **given), num_prefix
        )
        choice = Choice(Sampling(0.0), (), 3, None)
        with torch.no_grad():
            steps = prepare(model.decoder, model.decoder, prompt, 9, choice, cuda_graph=cuda_graph)
            return torch.stack([steps.first, *(steps.next() for _ in range(8))], dim=1)

    assert torch.equal(tokens_by(True), tokens_by(False))


class _Replayed:
    def __init__(self, steps):
        self.replay = steps.step


WRONG_CONFIGS = [
    (lambda: config(projector="conv"), "projector must be one of 'linear', 'mlp', got 'conv'"),
    (
        lambda: CaptioningConfig(
            encoder=dataclasses.replace(encoder(), num_classes=7), decoder=config().decoder
        ),
        "has no head: set its num_classes to 0, got 7",
    ),
    (
        lambda: CaptioningConfig(
            encoder=dataclasses.replace(encoder(), pool="map"), decoder=config().decoder
        ),
        "pool='map' has no effect: leave it out",
    ),
    (
        lambda: CaptioningConfig(
            encoder=dataclasses.replace(encoder(), pool_norm=True), decoder=config().decoder
        ),
        "pool_norm=True has no effect: leave it out",
    ),
    (
        lambda: CaptioningConfig(
            encoder=encoder(), decoder=TextConfig(9, 9, backbone("1d"), causal=False)
        ),
        "needs causal=True, got False",
    ),
    (lambda: config(media="suffix"), "media must be one of 'prefix', 'cross_attention', got 'suff"),
    (
        lambda: config(cross_attention_every=2),
        "cross_attention_every=2 is not used by media='prefix', only by media='cross_attention'",
    ),
    (lambda: config(cross_attention_gate=True), "cross_attention_gate=True is not used by media="),
    (
        lambda: config(**CROSS, cross_attention_every=3),
        "cross_attention_every must be between 1 and the decoder's depth=2, got 3",
    ),
    (
        lambda: CaptioningConfig(
            encoder=encoder(), decoder=TextConfig(9, 9, backbone("1d", parallel=True)), **CROSS
        ),
        "but parallel=True computes them at once: set parallel to False",
    ),
]


@pytest.mark.parametrize(("build", "message"), WRONG_CONFIGS)
def test_what_a_config_refuses(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def with_window():
    given = config()
    narrow = dataclasses.replace(given.decoder, backbone=backbone("1d", window=4))
    return CaptioningModel(dataclasses.replace(given, decoder=narrow))


TOKENS, IMAGES, PAIRS = (
    torch.zeros(2, 5).long(),
    torch.zeros(2, 3, 8, 8),
    torch.zeros(2, 2, 3, 8, 8),
)
WRONG_CALLS = [
    (
        make,
        (TOKENS[:1], IMAGES),
        {},
        "tokens must be [B, N] with B=2 as the media, got shape (1, 5",
    ),
    (
        make,
        (torch.zeros(2, 197).long(), IMAGES),
        {},
        "4 tokens of media and 197 of text are longer than the decoder's max_length=200",
    ),
    (
        make,
        (TOKENS, IMAGES[0]),
        {},
        "media must be [B, C, H, W] or [B, K, C, H, W], got shape (3, 8, 8)",
    ),
    (
        make,
        (TOKENS, PAIRS),
        {"document_ids": TOKENS[:, :4]},
        "document_ids must have shape (2, 5), got (2, 4)",
    ),
    (
        make,
        (TOKENS, PAIRS),
        {"media_documents": TOKENS[:, :1]},
        "media_documents must have shape (2, 2), got (2, 1)",
    ),
    (
        lambda: make(**CROSS),
        (torch.zeros(2, 200).long(), IMAGES),
        {},
        "1 start token and 200 of text are longer than the decoder's max_length=200",
    ),
    (
        lambda: make(**CROSS),
        (torch.zeros(2, 199).long(), PAIRS),
        {"document_ids": torch.zeros(2, 199).long()},
        "2 start tokens and 199 of text are longer than the decoder's max_length=200",
    ),
    (
        lambda: make(**CROSS).decoder,
        (TOKENS,),
        {},
        "blocks with cross-attention need a context, the images or sounds that they read",
    ),
    (
        with_window,
        (TOKENS, PAIRS),
        {"document_ids": TOKENS},
        "packed rows are not supported by a decoder with window=4",
    ),
]


@pytest.mark.parametrize(("build", "arguments", "named", "message"), WRONG_CALLS)
def test_what_a_model_refuses(build, arguments, named, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()(*arguments, **named)


def test_what_generation_refuses():
    model, images = make(), torch.zeros(2, 3, 8, 8)
    for arguments, message in (
        ({}, "a captioning model needs media, the images or sounds, got none"),
        ({"media": images, "max_new_tokens": 197}, "after 4 tokens of media plus max_new_tokens="),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, **({"max_new_tokens": 4} | arguments))
    with pytest.raises(ValueError, match="after 1 start token plus max_new_tokens=200 exceeds"):
        generate(make(**CROSS), media=images, max_new_tokens=200)
    with pytest.raises(ValueError, match="media are for captioning models, got a TextModel"):
        generate(model.decoder, media=images, max_new_tokens=4)
    with pytest.raises(ValueError, match="a text model needs prompts, got none"):
        generate(model.decoder, max_new_tokens=4)
    with pytest.raises(ValueError, match="training mode"):
        generate(model.train(), media=images, max_new_tokens=4)
