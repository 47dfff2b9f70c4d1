"""Maps of the words that a model writes about an image or sound."""

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

import diffmm
from diffmm.analysis.attention_maps import attention_maps
from diffmm.analysis.exhibits import ImageExhibit
from diffmm.analysis.figures import png
from diffmm.analysis.map_figures import map_figures
from diffmm.analysis.report import draw_exhibit
from diffmm.analysis.text_spans import words_of
from diffmm.analysis.word_maps import WordsExhibit, reading_layers, word_maps
from diffmm.models.generation import generate
from diffmm.tokenizers import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer()
NAMES = ["A₁", "A₂", "A₁ − λA₂"]
SHARP = 1e4


MEDIA = pytest.mark.parametrize("media", ["prefix", "cross_attention"])


def captioner(attention="diff_v2", media="prefix", **changes):
    recipe = "image_text/shapes_captions_tiny"
    return diffmm.create_model(recipe, attention=attention, media=media, **changes).eval()


def transcriber():
    return diffmm.create_model("audio_text/prompts_ctc_tiny", attention="diff_v2").eval()


def image_for(model):
    size = model.encoder.config.image_size
    return torch.rand(3, size, size)


def look_at(layer, monkeypatch, num_patches, first_key, targets, lam):
    """Query `r` of a layer attends to patch `targets[c][r]` alone in map `c`, with its keys at
    `first_key` and after it."""

    def components(q, k):
        keys = torch.arange(k.shape[1]) - first_key
        known = (keys >= 0) & (keys < num_patches)
        k = one_hot(keys.clamp(0, num_patches - 1), num_patches) * known[:, None]
        k = k.float()[None, :, None, None]  # shared by groups and maps
        rows = torch.arange(q.shape[1])
        each = [SHARP * one_hot(target(rows) % num_patches, num_patches) for target in targets]
        q = torch.stack(each, dim=1).float()[None, :, None].expand(-1, -1, layer.num_heads, -1, -1)
        return q, k

    monkeypatch.setattr(layer, "components", components)
    monkeypatch.setattr(layer, "lam", lambda x: torch.full((*x.shape[:2], layer.num_heads), lam))


@MEDIA
def test_each_word_is_over_the_patches_that_its_tokens_attend_to(monkeypatch, media):
    """The token at `i` is predicted at row `M - 1 + i`, or `i` after a start token, which here
    attends to patch `i` in the first map and to patch `i + 1` in the second."""
    model = captioner(media=media)
    layer = model.decoder.backbone.attentions[1]
    rows, columns = model.encoder.config.grid
    num = rows * columns
    first = num - 1
    if media == "cross_attention":
        layer, first = model.decoder.backbone.blocks[1].cross_attention.attention, 0
    look_at(layer, monkeypatch, num, 0, (lambda r: r - first, lambda r: r - first + 1), 0.25)
    text = [*b"ab", ord(" "), *b"c", 256]
    found = word_maps(model, image_for(model), BYTES, text, layers=[-1])
    assert (found.text, [each.word for each in found.words]) == ("ab c", ["ab", "c"])
    for word, patches in zip(found.words, ([0, 1], [3]), strict=True):
        assert word.tokens == patches
        view = word.layers[1]
        assert list(word.layers) == [1]
        assert view.lam == pytest.approx(0.25)
        first, second = np.zeros(num), np.zeros(num)
        first[patches] = second[[patch + 1 for patch in patches]] = 1.0 / len(patches)
        expected = (first, second, first - 0.25 * second)
        for name, weights in zip(NAMES, expected, strict=True):
            assert view.maps[name] == pytest.approx(weights.reshape(rows, columns), abs=1e-6)


