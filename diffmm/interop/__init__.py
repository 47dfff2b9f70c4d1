"""Conversion of weights from other implementations, one per file."""
