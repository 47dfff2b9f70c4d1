"""The answers of the page, which are those of the trained model, without a browser."""

import re
from dataclasses import replace
from html import escape, unescape
from itertools import pairwise

import numpy as np
import pytest
import torch

from datamodules import ImageAudioTextData
from datamodules.pairs import RenderedShapes, SynthesizedSounds
from diffmm import TrainedModel
from diffmm.app.answers import medium_maps, prompt_maps, refused, text_maps
from diffmm.app.panels import captioning, classification, generation, panel_of, similarity
from diffmm.models import ImageModel, TextModel
from diffmm.models.contrastive import ContrastiveModel
from diffmm.models.job import Job
from diffmm.models.text_tower import TextTower


def rows_of(html: str) -> list[tuple[str, float, str]]:
    """Name, length of the bar in percent, and value of each row."""
    found = re.findall(
        r'class="what">(.*?)</td><td class="bar"><i style="width:(.*?)%"></i></td>'
        r'<td class="value">(.*?)</td>',
        html,
    )
    return [(unescape(name), float(width), unescape(value)) for name, width, value in found]


def written(html: str) -> str:
    (text,) = re.findall(r'class="written">(.*?)</div>', html, re.DOTALL)
    return unescape(re.sub(r"</?span[^>]*>", "", text))


def test_a_classifier_says_what_it_predicts(classifier, picture):
    found = classifier.predict(picture)
    html = classification.answer(classifier, picture, -1)
    rows = rows_of(html)
    assert [name for name, _, _ in rows] == list(found.labels)
    assert "<dog>" in found.labels
    assert "<dog>" not in html
    for (_, width, value), score in zip(rows, found.scores, strict=True):
        assert width == pytest.approx(100.0 * score, abs=0.05)
        assert value == f"{100.0 * score:.1f}%"
    assert html.count('class="tile"') == 4  # the image, both maps and their difference
    assert "<audio" not in html


def test_a_sound_can_be_heard_and_classes_are_independent(sound_classifier, sound):
    html = classification.answer(sound_classifier, sound, -1)
    assert f'<audio controls src="/gradio_api/file={sound}">' in html
    assert "Classes, each on its own" in html
    assert "chirp.wav, 1.1 s" in html
    assert [name for name, _, _ in rows_of(html)] == list(sound_classifier.predict(sound).labels)


@pytest.mark.parametrize("layer", [0, 1])
def test_maps_over_an_image_are_those_of_the_layer(layer, classifier, picture):
    maps = medium_maps(classifier.model, classifier.reader, picture, layer)
    (attention,) = maps.views
    assert attention == "diff_v2"
    (expected,) = classifier.attention_maps(picture, layers=[layer])
    for name, whole in zip(
        ("A₁", "A₂", "A₁ − λA₂"), (*expected.components, expected.combined), strict=True
    ):
        prefix = classifier.model.num_prefix_tokens
        rows = whole[0].mean(0)[prefix:, prefix:].mean(0)
        if classifier.model.config.pool == "cls":
            rows = whole[0].mean(0)[0, prefix:]
        np.testing.assert_allclose(maps.views[attention].maps[name], rows.view(4, 4), atol=1e-6)
    assert maps.truth == "a picture.png"


def test_maps_over_a_sound_are_those_of_the_layer(sound_classifier, sound):
    maps = medium_maps(sound_classifier.model, sound_classifier.reader, sound, 0)
    view = maps.views["diff_v1"]
    (expected,) = sound_classifier.attention_maps(sound, layers=[0])
    assert view.lam == pytest.approx(float(expected.lam.mean()))
    assert view.answer is None
    assert maps.clip_seconds == pytest.approx(9000 / 8000)
    assert view.maps["A₁"].sum() <= 1.0 + 1e-5


def test_similarities_and_their_order(contrastive, picture):
    texts = ["a red star", "two", "a circle & <b>"]
    typed = "\n".join(["", texts[0], f"  {texts[1]} ", texts[0], texts[2], " "])
    html = similarity.answer(contrastive, picture, typed, -1, -1)
    values = dict(zip(texts, contrastive.similarity(picture, texts)[0].tolist(), strict=True))
    rows = rows_of(html)
    assert [name for name, _, _ in rows] == sorted(texts, key=values.get, reverse=True)
    scores = (torch.tensor(list(values.values())) / 0.07).softmax(0).tolist()
    expected = dict(zip(texts, scores, strict=True))
    for name, width, value in rows:
        assert value == f"{values[name]:.3f} · {100.0 * expected[name]:.1f}%"
        assert width == pytest.approx(100.0 * expected[name], abs=0.051)
    assert all(first >= second for (_, first, _), (_, second, _) in pairwise(rows))
    assert f"Attention in “{escape(rows[0][0])}”" in html
    assert "probability among these texts" in html
    assert html.count('class="tile"') == 4 + 3


