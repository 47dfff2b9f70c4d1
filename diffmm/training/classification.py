"""Classification of images and sounds, with one label a sample or several."""

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
    """Cross-entropy over classes, or for `multi_label` a binary one for each class.

    Logs, besides what every task logs, `val/loss` (without smoothing and mixing) and
    `val/accuracy`, with more than five classes also `val/accuracy_top5`; for `multi_label`,
    `val/mean_average_precision`, a mean over the classes that have a positive sample.

    Args:
        model: an image or audio model with `num_classes`, of this library or of timm.
        optimizer, schedule, finetune, compile, activation_checkpointing: as in `Task`.
        multi_label: labels are `[B, num_classes]` zeros and ones in place of `[B]` classes.
        label_smoothing: share of a target that is spread evenly over all classes (Szegedy et al.
            2016), or for `multi_label` over present and absent; in [0, 1).
        mixing: mixup and cutmix of training batches; none by default.
        augment: for the spectrograms of an audio model in training, such as
            `torchaudio.transforms.SpecAugment`; none by default.
        seed: of the mixing.

    Raises:
        ValueError: for a model without classes, or a spectrogram augmentation for a model that has
            no place for it.
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
            raise ValueError(f"augment is for audio models, and got {type(model).__name__}")
        self.multi_label = multi_label
        super().__init__(
            model,
            optimizer,
            schedule,
            finetune=finetune,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
        )
        if augment is not None:
            model.augment = augment
        self.label_smoothing = label_smoothing
        self.mixing = mixing
        self.seed = seed

    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The loss of each sample, `[B]`, for labels or for `[B, num_classes]` soft targets."""
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
            # Output `i` is the data's class `i`; what is beyond those is trained for none.
            numbers = map(str, range(len(job.class_names), self.num_classes))
            names = (*job.class_names, *numbers)[: self.num_classes]
            job = replace(job, class_names=names)
        return replace(job, multi_label=self.multi_label)

    def measure_classes(self) -> None:
        """Measure each class by itself, too, in evaluations from now on: their `details` then have
        `confusion_matrix`, `[true, predicted]` counts, or for `multi_label` `average_precision`
        (see `diffmm.training.metrics.AveragePrecision`)."""
        self.measures_classes = True
        self.metrics = self._new_metrics()

    def make_metrics(self) -> dict[str, Metric]:
        # Labels have been checked already, and on a GPU torchmetrics' own check would wait.
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
        """Probabilities `[B, num_classes]`, which add up to 1 unless `multi_label`."""
        logits = self.model(*inputs_of(self.model, batch)).float()
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(dim=1)
        return with_index(batch, probabilities=probabilities)

    def check_batch(self, batch: ImageBatch | AudioBatch) -> None:
        if "labels" not in batch:
            return  # of a prediction
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
            raise ValueError(f"labels must be int64 classes, got {labels.dtype}")
        check_range("label", labels, self.num_classes, of="classes", index=batch.get("index"))

    def _mixed(
        self, batch: ImageBatch | AudioBatch, batch_idx: int
    ) -> tuple[ImageBatch | AudioBatch, Tensor]:
        """A batch of mixtures, and their soft targets."""
        assert self.mixing is not None
        name = input_fields(self.model, batch)[0]
        key = (self.seed, self.current_epoch, batch_idx, data_share(self.trainer)[0])
        mixed: dict[str, Any] = dict(batch)
        mixed[name], weights = mix(mixed[name], self.mixing, key=key)
        if "num_samples" in batch:
            # A mixture is as long as the longer of its two.
            mixed["num_samples"] = torch.maximum(batch["num_samples"], batch["num_samples"].flip(0))
        labels = batch["labels"]
        targets = labels if self.multi_label else one_hot(labels, self.num_classes)
        return cast(ImageBatch | AudioBatch, mixed), weights.float() @ targets.float()
