"""Settings of `AudioData` for a user's own sounds."""

from collections.abc import Mapping
from typing import Any

from datamodules.audio.clips import EXTENSIONS, AudioClips, FileClips
from datamodules.audio.sources import SoundFolder, SoundTable
from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.own_data import (
    KEPT,
    OwnData,
    describe_splits,
    fitting_batch_size,
    locate,
    looked_at,
    splits_of,
)

LOWEST_RATE_HZ = 8000
"""Minimum sample rate of a user's clips that a model adopts; that of telephone audio."""


def own_sounds(path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
    """Settings for a folder or a CSV file of sounds; see `AudioData.own_data`."""
    arguments = (given.get("source") or {}).get("init_args") or {}
    located = locate(path, "sounds", EXTENSIONS, arguments)
    make = SoundTable if located.is_table else SoundFolder
    taken = [name for name in KEPT if name != "max_pixels"]
    kept = {
        name: arguments[name]
        for name in (taken if located.is_table else ("val", "test", "val_fraction"))
        if name in arguments
    }
    settings = {**kept, **located.arguments}
    source = make(**settings)
    splits = splits_of(source, lambda file: FileClips([file], [()]).info(0))
    rates, lengths = inspect_sounds(splits.train)
    summary = describe_splits(path, "sounds", settings, splits) + lengths
    found: dict[str, Any] = {
        "source": {"class_path": f"datamodules.audio.{make.__name__}", "init_args": settings},
        **fitting_batch_size(given, 32, len(splits.train.labels)),
    }
    facts = {"num_classes": len(splits.class_names)}
    rate_hz = rate_to_adopt(rates, given, inputs_may_change=inputs_may_change)
    if rate_hz is None:
        found["resample"] = True
    elif rate_hz:
        facts["sample_rate_hz"] = rate_hz
    return OwnData(found, facts, summary)


def rate_to_adopt(
    rates: set[int], given: Mapping[str, Any], *, inputs_may_change: bool
) -> int | None:
    """The sample rate of a user's clips that a model should adopt, in Hz; 0 if the recipe already
    has it, and `None` if the clips must be resampled."""
    rate_hz = given.get("sample_rate_hz", 16000)
    if rates == {rate_hz}:
        return 0
    is_lower = len(rates) == 1 and LOWEST_RATE_HZ <= min(rates) < rate_hz
    return min(rates) if is_lower and inputs_may_change else None


def inspect_sounds(clips: AudioClips) -> tuple[set[int], str]:
    """The sample rates of some clips, and a summary of rates and lengths.

    Raises:
        BadSampleError: If none of them can be read.
    """
    infos, fault = [], None
    for index in looked_at(clips):
        try:
            infos.append(clips.info(index))
        except BadSampleError as error:
            fault = fault or error
    if fault is not None and not infos:
        raise fault
    rates = {info.sample_rate_hz for info in infos}
    seconds = sorted(info.num_samples / info.sample_rate_hz for info in infos)
    *others, highest = [f"{rate:,}" for rate in sorted(rates)]
    listed = f"{'; '.join(others)} and {highest}" if others else highest
    return rates, f"; {listed} Hz, {seconds[0]:.2g} to {seconds[-1]:.2g} s"
