"""Run directories: where a run is kept, and which process it belongs to."""
