"""Breaks runs on purpose and counts what survives: `python -m benchmarks.faults`.

`kills` and `signals` end whole processes of real runs, `damage` spoils checkpoints and disks,
`mutations` spoils recipes. Each gives a `Fault` for every fault that it injected.
"""
