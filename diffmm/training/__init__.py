"""Training: one Lightning module per task, and the optimizer, schedule and logging they share."""

from diffmm.training.callbacks import LambdaMonitor, SpeedMonitor
from diffmm.training.captioning import Captioning
from diffmm.training.classification import Classification
from diffmm.training.contrastive import Contrastive
from diffmm.training.ctc import CTC
from diffmm.training.finetuning import FineTuneConfig, LoRAConfig
from diffmm.training.language import CausalLM, MaskedLM
from diffmm.training.last_validation import LastValidation
from diffmm.training.masked_autoencoding import MaskedAutoencoding
from diffmm.training.mixing import MixingConfig
from diffmm.training.optimizer import OptimizerConfig
from diffmm.training.parallel import FSDP2Strategy
from diffmm.training.resilience.checkpoints import Checkpoints
from diffmm.training.resilience.loggers import LoggersMayFail
from diffmm.training.resilience.non_finite import NonFiniteGuard
from diffmm.training.resilience.shutdown import GracefulShutdown
from diffmm.training.schedule import ScheduleConfig
from diffmm.training.task import Task

__all__ = [
    "CTC",
    "Captioning",
    "CausalLM",
    "Checkpoints",
    "Classification",
    "Contrastive",
    "FSDP2Strategy",
    "FineTuneConfig",
    "GracefulShutdown",
    "LambdaMonitor",
    "LastValidation",
    "LoRAConfig",
    "LoggersMayFail",
    "MaskedAutoencoding",
    "MaskedLM",
    "MixingConfig",
    "NonFiniteGuard",
    "OptimizerConfig",
    "ScheduleConfig",
    "SpeedMonitor",
    "Task",
]
