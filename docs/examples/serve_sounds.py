"""Classify sounds with `model.onnx`, without diffmm or torch."""

import json

import numpy as np
import onnxruntime
import soundfile
from scipy.signal import resample_poly


def classify(file: str, sound: str) -> dict[str, float]:
    """The probability of each class, most likely first."""
    session = onnxruntime.InferenceSession(file)
    about = json.loads(session.get_modelmeta().custom_metadata_map["diffmm"])
    how = about["reader"]["init_args"]
    samples, rate_hz = soundfile.read(sound, dtype="float32", always_2d=True)
    samples = samples.mean(axis=1)
    wanted_hz = about["sample_rate_hz"]
    longest = None if how["crop"] == "full" else how["clip_samples"]
    if longest:
        length = -(-longest * rate_hz // wanted_hz)
        start = round(max(0, len(samples) - length) / 2) if how["crop"] == "center" else 0
        samples = samples[start : start + length]
    if rate_hz != wanted_hz:
        samples = resample_poly(samples, wanted_hz, rate_hz)[:longest].clip(-1, 1)
    # Clips of several lengths make a batch if they are padded with zeros: num_samples counts.
    batch = {"waveforms": samples[None], "num_samples": np.array([len(samples)])}
    (logits,) = session.run(None, batch)
    odds = np.exp(logits[0] - logits.max())
    scores = 1 / (1 + np.exp(-logits[0])) if about["multi_label"] else odds / odds.sum()
    ranked = sorted(zip(scores, about["class_names"], strict=True), reverse=True)
    return {name: float(score) for score, name in ranked}
