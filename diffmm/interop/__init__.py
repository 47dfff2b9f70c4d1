"""Weights of other implementations, a file each."""
