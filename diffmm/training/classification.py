"""Classification of images and audio, with one or several labels per sample."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from diffmm.batch import AudioBatch, ImageBatch, InputShapes, input_fields, inputs_of, size_of
from diffmm.models.job import Job
from diffmm.training.accumulation import LossSum
from diffmm.training.batches import check_range, with_index
from diffmm.training.finetuning import FineTuneConfig
from diffmm.training.metrics import AveragePrecision, MeanAveragePrecision, RatioOfSums
from diffmm.training.mixing import MixingConfig, mix
from diffmm.training.optimizer import OptimizerConfig
from diffmm.training.parallel import data_share
from diffmm.training.schedule import ScheduleConfig
from diffmm.training.task import Task

TOP_K = 5


class Classification(Task):
    """Classification with cross-entropy or, if `multi_label`, binary cross-entropy per class.

    In addition to the metrics of every task, it logs `val/loss` (without label smoothing and
    mixing), `val/accuracy` and, with more than five classes, `val/accuracy_top5`. If `multi_label`,
    it logs `val/mean_average_precision` instead of the accuracies: the mean over all classes that
    have a positive sample.

    Args:
        model: Image or audio model with `num_classes`, of this library or of timm.
        optimizer, schedule, finetune, compile, activation_checkpointing, fp8: See `Task`.
        multi_label: Whether labels are `[B, num_classes]` zeros and ones instead of `[B]` class
            indices.
        label_smoothing: Fraction of a target that is spread evenly over all classes (Szegedy et al.
            2016) or, if `multi_label`, over present and absent; in [0, 1).
        mixing: Mixup and CutMix of training batches; none by default.
        augment: Augmentation of an audio model's spectrograms during training, such as
            `torchaudio.transforms.SpecAugment`; none by default.
        seed: Seed of the mixing.

    Raises:
        ValueError: If the model has no classes, `label_smoothing` is out of range, or `augment` is
            given for a model that does not support it.
    """

    measures_classes = False
    TARGETS: ClassVar[tuple[str, ...]] = ("labels",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        mixing: MixingConfig | None = None,
        augment: nn.Module | None = None,
        seed: int = 0,
        finetune: FineTuneConfig | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        fp8: bool = False,
    ) -> None:
        self.num_classes: int = getattr(model, "num_classes", 0)
        if self.num_classes < 1:
            raise ValueError(
                f"classification needs classes, and {type(model).__name__} has num_classes="
                f"{self.num_classes}: set it in the model's config"
            )
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if augment is not None and not hasattr(model, "augment"):
            raise ValueError(f"augment requires an audio model, got {type(model).__name__}")
        self.multi_label = multi_label
        super().__init__(
            model,
            optimizer,
            schedule,
            finetune=finetune,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            fp8=fp8,
        )
        if augment is not None:
            model.augment = augment
        self.label_smoothing = label_smoothing
        self.mixing = mixing
        self.seed = seed

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of each sample, `[B]`, for labels or `[B, num_classes]` soft targets."""
        logits = logits.float()
        if not self.multi_label:
            return cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
        smooth = targets.float() * (1.0 - label_smoothing) + 0.5 * label_smoothing
        return binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(dim=1)

    def loss_sum(self, batch: ImageBatch | AudioBatch, batch_idx: int) -> LossSum:
        targets = batch["labels"]
        if self.mixing is not None:
            batch, targets = self._mixed(batch, batch_idx)
        logits = self.model(*inputs_of(self.model, batch))
        losses = self.loss(logits, targets, self.label_smoothing)
        return LossSum(losses.sum(), losses.new_full((), len(losses)))

    def target_shapes(self, inputs: InputShapes) -> InputShapes:
        batch_size = next(iter(inputs.values()))[0][0]
        if self.multi_label:
            return {"labels": ((batch_size, self.num_classes), torch.float32)}
        return {"labels": ((batch_size,), torch.int64)}

    def make_job(self, data: Any) -> Job:
        job = super().make_job(data)
        if job.class_names is not None:
            # Output `i` is the data's class `i`. Outputs beyond the data's classes have no name.
            numbers = map(str, range(len(job.class_names), self.num_classes))
            names = (*job.class_names, *numbers)[: self.num_classes]
            job = replace(job, class_names=names)
        return replace(job, multi_label=self.multi_label)

    def measure_classes(self) -> None:
        """Also compute per-class metrics in all following evaluations. Their `details` then contain
        `confusion_matrix`, with `[true, predicted]` counts, or `average_precision` if
        `multi_label` (see `diffmm.training.metrics.AveragePrecision`)."""
        self.measures_classes = True
        self.metrics = self._new_metrics()

    def make_metrics(self) -> dict[str, Metric]:
        # Labels are already checked, and torchmetrics' own check would synchronize the GPU.
        metrics: dict[str, Metric] = {"loss": RatioOfSums()}
        if self.multi_label:
            metrics["mean_average_precision"] = MeanAveragePrecision(self.num_classes)
            if self.measures_classes:
                metrics["average_precision"] = AveragePrecision(self.num_classes)
            return metrics
        top_ks = {"accuracy": 1}
        if self.num_classes > TOP_K:
            top_ks[f"accuracy_top{TOP_K}"] = TOP_K
        for name, top_k in top_ks.items():
            metrics[name] = MulticlassAccuracy(
                self.num_classes, top_k=top_k, average="micro", validate_args=False
            )
        if self.measures_classes:
            metrics["confusion_matrix"] = MulticlassConfusionMatrix(
                self.num_classes, validate_args=False
            )
        return metrics

    def update_metrics(self, batch: ImageBatch | AudioBatch, metrics: dict[str, Metric]) -> None:
        logits, labels = self.model(*inputs_of(self.model, batch)).float(), batch["labels"]
        metrics["loss"].update(self.loss(logits, labels).sum(), len(labels))
        for name in metrics.keys() - {"loss"}:
            metrics[name].update(logits, labels.long())

    def predict_step(self, batch: ImageBatch | AudioBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return probabilities, `[B, num_classes]`, which sum to 1 unless `multi_label`."""
        logits = self.model(*inputs_of(self.model, batch)).float()
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(dim=1)
        return with_index(batch, probabilities=probabilities)

    def check_batch(self, batch: ImageBatch | AudioBatch) -> None:
        if "labels" not in batch:
            return  # batches to predict need no labels
        labels = batch["labels"]
        fields: Mapping[str, Any] = batch
        size = size_of([fields[name] for name in input_fields(self.model, batch)[:1]])
        wanted = (size, self.num_classes) if self.multi_label else (size,)
        if tuple(labels.shape) != wanted:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but with multi_label="
                f"{self.multi_label} and {self.num_classes} classes they must be {wanted}"
            )
        if self.multi_label:
            return
        if labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 class indices, got {labels.dtype}")
        check_range("label", labels, self.num_classes, of="classes", index=batch.get("index"))

    def _mixed(
        self, batch: ImageBatch | AudioBatch, batch_idx: int
    ) -> tuple[ImageBatch | AudioBatch, Tensor]:
        """Return the mixed batch and its soft targets."""
        assert self.mixing is not None
        name = input_fields(self.model, batch)[0]
        key = (self.seed, self.current_epoch, batch_idx, data_share(self.trainer)[0])
        mixed: dict[str, Any] = dict(batch)
        mixed[name], weights = mix(mixed[name], self.mixing, key=key)
        if "num_samples" in batch:
            # A mixture is as long as the longer of its two waveforms.
            mixed["num_samples"] = torch.maximum(batch["num_samples"], batch["num_samples"].flip(0))
        labels = batch["labels"]
        targets = labels if self.multi_label else one_hot(labels, self.num_classes)
        return cast(ImageBatch | AudioBatch, mixed), weights.float() @ targets.float()
