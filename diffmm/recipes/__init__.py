"""The recipe language: files, overrides, references, checks, and building of their objects."""
