"""Fault injection into real runs: `python -m benchmarks.faults`.

`kills` and `signals` end processes of runs, `damage` damages checkpoints, `disk` fills disks,
`neighbours` starts a run twice and changes its data, `strangers` replaces files by pipes and writes
invalid headers, and `mutations` changes recipes and checkpoints at random. Each yields a `Fault`
for every injected fault.
"""
