"""Programs of models of images or sounds and texts."""

import json

import onnxruntime
import pytest
import torch

from diffmm.export.formats import export
from diffmm.export.parts import signatures_of
from diffmm.export.program import largest_difference, trace
from diffmm.models import (
    AudioConfig,
    BackboneConfig,
    CaptioningConfig,
    CaptioningModel,
    ContrastiveConfig,
    ContrastiveModel,
    CTCConfig,
    CTCModel,
    ImageConfig,
    TextConfig,
    TextTowerConfig,
)
from diffmm.models.generation import generate
from diffmm.models.job import Job, text_reader


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def backbone(rope, attention="diff_v2"):
    return BackboneConfig(16, 1, 2, rope=rope, attention=attention, init_std=0.3)


IMAGE = ImageConfig(backbone=backbone("2d"), image_size=8, patch_size=4)
SOUND = AudioConfig(
    backbone=backbone("1d"), sample_rate_hz=8000, num_mels=8, stem="frame", patch_size=None
)


def contrastive(**towers):
    text = TextTowerConfig(
        50, 10, backbone("none"), **towers.pop("text", {"causal": False, "pool": "mean"})
    )
    return ContrastiveModel(ContrastiveConfig(text=text, embed_dim=6, **towers)).eval()


MEDIA = pytest.mark.parametrize("media", ["prefix", "cross_attention"])


def captioner(encoder, media="prefix"):
    decoder = backbone("1d", "diff_v1")
    text = TextConfig(vocab_size=40, max_length=60, backbone=decoder, tie_embeddings=False)
    model = CaptioningModel(CaptioningConfig(encoder=encoder, decoder=text, media=media)).eval()
    torch.nn.init.normal_(model.decoder.embedding.weight)
    return model


def transcriber():
    model = CTCModel(CTCConfig(encoder=SOUND, vocab_size=12, blank_id=3)).eval()
    model.job = Job(reader=text_reader("bytes"), recipe="audio_text/test")
    return model


