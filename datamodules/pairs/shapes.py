"""Generated pictures of shapes with captions, which need no files.

A picture shows one to three shapes in a row or a column. The caption says the size, the color and
the kind of each, and where they are: "a large red circle left of a small blue star". It is the only
caption of its picture that is right, so that a model can be judged by exact match.
"""

from dataclasses import dataclass
from itertools import product
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from datamodules.image.sources import LabelledImages
from datamodules.image.transform import ImageTransform
from datamodules.pairs.captions import Kind, diagonal, draw_distinct, draw_kinds
from datamodules.pairs.image_sources import ImagePairSource
from datamodules.pairs.sources import Medium, Pairs, PairSplits
from datamodules.shared.fingerprints import Fingerprint, digest
from datamodules.shared.sampling import sample_rng

COLORS = {
    "red": (215, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (240, 215, 40),
    "green": (50, 160, 70),
    "blue": (45, 90, 205),
    "purple": (135, 60, 165),
    "brown": (120, 75, 40),
    "black": (25, 25, 25),
}
SIZES = {"small": 0.085, "large": 0.155}
"""Half the width of each size, as a fraction of the picture's; three large shapes fit in a row."""

RELATIONS = ("left of", "above")
_FINER = 4  # a pixel is the average of this many by this many


def _star(points: int, inner: float) -> tuple[tuple[float, float], ...]:
    """The corners of a star in the unit circle, beginning at the top."""
    corners = []
    for number in range(2 * points):
        radius, angle = (inner if number % 2 else 1.0), pi * number / points
        corners.append((radius * sin(angle), -radius * cos(angle)))
    return tuple(corners)


_THIRD = 0.36
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),
    "triangle": ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)),
    "diamond": ((0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)),
    "star": _star(5, 0.42),
    "cross": (
        (-_THIRD, -1.0),
        (_THIRD, -1.0),
        (_THIRD, -_THIRD),
        (1.0, -_THIRD),
        (1.0, _THIRD),
        (_THIRD, _THIRD),
        (_THIRD, 1.0),
        (-_THIRD, 1.0),
        (-_THIRD, _THIRD),
        (-1.0, _THIRD),
        (-1.0, -_THIRD),
        (-_THIRD, -_THIRD),
    ),
}
"""Corners of each shape in [-1, 1]; a circle has none."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        things: Size, color and shape of each thing, from left to right or from top to bottom.
        relation: One of `RELATIONS`: where each thing is, seen from the next one.
    """

    things: tuple[tuple[str, str, str], ...]
    relation: str

    @property
    def caption(self) -> str:
        """The description of the scene.

        >>> Scene((("small", "red", "star"), ("large", "blue", "cross")), "above").caption
        'a small red star above a large blue cross'
        """
        return f" {self.relation} ".join(" ".join(("a", *thing)) for thing in self.things)


