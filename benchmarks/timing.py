"""Timing on a GPU."""

from collections.abc import Callable

import torch


def median_ms(
    run: Callable[[], object], *, warmup: int = 5, repeats: int = 20, flush_mb: int = 256
) -> float:
    """Median milliseconds of `run` by CUDA events, the L2 cache flushed before each."""
    for _ in range(warmup):
        run()
    scratch = torch.empty(flush_mb << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]
