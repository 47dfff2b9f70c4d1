"""Base class of the training tasks: optimizer, fine-tuning, compilation, checkpoints and logging.

Every task logs the following metrics, `train/` and `lambda/` at every logging step:

| name | meaning |
|---|---|
| `train/loss` | mean loss over all targets of the step |
| `train/learning_rate` | peak learning rate times the factor of the schedule |
| `train/grad_norm` | norm of all gradients, before clipping |
| `train/skipped_steps` | number of skipped steps so far, once there are any (`NonFiniteGuard`) |
| `train/samples_per_second`, `train/tokens_per_second` | throughput since the last logging step |
| `train/data_wait` | share of that time in which the process waited for batches, in [0, 1] |
| `lambda/layer_00`, ... | mean lambda of each differential layer |
| `val/loss`, ... | metrics of the task, once per validation; `test/loss`, ... likewise |
"""

import dataclasses
from typing import Any, Self

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from diffmm.batch import InputShapes
from diffmm.layers.block import Block
from diffmm.models.adapters import SCALE_KEY, scale_of
from diffmm.models.backbone import Backbone
from diffmm.models.description import MODELS, describe, unwrap
from diffmm.models.job import Job
from diffmm.models.safetensors_files import DESCRIPTION_KEY, JOB_KEY
from diffmm.models.weights import load_weights
from diffmm.renamed import STATES, weights_with_new_names
from diffmm.training.accumulation import AccumulatedLoss, LossSum
from diffmm.training.batches import AnyBatches
from diffmm.training.callbacks import LambdaMonitor, SpeedMonitor
from diffmm.training.evaluation import counted
from diffmm.training.finetuning import FineTuneConfig, add_adapters, freeze
from diffmm.training.float8 import use_float8
from diffmm.training.lightning_internals import trainer_of
from diffmm.training.optimizer import OptimizerConfig, check_kind, make_optimizer
from diffmm.training.parallel import read_any_checkpoint
from diffmm.training.precision import exact_fields, keep_exact
from diffmm.training.resilience.checkpoints.progress import is_step_boundary
from diffmm.training.resilience.coordinator import Coordinator
from diffmm.training.resilience.loggers import LoggersMayFail
from diffmm.training.resilience.non_finite import NonFiniteGuard
from diffmm.training.resilience.shutdown import GracefulShutdown
from diffmm.training.restoring import TASK_KEY, describe_task, restore_task
from diffmm.training.schedule import ScheduleConfig, make_scheduler, set_learning_rates
from diffmm.training.sharding import clip_gradients, gradient_norm, is_sharded, shard
from diffmm.training.step_log import StepLog, StepLogger, log_step


