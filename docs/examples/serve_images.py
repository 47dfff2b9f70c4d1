"""Classify images with `model.onnx`, without diffmm or torch."""

import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def classify(file: str, image: Image.Image) -> dict[str, float]:
    """The probability of each class, most likely first."""
    session = onnxruntime.InferenceSession(file)
    about = json.loads(session.get_modelmeta().custom_metadata_map["diffmm"])
    how = about["reader"]["init_args"]
    height, width = how["image_size"]
    assert (how["crop_mode"], height) == ("center", width), "other crops: see timm's transforms"
    image = plain(image)
    short = int(height / how["crop_pct"])
    size = [int(short * side / min(image.size)) for side in image.size]
    image = image.convert("L" if how["channels"] == 1 else "RGB")
    image = image.resize(size, Image.Resampling[how["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).reshape(height, width, -1) / 255
    pixels = (pixels - np.float32(how["mean"])) / np.float32(how["std"])
    (logits,) = session.run(None, {"images": pixels.transpose(2, 0, 1)[None]})
    odds = np.exp(logits[0] - logits.max())
    scores = 1 / (1 + np.exp(-logits[0])) if about["multi_label"] else odds / odds.sum()
    ranked = sorted(zip(scores, about["class_names"], strict=True), reverse=True)
    return {name: float(score) for score, name in ranked}


def plain(image: Image.Image) -> Image.Image:
    """The image upright, with 8 bits per channel, over white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    assert image.mode not in ("F", "LAB"), f"mode {image.mode}: save it with 8 or 16 bits"
    return image
