"""Reading a segment of a clip at the model's sample rate."""

from functools import lru_cache
from math import gcd

import numpy as np
from numpy.typing import NDArray
from scipy.signal import firwin, resample_poly

from datamodules.audio.clips import AudioClips
from datamodules.shared.bad_samples import BadSampleError

Waveform = NDArray[np.float32]

MAX_TERM = 400_000
"""Maximum term of the ratio of two sample rates in lowest terms. The filter is 20 times as long: at
most 32 MB, computed in 1.5 s."""
MAX_RAISE = 100
"""Maximum factor by which a sample rate is increased; a header of 1 Hz would fill the memory."""


class ClipReader:
    """Reads clips at one sample rate, whole or cropped.

    Args:
        clips: The clips.
        sample_rate_hz: Sample rate of the waveforms, in Hz.
        resample: Whether clips of other sample rates are resampled; otherwise they raise an error.
    """

    def __init__(self, clips: AudioClips, *, sample_rate_hz: int, resample: bool) -> None:
        self.clips = clips
        self.sample_rate_hz = sample_rate_hz
        self.resample = resample

    def num_samples(self, index: int) -> int:
        """The length of a whole clip at this reader's sample rate.

        Raises:
            ValueError: If the clip cannot be read; the message names it.
        """
        total, rate_hz = self.clips.info(index)
        return -(-total * self.sample_rate_hz // rate_hz)

    def read(
        self, index: int, *, max_samples: int | None = None, position: float = 0.0
    ) -> Waveform:
        """Read a clip, `[S]` float32, cropped to `max_samples` if it is longer.

        Only the cropped segment is decoded.

        Args:
            index: Index of the clip.
            max_samples: Maximum number of samples; `None` for the whole clip.
            position: Position of the crop in [0, 1], from the start (0) to the end (1).

        Raises:
            ValueError: If the clip cannot be read, or has another sample rate and `resample` is
                false; the message names the clip.
            BadSampleError: If the sample rate cannot be converted; see `MAX_TERM` and `MAX_RAISE`.
        """
        total, rate_hz = self.clips.info(index)
        if rate_hz != self.sample_rate_hz and not self.resample:
            raise ValueError(
                f"{self.clips.describe(index)} has a sample rate of {rate_hz} Hz, not "
                f"{self.sample_rate_hz} Hz: set --data.resample true, or --data.sample_rate_hz to "
                f"its rate"
            )
        up, down = self._ratio(index, rate_hz)
        start, length = 0, total
        if max_samples is not None:
            length = min(total, -(-max_samples * rate_hz // self.sample_rate_hz))
            start = round(position * (total - length))
        waveform = self.clips.read(index, start, length)
        if up != down:
            waveform = resample_poly(waveform, up, down, window=_low_pass(max(up, down)))
        return waveform[:max_samples]

    def _ratio(self, index: int, rate_hz: int) -> tuple[int, int]:
        """The ratio of this reader's sample rate to a clip's, in lowest terms."""
        shared = gcd(self.sample_rate_hz, rate_hz)
        up, down = self.sample_rate_hz // shared, rate_hz // shared
        if max(up, down) > MAX_TERM or up > MAX_RAISE * down:
            raise BadSampleError(
                f"{self.clips.describe(index)} has a sample rate of {rate_hz} Hz, which cannot be "
                f"converted to {self.sample_rate_hz} Hz: convert the file, or set "
                f"--data.sample_rate_hz to a rate that shares a larger factor with it",
                self.clips.file(index),
            )
        return up, down


@lru_cache(maxsize=8)
def _low_pass(term: int) -> NDArray[np.float32]:
    """The filter of SciPy's `resample_poly` for a ratio with this larger term, cached because SciPy
    would compute it for each clip: ten zero crossings per side, in a Kaiser window."""
    return firwin(20 * term + 1, 1 / term, window=("kaiser", 5.0)).astype(np.float32)