def test_a_word_of_ctc_is_over_what_the_encoder_attends_to_at_its_times(monkeypatch):
    model = transcriber()
    layer = model.encoder.backbone.attentions[0]
    first = model.encoder.num_prefix_tokens
    sound = torch.randn(8000)
    num = model.encoder.num_patches(sound[None])
    look_at(layer, monkeypatch, num, first, (lambda r: r - first + 4, lambda r: r - first), 0.5)
    heard = [(ord("h"), range(2, 4)), (ord(" "), range(5, 6)), (ord("o"), range(7, 8))]
    monkeypatch.setattr(model, "aligned", lambda found: [heard])
    found = word_maps(model, sound, BYTES, layers=[0])
    assert [each.word for each in found.words] == ["h", "o"]
    for word, times in zip(found.words, ([2, 3], [7]), strict=True):
        weights = word.layers[0].maps["A₁"]
        assert weights.shape == (1, num)
        expected = np.zeros(num)
        expected[[time + 4 for time in times]] = 1.0 / len(times)
        assert weights[0] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="a CTC model has maps for what it hears"):
        word_maps(model, sound, BYTES, [104])


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_cross_attention_has_all_of_its_weight_on_the_patches(attention):
    model = captioner(attention, "cross_attention", cross_attention_every=2)
    image, text = image_for(model), list(b"a red one")
    assert reading_layers(model) == ["decoder.backbone.blocks.1.cross_attention.attention"]
    found = word_maps(model, image, BYTES, text, words=["one", "a"])
    whole = attention_maps(model, torch.tensor([text]), image[None])
    *_, own, last = whole
    assert own.components[0].shape[-2:] == (len(text) + 1, len(text) + 1)
    assert last.components[0].shape[-2:] == (len(text) + 1, model.num_media_tokens(image[None]))
    for word in found.words:
        (view,) = word.layers.values()
        expected = last.combined[0].mean(dim=0)[word.tokens].mean(dim=0)
        *maps, combined = view.maps.values()
        assert combined.ravel() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-7)
        for weights in maps:
            assert weights.sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="layers contains 1, but the TextModel has 1 attention la"):
        word_maps(model, image, BYTES, text, layers=[1])


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_rows_are_those_of_whole_maps(attention):
    model = captioner(attention)
    image, text = image_for(model), list(b"a red one")
    found = word_maps(model, image, BYTES, text, words=["one", "a"])
    assert [each.word for each in found.words] == ["one", "a"]
    whole = attention_maps(model, torch.tensor([text]), image[None])[-2:]
    grid = model.encoder.config.grid
    num_media = grid[0] * grid[1]
    for word in found.words:
        for layer, view in word.layers.items():
            rows = [num_media - 1 + i for i in word.tokens]
            expected = whole[layer].combined[0].mean(dim=0)[rows, :num_media].mean(dim=0)
            *_, combined = view.maps.values()
            assert combined.ravel() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-7)
            assert (view.lam is None) == (attention == "softmax")


@MEDIA
def test_without_a_text_the_caption_is_generated(media):
    torch.manual_seed(0)
    model = captioner(media=media)
    torch.nn.init.normal_(model.decoder.embedding.weight)
    image = image_for(model)
    found = word_maps(model, image, BYTES, max_new_tokens=9)
    ids = generate(model, media=image[None], max_new_tokens=9, temperature=0.0, stop_ids=[256])
    assert found.text == BYTES.decode(ids[0].tolist())
    assert len(found.words) <= 6


def test_what_is_refused():
    model = captioner()
    image = image_for(model)
    for settings, message in (
        ({"words": ["blue"]}, "the word 'blue' is not in the text 'a red'"),
        ({"layers": [2]}, "layers contains 2, but the TextModel has 2 attention layers, 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            word_maps(model, image, BYTES, list(b"a red"), **settings)
    with pytest.raises(ValueError, match=r"one sample, \[C, H, W\], got shape \(1, 3, 48, 48\)"):
        word_maps(model, image[None], BYTES, list(b"a red"))


def test_words_and_their_tokens():
    assert words_of(BYTES, [*"né  o!".encode(), 256]) == [("né", [0, 1, 2]), ("o!", [5, 6])]
    assert words_of(BYTES, [256, *b"a"]) == [("a", [1])]
    assert words_of(BYTES, [*b" \n"]) == words_of(BYTES, []) == []
    broken = [*b"a ", "é".encode()[0]]
    assert words_of(BYTES, broken) == [("a", [0]), ("\ufffd", [2])]


def test_words_of_tokens_with_spaces(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["Ġred", "a", "Ġb", "l", "<|endoftext|>", "Ġ", "b", "r", "e", "d"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert words_of(tokenizer, [1, 0, 2, 3, 4]) == [("a", [0]), ("red", [1]), ("bl", [2, 3])]


def test_words_are_drawn_and_are_figures():
    model = captioner()
    image = image_for(model)
    found = word_maps(model, image, BYTES, list(b"a <b>"))
    whole = ImageExhibit("truth", {}, np.zeros((4, 4)))
    exhibit = WordsExhibit("truth", {}, whole, {"1": found})
    html = draw_exhibit(exhibit)
    assert "1 writes “a &lt;b&gt;”" in html
    assert html.count('class="tile"') == 1 + 2 * 2 * 3  # the input; words, layers, maps
    assert "“&lt;b&gt;”, layer 2" in html
    figures = list(map_figures([exhibit], ["run"]))
    assert [figure.name for figure in figures] == [
        "map_1_of_run_1_word_1", "map_1_of_run_1_word_2"
    ]  # fmt: skip
    head, *rows = figures[1].table()
    assert head == ["layer", "map", "patch row", "patch column", "weight"]
    assert len(rows) == 2 * 3 * 36
    last = found.words[1].layers[1].maps["A₁ − λA₂"]
    assert rows[-1] == [2, "A₁ − λA₂", 5, 5, float(last[5, 5])]
    assert png(figures[0]).startswith(b"\x89PNG")
