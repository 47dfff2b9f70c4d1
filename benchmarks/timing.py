"""Timing on a GPU."""

import math
import time
from collections.abc import Callable

import torch


def median_ms(
    run: Callable[[], object], *, warmup: int = 5, repeats: int = 20, flush_mb: int = 256
) -> float:
    """Median GPU time of `run` in milliseconds, measured by CUDA events.

    Before each repeat, the L2 cache is flushed repeatedly for twice the time that the host takes to
    launch `run` (`host_ms`), so that the host is ahead and its time is hidden, as in a training
    step.
    """
    for _ in range(warmup):
        run()
    scratch = torch.empty(flush_mb << 20, dtype=torch.uint8, device="cuda")
    # The minimum of five, because a flush that the host delays would lead to too few flushes.
    flush_ms = min(_event_ms(scratch.zero_) for _ in range(5))
    num_flushes = 1 + math.ceil(2 * host_ms(run) / flush_ms)
    times = []
    for _ in range(repeats):
        for _ in range(num_flushes):
            scratch.zero_()
        times.append(_event_ms(run))
    return sorted(times)[len(times) // 2]


def _event_ms(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def host_ms(run: Callable[[], object], *, warmup: int = 3, repeats: int = 20) -> float:
    """Median milliseconds that the host takes to launch `run`, after warmup."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]
