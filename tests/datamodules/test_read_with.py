"""`read_with`: the inputs of evaluation are prepared by another reader."""

from dataclasses import replace

import pytest

from datamodules import AudioData, AudioTextData, ImageData, ImageTextData, RetrievalData, TextData
from datamodules.audio import SoundEvents
from datamodules.image import Digits
from datamodules.pairs import ImageAudioTextData, RenderedShapes, SynthesizedSounds
from datamodules.text import AssociativeRecall, TextFolder, TextReader


def images():
    return RenderedShapes(num_images=8, num_val_images=4)


def sounds():
    return SynthesizedSounds(num_clips=8, num_val_clips=4)


@pytest.mark.parametrize(
    ("make", "changes", "shapes"),
    [
        (lambda: ImageData(Digits()), {"image_size": (6, 10)}, {"images": (6, 10)}),
        (
            lambda: AudioData(SoundEvents(num_clips=8, num_val_clips=4)),
            {"clip_samples": 4000, "pad": True},
            {"waveforms": (4000,)},
        ),
        (
            lambda: ImageTextData(images()),
            {"image_size": (6, 10), "max_tokens": 9, "pad_texts": True},
            {"images": (6, 10), "tokens": (9,)},
        ),
        (
            lambda: AudioTextData(sounds()),
            {"clip_samples": 4000, "pad": True, "max_tokens": 9, "pad_texts": True},
            {"waveforms": (4000,), "tokens": (9,)},
        ),
        (
            lambda: ImageAudioTextData(images(), sounds()),
            {"image_size": (6, 10), "max_tokens": 9, "pad_texts": True},
            {"images": (6, 10), "tokens": (9,)},
        ),
    ],
)
def test_inputs_are_those_of_the_reader(make, changes, shapes):
    data = make()
    reader = replace(data.evaluation_reader, **changes)
    data.read_with(reader)
    assert data.evaluation_reader == reader
    data.setup("validate")
    loaders = data.val_dataloader()
    batch = next(iter(loaders))
    for name, shape in shapes.items():
        assert batch[name].shape[-len(shape) :] == shape


def test_texts_are_those_of_the_tokenizer(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("Some text. " * 9)
    own = TextReader(tokenizer="bytes", definition=None)
    words = RetrievalData(AssociativeRecall(num_pairs=2)).evaluation_reader
    data = TextData(TextFolder(str(tmp_path)), sequence_length=8, vocab_size=257)
    data.read_with(words)
    assert data.tokenizer.name == words.encoder.name
    data = TextData(TextFolder(str(tmp_path)), sequence_length=8)
    data.read_with(own)
    assert data.tokenizer.name == "bytes"


def test_another_kind_of_reader_is_refused():
    data = RetrievalData(AssociativeRecall(num_pairs=2))
    data.read_with(data.evaluation_reader)
    for other in (
        TextReader(tokenizer="bytes"),
        RetrievalData(AssociativeRecall(num_pairs=3, num_keys=9)).evaluation_reader,
    ):
        with pytest.raises(ValueError, match="RetrievalData prepares its inputs in another way"):
            data.read_with(other)
    with pytest.raises(ValueError, match="than the model's TextReader: give the run"):
        ImageData(Digits()).read_with(TextReader(tokenizer="bytes"))