class RenderedShapes(ImagePairSource):
    """Pictures of colored shapes, with captions.

    Combinations of a color and a shape are held out: no training picture has a thing of such a
    combination, and every validation and test picture has at least one, although its colors and its
    shapes are known. All captions of a validation or test split differ.

    Args:
        num_images: Number of training pictures.
        num_val_images: Number of validation pictures, and of test pictures.
        num_shapes: Range of the number of shapes, in [1, 3].
        picture_size: Height and width of the pictures, in pixels.
        held_out_fraction: Fraction of the 48 combinations of color and shape that is held out; 0
            holds out none, so that validation pictures are new, but what is in them is not.
        seed: Seed of all pictures.

    Raises:
        ValueError: If an argument is out of range, or there are fewer different captions than
            validation pictures; the message names it.
    """

    image_size = 32
    # Crops keep at least a part of every shape.
    transform = ImageTransform(
        mean=(0.5,),
        std=(0.5,),
        interpolation="bicubic",
        crop_pct=1.0,
        scale=(0.9, 1.0),
        ratio=(0.95, 1.05),
        hflip=0.0,
        color_jitter=0.0,
    )

    def __init__(
        self,
        num_images: int = 4000,
        num_val_images: int = 500,
        *,
        num_shapes: tuple[int, int] = (1, 3),
        picture_size: int = 64,
        held_out_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        for name, number, least in (
            ("num_images", num_images, 1),
            ("num_val_images", num_val_images, 1),
            ("picture_size", picture_size, 16),
            ("seed", seed, 0),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if not 1 <= num_shapes[0] <= num_shapes[1] <= 3:
            raise ValueError(
                f"num_shapes must be two increasing numbers in [1, 3], got {tuple(num_shapes)}"
            )
        self.num_images = num_images
        self.num_val_images = num_val_images
        self.num_shapes = num_shapes
        self.picture_size = picture_size
        self.held_out_fraction = held_out_fraction
        self.seed = seed
        _ = self.held_out  # checks the fraction

    @property
    def held_out(self) -> list[Kind]:
        """The combinations of color and shape that no training picture has."""
        return diagonal(list(COLORS), list(SHAPES), self.held_out_fraction)

    def splits(self, medium: Medium[LabelledImages]) -> PairSplits[LabelledImages]:
        train, val, test = (
            self._pairs(split, count)
            for split, count in enumerate(
                (self.num_images, self.num_val_images, self.num_val_images)
            )
        )
        return PairSplits(train, val, test)

    def _pairs(self, split: int, count: int) -> Pairs[LabelledImages]:
        rng, held_out = sample_rng(self.seed, split, 0), self.held_out
        known = [kind for kind in product(COLORS, SHAPES) if split or kind not in held_out]

        def draw() -> Scene:
            number = int(rng.integers(*self.num_shapes, endpoint=True))
            kinds = draw_kinds(rng, number, known, held_out if split else ())
            sizes = [list(SIZES)[i] for i in rng.integers(len(SIZES), size=number)]
            things = tuple((size, *kind) for size, kind in zip(sizes, kinds, strict=True))
            return Scene(things, RELATIONS[int(rng.integers(2))])

        if split:
            advice = f"reduce num_val_images ({count}), or increase num_shapes"
            scenes = draw_distinct(count, draw, lambda scene: scene.caption, advice)
        else:
            scenes = [draw() for _ in range(count)]
        images = RenderedScenes(scenes, self.picture_size, (self.seed, split))
        return Pairs(images, [[scene.caption] for scene in scenes])


class RenderedScenes(LabelledImages):
    """The pictures of scenes, drawn on access.

    Places, exact sizes and colors, and the background are random, a function of `key` and the
    index.

    Args:
        scenes: The scenes.
        size: Height and width of the pictures, in pixels.
        key: Seed and split.
    """

    def __init__(self, scenes: list[Scene], size: int, key: tuple[int, int]) -> None:
        self.scenes = scenes
        self.size = size
        self.key = key
        self.labels = [()] * len(scenes)

    def describe(self, index: int) -> str:
        return f"rendered picture {index}"

    def fingerprint(self) -> Fingerprint:
        scenes = digest(str(scene) for scene in self.scenes)
        return {**super().fingerprint(), "contents of scenes": scenes, "picture_size": self.size}

    def read(self, index: int) -> Image.Image:
        scene, rng = self.scenes[index], sample_rng(*self.key, 1, index)
        side = self.size * _FINER
        background = rng.integers(225, 256, size=3)
        picture = Image.new("RGB", (side, side), tuple(background.tolist()))
        draw = ImageDraw.Draw(picture)
        number = len(scene.things)
        # Nearly one line, so that nothing is also above what it is left of.
        line = rng.uniform(0.25, 0.75)
        for place, (size, color, shape) in enumerate(scene.things):
            radius = SIZES[size] * rng.uniform(0.93, 1.0)
            low, high = place / number + radius, (place + 1) / number - radius
            along = rng.uniform(low, high)
            across = line + rng.uniform(-0.05, 0.05)
            x, y = (along, across) if scene.relation == "left of" else (across, along)
            paint = np.clip(np.array(COLORS[color]) + rng.integers(-12, 13, size=3), 0, 255)
            fill = tuple(paint.tolist())
            if shape == "circle":
                draw.ellipse(
                    [side * v for v in (x - radius, y - radius, x + radius, y + radius)], fill
                )
            else:
                corners = [
                    (side * (x + radius * u), side * (y + radius * v)) for u, v in SHAPES[shape]
                ]
                draw.polygon(corners, fill)
        return picture.reduce(_FINER)
