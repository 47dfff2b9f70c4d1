"""The front door: models by a recipe's name, and trained models with what they are for."""
