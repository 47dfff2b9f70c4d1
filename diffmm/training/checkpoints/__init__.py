"""Checkpoints that are whole, and from which a run goes on exactly where it was."""

from diffmm.checkpoint_folders import find_whole
from diffmm.training.checkpoints.callback import Checkpoints
from diffmm.training.checkpoints.finite import BadWeights, check_weights
from diffmm.training.checkpoints.writer import SaveFailed

__all__ = ["BadWeights", "Checkpoints", "SaveFailed", "check_weights", "find_whole"]
