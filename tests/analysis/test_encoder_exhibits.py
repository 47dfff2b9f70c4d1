"""Maps of encoders and captioning models over one sample."""

import numpy as np
import pytest
import torch

import diffmm
from diffmm.analysis.attention_maps import attention_maps
from diffmm.analysis.encoder_exhibits import caption_exhibit, encoder_exhibit
from diffmm.analysis.exhibits import Pieces, text_exhibit
from diffmm.tokenizers import ByteTokenizer

NAMES = ["A₁", "A₂", "A₁ − λA₂"]


def test_an_encoder_has_maps_but_no_answer():
    model = diffmm.create_model("image/digits_mae_tiny", attention="diff_v2").encoder.eval()
    image = torch.rand(1, 8, 8)
    found = encoder_exhibit({"own": model}, image, "sample 1")
    view = found.views["own"]
    assert (found.truth, view.answer, list(view.maps)) == ("sample 1", None, NAMES)
    assert view.maps["A₁"].shape == model.config.grid
    sound = diffmm.create_model("audio/sound_events_mae_tiny", attention="softmax").encoder.eval()
    heard = encoder_exhibit({"own": sound}, torch.randn(8000), "sample 1")
    rows, columns = heard.views["own"].maps["A"].shape
    assert rows < columns  # bands below each other, time to the right
    assert heard.clip_seconds == 8000 / sound.config.sample_rate_hz


@pytest.mark.parametrize("media", ["prefix", "cross_attention"])
def test_a_caption_attends_to_patches(media):
    """The weights are those of the decoder's last layer, from the tokens that predict the text, and
    do not depend on its last token, which predicts nothing."""
    recipe = "image_text/shapes_captions_tiny"
    model = diffmm.create_model(recipe, attention="diff_v2", media=media).eval()
    size = model.encoder.config.image_size
    image, tokens = torch.rand(3, size, size), torch.tensor([104, 105, 256])
    found = caption_exhibit({"own": model}, image, tokens, "hi").views["own"]
    assert list(found.maps) == NAMES
    layer = attention_maps(model, tokens[None], image[None], layers=[-1])[0]
    num_media, num_prefix = (each(image[None]) for each in
                             (model.num_media_tokens, model.num_prefix_tokens))  # fmt: skip
    places = [num_prefix - 1, num_prefix, num_prefix + 1]
    rows = layer.combined[0].mean(dim=0)[places, :num_media]
    expected = rows.mean(dim=0).view(model.encoder.config.grid)
    assert found.maps["A₁ − λA₂"] == pytest.approx(expected.numpy(), rel=1e-5)
    other = torch.tensor([104, 105, 97])
    again = caption_exhibit({"own": model}, image, other, "hi").views["own"]
    assert np.array_equal(again.maps["A₁"], found.maps["A₁"])


def test_an_encoder_of_text_shows_a_masked_token():
    model = diffmm.create_model("text/stdlib_mlm_tiny", attention="softmax").eval()
    tokens = torch.tensor([*b"abc", ByteTokenizer.mask_id, *b"ef"])
    found = text_exhibit({"own": model}, tokens, ord("d"), Pieces(ByteTokenizer()), query=3)
    assert found.pieces == ["a", "b", "c", "·", "e", "f"]
    assert (found.truth, found.query) == ("d", 3)
    with torch.no_grad():
        likely = model(tokens[None])[0, 3].softmax(-1).max()
    assert found.views["own"].probability == pytest.approx(float(likely))