def test_without_texts_there_are_the_maps_of_the_image(contrastive, picture):
    html = similarity.answer(contrastive, picture, "\n", -1, -1)
    assert rows_of(html) == []
    assert html.count('class="tile"') == 4
    for panel, arguments in ((similarity, ("a", -1, -1)), (classification, (-1,))):
        assert "tile" not in panel.answer(contrastive, None, *arguments)


def test_with_a_bias_each_pair_is_on_its_own(make_contrastive, picture):
    trained = make_contrastive(init_bias=-3.0)
    html = similarity.answer(trained, picture, "one\ntwo", -1, -1)
    assert "probability of each pair on its own" in html
    value = trained.similarity(picture, "one").item()
    score = 1.0 / (1.0 + np.exp(3.0 - value / 0.07))
    assert ("one", f"{value:.3f} · {100.0 * score:.1f}%") in [
        (name, text) for name, _, text in rows_of(html)
    ]


def test_a_model_of_images_and_sounds_takes_either(
    make_contrastive, sound_classifier, picture, sound
):
    model = make_contrastive(audio=replace(sound_classifier.model.config, num_classes=0)).model
    rate_hz = model.config.audio.sample_rate_hz
    data = ImageAudioTextData(
        RenderedShapes(4, 4),
        SynthesizedSounds(4, 4, sample_rate_hz=max(8000, rate_hz)),
        image_size=16,
        sample_rate_hz=rate_hz,
        max_tokens=40,
    )
    both = TrainedModel(model, Job(reader=data.describe_inputs()["reader"]))
    assert similarity.describe(both) == "Compares images or sounds with texts"
    pages = [similarity.answer(both, str(file), "a\nb", 0, 0) for file in (picture, sound)]
    assert ["<audio" in page for page in pages] == [False, True]
    assert all("Cosine similarity" in page and "problem" not in page for page in pages)


def test_too_many_texts_are_refused(contrastive, picture):
    typed = "\n".join(map(str, range(65)))
    with pytest.raises(ValueError, match="at most 64 texts are compared, got 65"):
        similarity.answer(contrastive, picture, typed, -1, -1)


@pytest.mark.parametrize(("pool", "query"), [("mean", None), ("last", 4), ("first", 0)])
def test_maps_over_a_text_start_at_the_pooled_token(pool, query, contrastive):
    reader = contrastive.reader
    config = replace(contrastive.model.config.text, pool=pool, causal=pool == "last")
    torch.manual_seed(1)
    maps = text_maps(TextTower(config), reader, "star", 0)
    assert maps.pieces == ["s", "t", "a", "r", maps.pieces[-1]]
    assert maps.query == query
    assert maps.views["diff_v2"].maps["A₁"].shape == (5, 5)
    assert (np.triu(maps.views["diff_v2"].maps["A₁"], 1) == 0).all() == (pool == "last")


def test_a_continuation_grows_to_what_the_model_generates(decoder):
    prompt = "def add(a, b): ${1 + 1} {{value}} <b>"
    pages = list(generation.answer(decoder, prompt, most_tokens=8, temperature=0.9, seed=3))
    expected = decoder.generate(prompt, max_new_tokens=8, temperature=0.9, seed=3)
    assert written(pages[0]) == prompt
    assert written(pages[-1]) == prompt + expected
    assert len(pages) > 2
    html = generation.maps(decoder, prompt, -1)
    assert html.count('class="tile"') == 3
    assert "Next comes" not in html


def test_a_long_prompt_leaves_less_room_and_shows_its_end(decoder):
    *_, last = generation.answer(decoder, "x" * 150, most_tokens=100, temperature=0.0)
    assert written(last) == "x" * 150 + decoder.generate(
        "x" * 150, max_new_tokens=10, temperature=0.0
    )
    html = generation.maps(decoder, "x" * 150, 0)
    assert "the last 128 tokens of the prompt" in html
    assert html.count("title=") == 128
    *_, last = generation.answer(decoder, "x" * 161)
    assert "max_length=160: shorten the prompt" in last


