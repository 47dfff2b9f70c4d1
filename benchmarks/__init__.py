"""Tables of speed and memory, each one command: `python -m benchmarks.NAME`."""
