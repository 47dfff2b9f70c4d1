"""Runs that lose nothing: checkpoints, stops by signals, steps whose numbers are not finite."""
