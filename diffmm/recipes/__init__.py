"""The recipe language: files, overrides, references, checks, and creation of the objects."""
