"""Models by the names of recipes, and trained models with their task."""