def opened(file):
    """A function of named tensors, and the metadata."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def call(**inputs):
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return call, json.loads(session.get_modelmeta().custom_metadata_map["diffmm"])


def test_towers_of_a_contrastive_model(tmp_path):
    model = contrastive(image=IMAGE, init_bias=-2.0)
    model.job = Job(reader=text_reader("bytes"), recipe="image_text/test")
    path, line = export(model, tmp_path / "both", "onnx")
    assert path == tmp_path / "both"
    assert sorted(each.name for each in path.iterdir()) == ["model_image.onnx", "model_text.onnx"]
    assert line.startswith("model_image.onnx: inputs images; largest difference")
    embed_image, about = opened(path / "model_image.onnx")
    embed_text, about_text = opened(path / "model_text.onnx")
    assert (about["part"], about_text["part"]) == ("image", "text")
    assert about["scale"] == pytest.approx(1 / 0.07)
    assert (about["bias"], about_text["eos_id"]) == (-2.0, 256)
    for batch in (1, 3):
        images, tokens = torch.randn(batch, 3, 8, 8), torch.randint(50, (batch, 7))
        num_tokens = torch.randint(1, 8, (batch,))
        found = embed_image(images=images)["embeddings"]
        torch.testing.assert_close(found, model.encode_image(images))
        torch.testing.assert_close(found.norm(dim=1), torch.ones(batch))
        texts = embed_text(tokens=tokens, num_tokens=num_tokens)["embeddings"]
        torch.testing.assert_close(texts, model.encode_text(tokens, num_tokens))
    with pytest.raises(ValueError, match=r"model_[a-z]+.onnx exists already"):
        export(model, path, "onnx")


def test_scale_and_bias_of_trainable_weights_give_no_warning():
    torch.set_warn_always(True)  # some warnings of torch appear once per process
    try:
        with torch.enable_grad():
            parts = signatures_of(contrastive(image=IMAGE, init_bias=-2.0))
    finally:
        torch.set_warn_always(False)
    assert parts["image"].facts["bias"] == -2.0


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ({"pool": "last"}, ["tokens", "num_tokens"]),
        ({"pool": "eos", "eos_id": 7}, ["tokens"]),
        ({"pool": "first", "causal": False}, ["tokens", "num_tokens"]),
    ],
)
def test_towers_of_sounds_and_texts(text, inputs):
    model = contrastive(audio=SOUND, text=text)
    signatures = signatures_of(model)
    assert list(signatures) == ["audio", "text"]
    assert [port.name for port in signatures["text"].inputs] == inputs
    names = ("audio", "text") if text["pool"] == "last" else ("text",)  # of the same sounds
    for name in names:
        assert largest_difference(signatures[name], trace(signatures[name]).module()) < 1e-5
    waveforms, lengths = torch.randn(2, 900), torch.tensor([900, 500])
    found = signatures["audio"].module(waveforms, lengths)
    torch.testing.assert_close(found, model.encode_audio(waveforms, lengths))


def test_a_transcriber_takes_clips_of_any_length(tmp_path):
    model = transcriber()
    path, _ = export(model, tmp_path / "speech.onnx", "onnx")
    hear, about = opened(path)
    assert (about["blank_id"], about["sample_rate_hz"]) == (3, 8000)
    assert [port["shape"] for port in about["outputs"]] == [["batch", "times", 12], ["batch"]]
    for batch, samples in ((1, 400), (2, 1600), (3, 4001)):
        waveforms = torch.randn(batch, samples)
        lengths = torch.randint(200, samples, (batch,))
        found, expected = hear(waveforms=waveforms, num_samples=lengths), model(waveforms, lengths)
        torch.testing.assert_close(found["logits"], expected.logits, atol=1e-4, rtol=1e-4)
        assert found["lengths"].tolist() == expected.lengths.tolist()
    alone = hear(waveforms=torch.ones(1, 1), num_samples=torch.ones(1, dtype=torch.int64))
    assert alone["lengths"].tolist() == model(torch.ones(1, 1)).lengths.tolist()


def written(encoder, decoder, count, **media):
    """Greedy texts, `[B, count]` ids, by the programs of a captioning model."""
    found = encoder(**media)
    batch = len(found["logits"])
    num_padding = found.pop("num_padding", torch.zeros(batch, dtype=torch.int64))
    context = {name: found.pop(name) for name in list(found) if "context" in name}
    ids = []
    for _ in range(count):
        ids.append(found.pop("logits")[:, -1].argmax(dim=-1))
        past = {name.replace("present", "past"): value for name, value in found.items()}
        found = decoder(tokens=ids[-1][:, None], num_padding=num_padding, **past, **context)
    return torch.stack(ids, dim=1)


@MEDIA
def test_a_captioning_model_writes_with_its_programs(tmp_path, media):
    model = captioner(IMAGE, media)
    path, line = export(model, tmp_path / "caption.onnx", "onnx")
    assert path == tmp_path
    more = 1 if media == "prefix" else 3
    assert f"caption_decoder.onnx: inputs tokens, num_padding, past_key_0 and {more} more" in line
    encoder, about = opened(path / "caption_encoder.onnx")
    decoder, _ = opened(path / "caption_decoder.onnx")
    assert about["max_length"] == 60
    for batch in (1, 3):
        images = torch.randn(batch, 3, 8, 8)
        expected = generate(model, media=images, max_new_tokens=9, temperature=0.0)
        assert len(set(expected.flatten().tolist())) > 1
        assert written(encoder, decoder, 9, images=images).equal(expected)


@MEDIA
def test_sounds_of_several_lengths_are_described(media):
    """Padding is moved in front of the sounds, or hidden after them, and changes nothing."""
    model = captioner(SOUND, media)
    programs = []
    for signature in signatures_of(model).values():
        program = trace(signature).module()
        assert largest_difference(signature, program) < 1e-5

        def call(signature=signature, program=program, **inputs):
            found = program(*(inputs[port.name] for port in signature.inputs))
            names = (port.name for port in signature.outputs)
            return dict(zip(names, found, strict=True))

        programs.append(call)
    waveforms, num_samples = torch.randn(3, 2000), torch.tensor([2000, 700, 1400])
    found = written(*programs, 8, waveforms=waveforms, num_samples=num_samples)
    assert len(found.unique()) > 1
    for row, length in enumerate(num_samples.tolist()):
        alone = waveforms[row, :length][None]
        expected = generate(model, media=alone, max_new_tokens=8, temperature=0.0)
        assert found[row].tolist() == expected[0].tolist()


def test_what_has_no_program_without_a_cache():
    for model in (contrastive(image=IMAGE), captioner(IMAGE), transcriber()):
        with pytest.raises(ValueError, match="cache=False is for text decoders"):
            signatures_of(model, cache=False)