class Task(AnyBatches):
    """A model and its training settings. Subclasses define the loss and the metrics.

    Args:
        model: Model to train.
        optimizer: Settings of the optimizer, AdamW or Muon.
        schedule: Learning-rate schedule.
        finetune: Weights to start from, layers to freeze, and low-rank adapters.
        compile: Whether to run the model under `torch.compile`, block by block if it is sharded.
            The names of the weights do not change.
        activation_checkpointing: Whether to recompute each block in the backward pass to save
            memory.
        fp8: Whether training runs the linear layers inside the blocks in float8 (see
            `diffmm.training.float8`); needs torchao (`diffmm[fp8]`) and an NVIDIA GPU of compute
            capability 8.9 or later, on one device or under `ddp`.

    Raises:
        ValueError: If the model does not support the requested activation checkpointing or
            freezing.

    Attributes:
        job: Purpose of the model, which is stored in checkpoints; set by `setup`.
        recipe: Name of the recipe, if the task is trained by one.
        details: Non-scalar metrics of the last evaluation, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        finetune: FineTuneConfig | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        fp8: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.finetune = finetune or FineTuneConfig()
        if self.finetune.freeze == "all":
            raise ValueError(
                "finetune.freeze='all' would leave nothing to train: it is for a part of a model"
            )
        self.compile_model = compile
        self.activation_checkpointing = activation_checkpointing
        self.fp8 = fp8
        if activation_checkpointing:
            backbones = [module for module in model.modules() if isinstance(module, Backbone)]
            if not backbones:
                raise ValueError(
                    f"activation_checkpointing=True needs a Backbone, and {type(model).__name__} "
                    f"has none"
                )
            for backbone in backbones:
                backbone.activation_checkpointing = True
        self.description: dict[str, Any] | None = None
        self.job: Job | None = None
        self.recipe: str | None = None
        self.frozen = freeze(model, self.finetune)
        add_adapters(model, self.finetune)
        self.accumulated = AccumulatedLoss()
        self.step_log = StepLog()
        self.unmeasured: set[str] = set()
        self.metrics = self._new_metrics()
        self.details: dict[str, Tensor] = {}

    def loss_sum(self, batch: Any, batch_idx: int) -> LossSum:
        """Return the summed loss of a training batch and its number of targets. With both, the
        gradients do not depend on the micro-batches (see `diffmm.training.accumulation`)."""
        raise NotImplementedError

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss of a training batch, a scalar."""
        return self.loss_sum(batch, batch_idx).mean()

    def target_shapes(self, inputs: InputShapes) -> InputShapes:
        """Return the shapes and dtypes of the targets in a training batch whose inputs have the
        given shapes; none by default."""
        return {}

    def make_metrics(self) -> dict[str, Metric]:
        """Return new metrics for one evaluation, by name. One that computes a dict of scalars is
        logged by the names in it."""
        raise NotImplementedError

    def update_metrics(self, batch: Any, metrics: dict[str, Metric]) -> None:
        """Update `metrics`, created by `make_metrics`, with a batch."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after every optimizer step, for limits of weights; does nothing by default."""

    @property
    def learning_rate(self) -> float:
        """The peak learning rate; Lightning's learning-rate finder sets it."""
        return self.optimizer_config.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.optimizer_config = dataclasses.replace(self.optimizer_config, learning_rate=value)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return the predictions for a batch, with the samples' `index` if the batch has one."""
        raise NotImplementedError

    def observe(self, batch: Any) -> None:
        """Run the model over a batch for a callback that observes its layers."""
        self.predict_step(batch)

    def make_job(self, data: Any) -> Job:
        """Describe the purpose of the model: the inputs as described by the datamodule (by
        `describe_inputs`, or at least `class_names`), and the outputs of the task."""
        describe_inputs = getattr(data, "describe_inputs", None)
        if describe_inputs is not None:
            inputs = describe_inputs()
        else:
            names = getattr(data, "class_names", None)
            inputs = {} if names is None else {"class_names": [str(name) for name in names]}
        return Job.of({**inputs, "recipe": self.recipe})

    def setup(self, stage: str) -> None:
        read_any_checkpoint(self.trainer.strategy)
        if not is_sharded(self.model) and type(unwrap(self.model)) in MODELS.values():
            self.description = describe(self.model)
        self.job = self.make_job(getattr(self.trainer, "datamodule", None))
        keep_exact(self.trainer.precision_plugin, exact_fields(self.model))
        if self.device_mesh is None:
            if self.fp8 and stage == "fit":
                use_float8(self.model, self.trainer.strategy.root_device)
            self._compile([self.model])

    def configure_model(self) -> None:
        """Shard the model if the strategy has a device mesh (see `diffmm.training.sharding`)."""
        if self.device_mesh is None or is_sharded(self.model):
            return
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, WeightAveraging) for callback in callbacks):
            raise ValueError(
                "weight averaging keeps a second model, which is not sharded: train with strategy "
                "ddp, or without EMAWeightAveraging"
            )
        if self.finetune.lora is not None:
            raise ValueError(
                "lora is not supported with sharded weights: train with strategy ddp, which needs "
                "little memory for adapters"
            )
        if self.fp8:
            raise ValueError(
                "fp8=True is not supported with sharded weights: train with strategy ddp, or drop "
                "fp8"
            )
        if self.trainer.state.fn == TrainerFn.FITTING:
            # Before sharding, because the weights in the file are not sharded. A resumed run
            # overwrites them.
            self.load_first_weights()
        shard(self.model, self.device_mesh)
        blocks: list[nn.Module] = [m for m in self.model.modules() if isinstance(m, Block)]
        self._compile(blocks or [self.model])

    def _compile(self, parts: list[nn.Module]) -> None:
        for part in parts:
            if self.compile_model and part._compiled_call_impl is None:
                part.compile()

    def on_fit_start(self) -> None:
        # Not earlier: only here is it known whether the trainer resumes a run.
        if self.trainer.ckpt_path is None and not is_sharded(self.model):
            self.load_first_weights()

    def load_first_weights(self) -> None:
        """Load the weights to start from, if there are any.

        Raises:
            FileNotFoundError, ValueError: As `diffmm.models.weights.load_weights`.
        """
        if self.finetune.weights is not None:
            load_weights(self.model, self.finetune.weights, skip_head=self.finetune.new_head)

    def forget_first_weights(self) -> None:
        """Drop the files of weights to start from, which a restored run does not need."""
        for name, value in vars(self).items():
            if isinstance(value, FineTuneConfig):
                setattr(self, name, dataclasses.replace(value, weights=None))

    def on_train_start(self) -> None:
        # Not earlier: until here, Lightning warns about modules in evaluation mode.
        self.train()
        # A restored optimizer has the learning rate of the schedule that it was saved with.
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            if isinstance(scheduler, LambdaLR):
                set_learning_rates(scheduler)

    def train(self, mode: bool = True) -> "Task":
        super().train(mode)
        for module in self.frozen:
            module.training = False
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss_sum = self.loss_sum(batch, batch_idx)
        num_accumulated = self.trainer.accumulate_grad_batches
        loss = self.accumulated.add(
            loss_sum,
            mean_over_processes(self, loss_sum.num_targets),
            is_first=batch_idx % num_accumulated == 0,
            least=1.0 / self.trainer.world_size,
        )
        if is_step_boundary(self.trainer):
            mean = loss.detach() if num_accumulated == 1 else self.accumulated.mean()
            log_step(self, "train/loss", mean_over_processes(self, mean), prog_bar=True)
            factor = self.schedule_config.factor(self.global_step)
            log_step(self, "train/learning_rate", self.learning_rate * factor)
        return loss

    def on_after_backward(self) -> None:
        # Before a gradient scaler, `NonFiniteGuard` and clipping use the gradients.
        num_accumulated = self.trainer.accumulate_grad_batches
        if num_accumulated > 1 and is_step_boundary(self.trainer):
            self.accumulated.complete(self.model.parameters(), num_accumulated)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", counted(batch, batch_idx, self.trainer.val_dataloaders), batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", counted(batch, batch_idx, self.trainer.test_dataloaders), batch)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as the trainer specifies, and log their norm, which `NonFiniteGuard` has
        already computed."""
        parameters = list(self.trainer.precision_plugin.main_params(optimizer))
        norm = Coordinator.of(self.trainer).norm
        if norm is None:
            norm = gradient_norm(parameters)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            clip_gradients(parameters, gradient_clip_val, norm)
        log_step(self, "train/grad_norm", norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_step()

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(
            self.model, self.optimizer_config, allow_fused=self.trainer.precision != "16-mixed"
        )
        scheduler = make_scheduler(optimizer, self.schedule_config)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_callbacks(self) -> list[Callback]:
        """Add the default callbacks that the trainer does not have: logging of lambda and
        throughput, skipping of non-finite steps, tolerance of logger failures, graceful shutdown
        and, last, passing on the metrics of each step."""
        defaults = (
            LambdaMonitor(),
            SpeedMonitor(),
            NonFiniteGuard(),
            LoggersMayFail(),
            GracefulShutdown(),
            StepLogger(),
        )
        given = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [callback for callback in defaults if type(callback) not in given]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Translate old names in checkpoints of earlier versions, and keep the recipe's name of a
        resumed run.

        Raises:
            ValueError: If a run is resumed with another kind of optimizer.
        """
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            check_kind(checkpoint.get(TASK_KEY), self.optimizer_config)
        if self.job is not None and self.job.recipe is None:
            recipe = (checkpoint.get(JOB_KEY) or {}).get("recipe")
            self.job = dataclasses.replace(self.job, recipe=recipe)
        checkpoint["state_dict"] = weights_with_new_names(checkpoint["state_dict"])
        states = checkpoint.get("callbacks", {})
        checkpoint["callbacks"] = {STATES.get(name, name): state for name, state in states.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the descriptions of the task, of the model and of the model's purpose."""
        checkpoint[TASK_KEY] = describe_task(self)
        if (scale := scale_of(self.model)) is not None:
            checkpoint[SCALE_KEY] = scale
        # Determined in `setup`, because sharding changes the class of the model.
        if self.description is not None:
            checkpoint[DESCRIPTION_KEY] = self.description
        if self.job is not None:
            checkpoint[JOB_KEY] = self.job.plain()

    def _new_metrics(self) -> nn.ModuleDict:
        # As submodules, Lightning moves the metrics to the device. Checkpoints do not contain them.
        return nn.ModuleDict(
            {stage: nn.ModuleDict(self.make_metrics()) for stage in ("val", "test")}
        )

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Restore a task from a checkpoint, with its model, weights and settings. As with
        Lightning, it is in training mode: call `eval()` before using the model directly.

        `Task.load_from_checkpoint` returns a task of the class that was trained; a subclass accepts
        only checkpoints of its own class. Only tensors and plain values are read.

        Args:
            checkpoint_path: Checkpoint, checkpoint folder, or run directory (its newest complete
                checkpoint is used).
            map_location: Device of the task; the CPU by default.
            hparams_file: Unused, because the checkpoint contains the settings. Must be `None`.
            strict: Whether to raise an error, and not only warn, if the weights of a subclass
                outside its model do not match the checkpoint. The weights of the model must always
                match.
            weights_only: Must not be `False`: code in a checkpoint is never run.
            kwargs: Arguments of the task that override those in the checkpoint. Arguments that are
                neither configs nor plain values (`augment`, a model of another library) are not
                stored in checkpoints and must be passed here.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the checkpoint does not fit; the message names the file and the problem.
        """
        if hparams_file is not None:
            raise ValueError("hparams_file is not supported: pass settings as keyword arguments")
        if weights_only is False:
            raise ValueError(
                "weights_only=False would run code from the file: omit it, checkpoints contain "
                "only tensors and plain values"
            )
        task = restore_task(cls, checkpoint_path, strict=strict is not False, given=kwargs)
        return task if map_location is None else task.to(map_location)

    def _evaluate(self, stage: str, counting: Any, batch: Any) -> None:
        if counting is not None:
            self.update_metrics(counting, dict(self.metrics[stage].items()))  # type: ignore[operator]
            return
        # Other processes wait for this forward pass, but its result is not counted.
        unused = {name: metric.to(self.device) for name, metric in self.make_metrics().items()}
        self.update_metrics(batch, unused)

    def _log_metrics(self, stage: str) -> None:
        for name, metric in self.metrics[stage].items():  # type: ignore[operator]
            if name in self.unmeasured:
                continue
            found = metric.compute()
            metric.reset()
            for key, value in (found if isinstance(found, dict) else {name: found}).items():
                if value.ndim:
                    self.details[key] = value.cpu()
                else:
                    self.log(f"{stage}/{key}", value, prog_bar=True, sync_dist=True)


def mean_over_processes(task: LightningModule, value: Tensor) -> Tensor:
    """Return the mean of `value` over all processes."""
    return task.trainer.strategy.reduce(value.clone(), reduce_op="mean")
