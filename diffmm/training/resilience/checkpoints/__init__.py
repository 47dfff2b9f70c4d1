"""Verified checkpoints, from which a run resumes exactly."""

from diffmm.checkpoint_folders import find_whole
from diffmm.training.resilience.checkpoints.callback import Checkpoints
from diffmm.training.resilience.checkpoints.finite import NonFiniteWeightsError, check_weights
from diffmm.training.resilience.checkpoints.writer import SaveFailedError

__all__ = ["Checkpoints", "NonFiniteWeightsError", "SaveFailedError", "check_weights", "find_whole"]
