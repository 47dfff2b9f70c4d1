"""A run's `config.yaml`, written when training begins."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffmm.runs.directories import save_config


class ConfigSaver(Callback):
    """Saves the config of a run once all checks have passed."""

    def __init__(self, run_dir: Path, comment: str, values: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.comment = comment
        self.values = values

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            save_config(self.run_dir, self.comment, self.values)
