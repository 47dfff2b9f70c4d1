"""Timing on a GPU."""

import time
from collections.abc import Callable

import torch


def median_ms(
    run: Callable[[], object], *, warmup: int = 5, repeats: int = 20, flush_mb: int = 256
) -> float:
    """Median milliseconds that `run` takes of the GPU, by CUDA events.

    Before each, the L2 cache is flushed over and over for some 2 ms, so that the host is ahead and
    the time it takes to launch does not show, as in a training step. `host_ms` is that time.
    """
    for _ in range(warmup):
        run()
    scratch = torch.empty(flush_mb << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        for _ in range(20):
            scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def host_ms(run: Callable[[], object], *, warmup: int = 3, repeats: int = 20) -> float:
    """Median milliseconds that the host takes to launch `run`, which is warm."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]
