"""The tasks of the table: a recipe, its overrides, and the metric that counts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

CONFIG = "--model.model.config."
BACKBONE = f"{CONFIG}backbone."
SEPARATOR = "<|end of file|>"
"""What separates the documents of the text task."""

SMALL_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
TEXT_RATES = (1e-3, 2e-3, 4e-3)

Size = Literal["full", "tiny"]
Metric = Literal["loss", "accuracy", "media_to_text_recall_1", "exact_match", "word_error_rate"]
LOWER_IS_BETTER = ("loss", "word_error_rate")


@dataclass(frozen=True)
class TaskSpec:
    """A task of the table.

    Attributes:
        recipe: Name of the recipe.
        steps: Number of steps, for each size.
        metric: The metric that is compared: `"loss"` in nats, or a share such as `"accuracy"`.
        overrides: Overrides of the recipe at full size; `DATA` is the folder of prepared data, and
            `CACHE` that of unpacked files.
        tiny: Further overrides at tiny size.
        rates: Grid of learning rates.
        prepared: Whether the task needs prepared data, in the folder `DATA/NAME`.
        backbones: Prefixes of the settings of the model's backbones.
        over_training: Whether the mean of the metric over the validations during training is
            compared, for a task that all variants solve in the end. It says how soon.
        parts: Metrics of the modalities alone, which the table shows, too.
        graph: Whether a step can be a CUDA graph. That of torch's CTC loss cannot, which reads the
            lengths on the host; then the model is one.
    """

    recipe: str
    steps: dict[Size, int]
    metric: Metric = "accuracy"
    overrides: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()
    rates: tuple[float, ...] = SMALL_RATES
    prepared: bool = False
    backbones: tuple[str, ...] = (BACKBONE,)
    over_training: bool = False
    parts: tuple[str, ...] = ()
    graph: bool = True

    @property
    def sign(self) -> int:
        """1 if a larger metric is better, otherwise -1."""
        return -1 if self.metric in LOWER_IS_BETTER else 1

    @property
    def unit(self) -> int:
        """What the metric is multiplied by in tables: 100 for a share, in percent."""
        return 1 if self.metric == "loss" else 100

    @property
    def title(self) -> str:
        """What is compared."""
        return f"mean {self.metric} over training" if self.over_training else self.metric

    @property
    def num_shown(self) -> int:
        """Number of digits of the metric in tables."""
        return 3 if self.metric == "loss" else 2

    def given(self, size: Size, data: Path, cache: Path) -> list[str]:
        """The overrides of the recipe for a size."""
        overrides = self.overrides if size == "full" else (*self.overrides, *self.tiny)
        return [text.replace("DATA", str(data)).replace("CACHE", str(cache)) for text in overrides]


@dataclass(frozen=True)
class _Folder:
    """Overrides for a source of class folders in prepared data."""

    class_path: str
    name: str
    more: tuple[str, ...] = field(default=())

    @property
    def overrides(self) -> tuple[str, ...]:
        root = f"DATA/{self.name}"
        return (
            f"--data.source={{class_path: {self.class_path}, "
            f"init_args: {{train: {root}/train, val: {root}/val}}}}",
            *self.more,
        )


def _text_source(split: str) -> str:
    return (
        f"{{class_path: datamodules.text.TextFolder, init_args: {{root: CACHE/text, "
        f'pattern: {split}.txt, separator: "{SEPARATOR}"}}}}'
    )


TEXT = (
    "--trainer.precision=bf16-mixed",
    "--trainer.limit_val_batches=16",
    "--vars.sequence_length=1024",
    "--vars.vocab_size=16384",
    "--vars.tokenizer=DATA/text/tokenizer.json",
    f"--data.source={_text_source('train')}",
    f"--data.validation_source={_text_source('val')}",
    "--data.test_fraction=0.0",
    "--data.cache_dir=CACHE/text",
    "--data.document_mask=false",
    "--data.batch_size=64",
    f"{CONFIG}tie_embeddings=false",
    f"{BACKBONE}dim=512",
    f"{BACKBONE}depth=8",
    f"{BACKBONE}num_heads=16",
    f"{BACKBONE}qk_norm=false",
    f"{BACKBONE}init_std=0.02",
)
"""42 M parameters: 8 layers of width 512 and a vocabulary of 16,384."""

TINY_TEXT = (
    "--trainer.precision=32-true",
    "--trainer.limit_val_batches=4",
    "--vars.sequence_length=64",
    "--data.batch_size=8",
    f"{BACKBONE}dim=64",
    f"{BACKBONE}depth=2",
    f"{BACKBONE}num_heads=4",
)

FASHION = (
    "--data.source={class_path: datamodules.image.FashionMNIST, "
    "init_args: {root: DATA/fashion_mnist}}",
    "--data.batch_size=128",
    "--vars.image_size=28",
    f"{CONFIG}patch_size=4",
    f"{BACKBONE}dim=128",
    f"{BACKBONE}depth=6",
    f"{BACKBONE}num_heads=8",
)

LETTERS = _Folder(
    "datamodules.image.ImageFolder",
    "letters",
    (
        "--data.channels=1",
        "--data.transform={mean: [0.5], std: [0.25], crop_pct: 1.0, scale: [0.7, 1.0], "
        "ratio: [0.9, 1.1], hflip: 0.0, color_jitter: 0.0}",
        "--vars.image_size=24",
        f"{CONFIG}patch_size=4",
        f"{CONFIG}num_classes=26",
    ),
).overrides

SPEECH = _Folder(
    "datamodules.audio.SoundFolder",
    "speech",
    (
        "--data.batching=fixed",
        "--data.batch_size=32",
        "--vars.clip_seconds=2.0",
        f"{CONFIG}num_classes=5",
    ),
).overrides

TOWERS = (f"{CONFIG}image.backbone.", f"{CONFIG}text.backbone.")
PADDED = "--data.pad_texts=true"
"""Texts of one length, since the shapes of a step do not change."""

EMOJI = (
    "--data.source={class_path: datamodules.pairs.PairFolder, "
    "init_args: {train: DATA/emoji/train, val: DATA/emoji/val}}",
    "--data.transform={mean: [0.5], std: [0.5], interpolation: bicubic, crop_pct: 1.0, "
    "scale: [0.8, 1.0], ratio: [0.9, 1.1], hflip: 0.0, color_jitter: 0.0}",
    PADDED,
    "--trainer.precision=bf16-mixed",
)

ENCODER_AND_DECODER = (f"{CONFIG}encoder.backbone.", f"{CONFIG}decoder.backbone.")

TRANSCRIPTS = (
    "--data.source={class_path: datamodules.pairs.PairFolder, "
    "init_args: {train: DATA/transcripts/train, val: DATA/transcripts/val}}",
    "--data.batching=fixed",
    PADDED,
)
"""Recorded English prompts, of which those of validation have sentences of their own."""

BOTH_TOWERS = (*TOWERS, f"{CONFIG}audio.backbone.")
"""Towers of images, texts and sounds."""

SHORT = ("--data.batch_size=8", "--data.num_workers=0", "--trainer.limit_val_batches=4")
FEW_LAYERS = (f"{BACKBONE}depth=2", f"{BACKBONE}dim=32")
FEW_LAYERS_OF_TOWERS = tuple(f"{tower}{size}" for tower in TOWERS for size in ("depth=2", "dim=32"))
ONE_LAYER_EACH = tuple(
    f"{part}{size}" for part in ENCODER_AND_DECODER for size in ("depth=1", "dim=32")
)


def _images_and_sounds(shared_blocks: int) -> TaskSpec:
    """One model of images, sounds and texts, whose towers share their last blocks, of four.

    Models that share more have fewer parameters: attention is compared within a sharing.
    """
    of_two = shared_blocks // 2
    return TaskSpec(
        "multimodal/shapes_and_sounds_tiny",
        {"full": 1200, "tiny": 12},
        "media_to_text_recall_1",
        (PADDED, "--data.batching=fixed", f"--vars.shared_blocks={shared_blocks}"),
        (
            *SHORT,
            *(f"{tower}{size}" for tower in BOTH_TOWERS for size in ("depth=2", "dim=32")),
            f"--vars.shared_blocks={of_two}",
        ),
        backbones=BOTH_TOWERS,
        parts=("image_to_text_recall_1", "audio_to_text_recall_1"),
    )


TASKS: dict[str, TaskSpec] = {
    "text": TaskSpec(
        "text/stdlib_tiny", {"full": 600, "tiny": 12}, "loss", TEXT, TINY_TEXT, TEXT_RATES, True
    ),
    "fashion_mnist": TaskSpec(
        "image/digits_tiny",
        {"full": 1500, "tiny": 12},
        overrides=FASHION,
        tiny=(*SHORT, *FEW_LAYERS),
        prepared=True,
    ),
    "letters": TaskSpec(
        "image/digits_tiny",
        {"full": 900, "tiny": 12},
        overrides=LETTERS,
        tiny=(*SHORT, *FEW_LAYERS),
        prepared=True,
    ),
    "digits": TaskSpec("image/digits_tiny", {"full": 450, "tiny": 12}, tiny=(*SHORT, *FEW_LAYERS)),
    "speech": TaskSpec(
        "audio/sound_events_tiny",
        {"full": 1200, "tiny": 12},
        overrides=SPEECH,
        tiny=(*SHORT, *FEW_LAYERS),
        prepared=True,
    ),
    "sound_events": TaskSpec(
        "audio/sound_events_tiny", {"full": 800, "tiny": 12}, tiny=(*SHORT, *FEW_LAYERS)
    ),
    "needles": TaskSpec(
        "text/needles_tiny",
        {"full": 2000, "tiny": 12},
        tiny=SHORT,
        rates=(5e-4, 1e-3, 2e-3),
        over_training=True,
    ),
    "recall": TaskSpec(
        "text/recall_tiny", {"full": 4000, "tiny": 12}, tiny=SHORT, over_training=True
    ),
    "many_shot": TaskSpec(
        "text/many_shot_tiny", {"full": 4000, "tiny": 12}, tiny=SHORT, over_training=True
    ),
    "shapes": TaskSpec(
        "image_text/shapes_tiny",
        {"full": 600, "tiny": 12},
        "media_to_text_recall_1",
        (PADDED,),
        (*SHORT, *FEW_LAYERS_OF_TOWERS),
        backbones=TOWERS,
    ),
    "emoji": TaskSpec(
        "image_text/emoji",
        {"full": 1500, "tiny": 12},
        "media_to_text_recall_1",
        EMOJI,
        (*SHORT, *FEW_LAYERS_OF_TOWERS),
        (2.5e-4, 5e-4, 1e-3, 2e-3),
        prepared=True,
        backbones=TOWERS,
    ),
    "captions": TaskSpec(
        "image_text/shapes_captions_tiny",
        {"full": 3000, "tiny": 12},
        "exact_match",
        (PADDED,),
        (*SHORT, *ONE_LAYER_EACH, "--vars.max_tokens=48", "--model.num_generated=8"),
        backbones=ENCODER_AND_DECODER,
    ),
    "transcripts": TaskSpec(
        "audio_text/prompts_ctc_tiny",
        {"full": 2000, "tiny": 12},
        "word_error_rate",
        TRANSCRIPTS,
        (*SHORT, f"{CONFIG}encoder.backbone.depth=2", f"{CONFIG}encoder.backbone.dim=32"),
        prepared=True,
        backbones=(f"{CONFIG}encoder.backbone.",),
        graph=False,
    ),
    "shapes_and_sounds": _images_and_sounds(0),
    "shapes_and_sounds_partly_shared": _images_and_sounds(2),
    "shapes_and_sounds_shared": _images_and_sounds(4),
}
"""The tasks, by name."""
