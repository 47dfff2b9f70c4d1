"""AST and the encoder of Whisper: the same logits, features and gradients as transformers, from
spectrograms and from waveforms, and weights that come back bit by bit."""

import copy
import json

import pytest
import torch
from encoders import assert_same_files, compare_gradients, randomize
from hugging_face import assert_same
from safetensors.torch import load_file, save_file
from torch import nn

from diffmm.hub.readers import make_reader
from diffmm.interop import FAMILIES, read_model, write_model

transformers = pytest.importorskip("transformers", reason="needs transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

AST = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_length": 43,
    "num_mel_bins": 20,
    "patch_size": 8,
    "frequency_stride": 5,
    "time_stride": 6,
    "id2label": {"0": "cat", "1": "dog", "2": "bird"},
}
AST_CASES = {
    "ast": {},
    "ast, no biases, tanh": {"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "ast, one patch in frequency": {"num_mel_bins": 9, "patch_size": 9, "time_stride": 9},
}
WHISPER = {
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 20,
    "num_mel_bins": 12,
    "max_source_positions": 50,
    "max_target_positions": 9,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


class Given(nn.Module):
    """Returns a spectrogram whatever the waveform."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, waveforms, num_samples=None):
        return self.features, None


def with_features(model, features):
    """The output of one of our models for spectrograms `[B, num_mels, T]`."""
    spectrogram, model.spectrogram = model.spectrogram, Given(features)
    try:
        return model(torch.zeros(len(features), 1))
    finally:
        model.spectrogram = spectrogram


@pytest.fixture(params=AST_CASES)
def ast(request, tmp_path):
    """Their model, ours, the folder of theirs and their feature extractor."""
    config = transformers.ASTConfig(**AST | AST_CASES[request.param])
    theirs = transformers.ASTForAudioClassification(config)
    extractor = transformers.ASTFeatureExtractor(
        num_mel_bins=config.num_mel_bins, max_length=config.max_length, mean=-3.0, std=2.5
    )
    return _saved(theirs, extractor, tmp_path / "theirs")


@pytest.fixture
def whisper(tmp_path):
    """Their model, ours, the folder of theirs and their feature extractor."""
    theirs = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))
    extractor = transformers.WhisperFeatureExtractor(feature_size=12, chunk_length=1)
    return _saved(theirs, extractor, tmp_path / "theirs")


def _saved(theirs, extractor, folder):
    randomize(theirs)
    theirs.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return theirs, read_model(folder), folder, extractor


def test_logits_and_all_gradients_of_ast(ast):
    theirs, ours, folder, extractor = ast
    features = torch.randn(2, extractor.max_length, extractor.num_mel_bins)

    def run(model, dtype):
        x = features.to(dtype)
        return model(x).logits if model is theirs else with_features(model, x.transpose(1, 2))

    names = {
        name: name.replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.key", "attention.k_proj")
        .replace("attention.attention.value", "attention.v_proj")
        .replace("attention.output.dense", "attention.o_proj")
        .replace("intermediate.dense", "mlp.fc1")
        .replace("output.dense", "mlp.fc2")
        .replace("encoder.layer", "layers")
        for name in load_file(folder / "model.safetensors")
    }
    renamed = {new: old for old, new in names.items()}
    assert compare_gradients(theirs, ours, run, "audio-spectrogram-transformer", renamed) > 1e-3


def test_logits_and_all_gradients_of_whispers_encoder(whisper):
    theirs, ours, _, _ = whisper
    features = torch.randn(2, 12, 100)
    encoder = theirs.model.encoder
    encoder.embed_positions.requires_grad_(True)

    def run(model, dtype):
        x = features.to(dtype)
        if model is encoder:
            return model(x).last_hidden_state.mean(dim=1)
        return with_features(model, x)

    assert compare_gradients(encoder, ours, run, "whisper") > 1e-3


@pytest.mark.parametrize("seconds", [0.01, 0.2, 0.43, 0.4375, 2.0])
def test_ast_from_waveforms(ast, seconds):
    theirs, ours, _, extractor = ast
    waveform = torch.randn(round(16000 * seconds)) * 0.1
    if len(waveform) < 400:
        truth = torch.zeros(1, extractor.max_length, extractor.num_mel_bins)
        truth = torch.tensor(extractor.normalize(truth.numpy()))
    else:
        truth = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
        truth = truth["input_values"]
    cut = waveform[: ours.spectrogram.clip_samples]
    found, num_frames = ours.spectrogram(cut[None])
    assert num_frames is None
    assert_same(found.transpose(1, 2), truth, "spectrogram", 1e-4)
    sample = make_reader(ours.job, "a test").read((waveform.numpy(), 16000))
    batch = torch.cat([torch.as_tensor(sample["waveforms"]), torch.ones(9)])[None]
    batch = batch[:, : ours.spectrogram.clip_samples]
    logits = ours(batch, torch.tensor([sample["num_samples"]]))
    assert_same(logits, theirs(truth).logits, "logits", 1e-4)
    assert ours.job.class_names == ("cat", "dog", "bird")


@pytest.mark.parametrize("seconds", [0.01, 0.777, 1.0, 2.0])
def test_whispers_encoder_from_waveforms(whisper, seconds):
    theirs, ours, _, extractor = whisper
    waveform = torch.randn(round(16000 * seconds)) * 0.1
    truth = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]
    sample = make_reader(ours.job, "a test").read((waveform.numpy(), 16000))
    found, _ = ours.spectrogram(torch.as_tensor(sample["waveforms"])[None])
    assert_same(found, truth, "spectrogram", 1e-4)
    features = ours.forward_features(torch.as_tensor(sample["waveforms"])[None])
    assert_same(features, theirs.model.encoder(truth).last_hidden_state, "features", 1e-4)


def test_ast_comes_back_bit_by_bit(ast, tmp_path):
    theirs, ours, folder, extractor = ast
    back = write_model(ours, tmp_path / "back", "audio-spectrogram-transformer")
    assert_same_files(folder, back)
    again = transformers.ASTForAudioClassification.from_pretrained(back)
    x = torch.randn(1, extractor.max_length, extractor.num_mel_bins)
    if theirs.config.hidden_act == "gelu_new":
        # The same function with another rounding; one name is written for both.
        assert again.config.hidden_act == "gelu_pytorch_tanh"
        assert_same(again(x).logits, theirs(x).logits, "logits", 1e-6)
        config = copy.deepcopy(theirs.config)
        config.hidden_act = again.config.hidden_act
        weights = theirs.state_dict()
        theirs = transformers.ASTForAudioClassification(config).eval()
        theirs.load_state_dict(weights)
    assert torch.equal(again(x).logits, theirs(x).logits)
    assert list(again.config.id2label.values()) == ["cat", "dog", "bird"]
    prepared = transformers.ASTFeatureExtractor.from_pretrained(back)
    assert (prepared.mean, prepared.std) == (-3.0, 2.5)
    assert read_model(back).config == ours.config


def test_whispers_encoder_comes_back_bit_by_bit(whisper, tmp_path):
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    theirs, ours, folder, _ = whisper
    back = write_model(ours, tmp_path / "back", "whisper")
    tensors, truth = (load_file(each / "model.safetensors") for each in (back, folder))
    assert tensors.keys() == {name for name, _ in theirs.model.encoder.named_parameters()}
    assert all(torch.equal(x, truth[f"model.encoder.{name}"]) for name, x in tensors.items())
    again = WhisperEncoder.from_pretrained(back).eval()
    x = torch.randn(1, 12, 100)
    found = again(x).last_hidden_state
    assert torch.equal(found, theirs.model.encoder(x).last_hidden_state)
    assert read_model(back).config == ours.config


def test_classes_that_do_not_exclude_each_other(tmp_path):
    config = transformers.ASTConfig(**AST, problem_type="multi_label_classification")
    theirs = transformers.ASTForAudioClassification(config)
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=20, max_length=43)
    _, ours, _, _ = _saved(theirs, extractor, tmp_path / "theirs")
    assert ours.job.multi_label
    back = write_model(ours, tmp_path / "back", "audio-spectrogram-transformer")
    assert read_model(back).job == ours.job
    assert transformers.ASTConfig.from_pretrained(back).problem_type == config.problem_type


def rewrite(folder, file, **changes):
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


PREPARED = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"hidden_act": "relu"}, "hidden_act='relu', but diffmm can hold only gelu"),
        ("config.json", {"architectures": ["ASTModel"]}, "contains a ASTModel, but"),
        ("config.json", {"window": 3}, "settings that diffmm does not know, .*: window=3"),
        (PREPARED, {"max_length": 50}, "max_length=50, but diffmm can hold only 43: the number of"),
        (PREPARED, {"num_mel_bins": 7}, "num_mel_bins=7, but diffmm can hold only 20"),
        (PREPARED, {"sampling_rate": 0}, "has settings out of range: division by zero"),
        (PREPARED, {"dither": 1.0}, "preprocessor_config has settings that .* dither=1.0"),
        ("config.json", {"num_hidden_layers": 3}, "16 missing"),
        ("config.json", {"id2label": {"0": "a"}}, "classifier.dense.weight .* needed"),
    ],
)
def test_what_diffmm_cannot_hold_of_an_ast_is_refused(file, changes, message, tmp_path):
    theirs = transformers.ASTForAudioClassification(transformers.ASTConfig(**AST))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no preprocessor_config.json, which says how its"):
        read_model(tmp_path)
    transformers.ASTFeatureExtractor(num_mel_bins=20, max_length=43).save_pretrained(tmp_path)
    rewrite(tmp_path, file, **changes)
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path)


def test_what_diffmm_cannot_hold_of_a_whisper_is_refused(whisper):
    _, ours, folder, _ = whisper
    rewrite(folder, PREPARED, chunk_length=30)
    with pytest.raises(ValueError, match="chunk_length=30, but diffmm can hold only the 100 fram"):
        read_model(folder)
    rewrite(folder, PREPARED, chunk_length=1)
    rewrite(folder, "config.json", architectures=["WhisperForAudioClassification"])
    with pytest.raises(ValueError, match="contains a WhisperForAudioClassification, but of whisp"):
        read_model(folder)
    rewrite(folder, "config.json", architectures=["WhisperModel"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.encoder.extra"] = tensors.pop("model.encoder.conv1.bias")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(conv1.bias\); 1 not expected \(extra\)"):
        read_model(folder)
    with pytest.raises(ValueError, match="audio-spectrogram-transformer cannot hold"):
        FAMILIES["audio-spectrogram-transformer"].to_theirs(_contents(ours))


def _contents(model):
    from diffmm.interop.family import contents_of

    return contents_of(model)
