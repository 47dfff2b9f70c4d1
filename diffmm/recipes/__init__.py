"""The language of recipes: files, overrides, references, all mistakes, and what they build."""