def test_an_answer_is_without_the_question(chatting):
    *_, last = generation.answer(chatting, "Why?", chat=True, most_tokens=6, temperature=0.0)
    assert written(last) == chatting.chat("Why?", max_new_tokens=6, temperature=0.0)
    html = generation.maps(chatting, "Why?", -1, chat=True)
    assert "user: Why?⏎\nassistant: " in unescape(re.sub(r"<[^>]*>", "", html))


def test_maps_over_a_prompt_are_those_of_the_layer(decoder):
    ids = decoder.reader.read("abcdef")["tokens"]
    maps = prompt_maps(decoder, ids, 0)
    (expected,) = decoder.attention_maps("abcdef", layers=[0])
    found = maps.views["diff_v2"].maps["A₁ − λA₂"]
    np.testing.assert_allclose(found, expected.combined[0].mean(0), atol=1e-6)
    assert maps.pieces == list("abcdef")


def test_a_caption_grows_and_its_words_have_maps(captioner, picture):
    *_, last = pages = list(captioning.answer(captioner, picture, "a <b"))
    text = "a <b" + captioner.generate(picture, "a <b")
    assert written(last) == text
    assert len(pages) > 2
    html = captioning.maps(captioner, picture, "a <b", 0)
    found = captioner.word_maps(picture, text, layers=[0], max_words=24)
    assert [each.word for each in found.words[:2]] == ["a", found.words[1].word]
    assert html.count('class="tile"') == 1 + 3 * len(found.words)
    assert "“a”, layer 1" in html
    *_, last = captioning.answer(captioner, picture)
    assert written(last) == captioner.generate(picture)


def test_a_transcript_has_maps_and_a_player(transcriber, sound):
    *_, last = captioning.answer(transcriber, sound)
    assert written(last) == transcriber.predict(sound).text
    html = captioning.maps(transcriber, sound, "", -1)
    assert f'<audio controls src="/gradio_api/file={sound}">' in html
    assert "What the encoder attends to at the times of" in html


def test_nothing_and_bad_files_are_not_described(captioner, broken):
    assert list(captioning.answer(captioner, None)) == [captioning.maps(captioner, None, "", 0)]
    (html,) = captioning.answer(captioner, broken)
    assert "broken.png cannot be decoded" in html
    assert "problem" not in captioning.maps(captioner, broken, "", 0)


def test_errors_are_one_line_without_folders_and_markup(classifier, broken, decoder):
    respond = refused(lambda file, layer: classification.answer(classifier, file, layer))
    html = respond(broken, -1)
    (line,) = re.findall(r'role="alert"><p>(.*?)</p>', html)
    assert line.startswith("broken.png cannot be decoded")
    assert "tile" not in html
    (page,) = generation.answer(decoder, "")
    assert "the prompt is empty" in page
    assert "problem" not in generation.maps(decoder, "", -1)


def test_each_kind_has_a_panel_and_others_are_refused(
    classifier, sound_classifier, decoder, chatting, contrastive, captioner, transcriber
):
    assert panel_of(classifier) is panel_of(sound_classifier) is classification
    assert panel_of(decoder) is generation
    assert panel_of(contrastive) is similarity
    assert panel_of(captioner) is panel_of(transcriber) is captioning
    assert captioning.describe(captioner) == "Describes images"
    assert captioning.describe(transcriber) == "Transcribes sounds"
    assert classification.describe(sound_classifier) == "Classifies sounds into 2 classes"
    assert generation.describe(chatting) == "Answers questions, and continues texts"
    assert similarity.describe(contrastive) == "Compares images with texts"
    assert isinstance(contrastive.model, ContrastiveModel)
    features = ImageModel(replace(classifier.model.config, num_classes=0))
    job = replace(classifier.job, class_names=None)
    with pytest.raises(ValueError, match="an ImageModel, which answers nothing: the app is for"):
        panel_of(TrainedModel(features, job))
    masked = TextModel(replace(decoder.model.config, causal=False))
    with pytest.raises(ValueError, match="a TextModel, which answers nothing"):
        panel_of(TrainedModel(masked, decoder.job))
    with pytest.raises(ValueError, match="does not say how its inputs are prepared"):
        panel_of(TrainedModel(classifier.model, replace(job, reader=None)))
