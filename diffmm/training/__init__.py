"""Training: one Lightning module a task, and the optimizer, schedule and logging they share."""

from diffmm.training.bad_numbers import BadNumbers
from diffmm.training.callbacks import LambdaMonitor, SpeedMonitor
from diffmm.training.checkpoints import Checkpoints
from diffmm.training.classification import Classification
from diffmm.training.finetuning import FineTuneConfig
from diffmm.training.language import CausalLM, MaskedLM
from diffmm.training.loggers import LoggersMayFail
from diffmm.training.masked_autoencoding import MaskedAutoencoding
from diffmm.training.mixing import MixingConfig
from diffmm.training.optimizer import OptimizerConfig
from diffmm.training.parallel import FSDP2Strategy
from diffmm.training.schedule import ScheduleConfig
from diffmm.training.stops import CleanStop
from diffmm.training.task import Task

__all__ = [
    "BadNumbers",
    "CausalLM",
    "Checkpoints",
    "Classification",
    "CleanStop",
    "FSDP2Strategy",
    "FineTuneConfig",
    "LambdaMonitor",
    "LoggersMayFail",
    "MaskedAutoencoding",
    "MaskedLM",
    "MixingConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "SpeedMonitor",
    "Task",
]
