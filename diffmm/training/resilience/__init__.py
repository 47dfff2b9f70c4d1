"""Fault tolerance: checkpoints, graceful shutdown, non-finite steps and failing loggers."""
