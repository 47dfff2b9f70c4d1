"""Contrastive training of images and texts, of sounds and texts, or of both together."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torchmetrics import Metric

from diffmm.batch import MEDIA, InputShapes, media_of
from diffmm.checks import DataError, check_choice
from diffmm.models.contrastive import ContrastiveModel, Embeddings
from diffmm.models.job import Job
from diffmm.models.weights import load_weights
from diffmm.training.accumulation import LossSum
from diffmm.training.batches import check_range, with_index
from diffmm.training.contrastive_losses import LOSSES, Pairs, gathered, text_ids
from diffmm.training.finetuning import FineTuneConfig, freeze
from diffmm.training.lightning_internals import needs_all_gradients
from diffmm.training.optimizer import OptimizerConfig
from diffmm.training.retrieval import Retrieval
from diffmm.training.schedule import ScheduleConfig
from diffmm.training.sharding import DATA_PARALLEL, is_sharded
from diffmm.training.task import Task


class Contrastive(Task):
    """Contrastive training: embeddings of a medium and its text become similar, and those of
    different samples dissimilar.

    The negatives of a sample are those of the whole batch, of all processes together: several
    processes train exactly as one with their joint batch. Samples of the batch with the same medium
    (`media_index`) or the same text are not negatives of each other. The samples of an earlier
    micro-batch cannot be negatives, so that gradients cannot be accumulated. All processes of a
    step must have equally many samples, and a step at least two.

    With an image and an audio tower, a batch has images and sounds, on all processes equally many
    of each. All are compared with all texts, so that they share one space: the text of a sound is a
    negative of an image. A batch may also have media of one modality, and those of several
    processes may differ. As the other tower has no gradients then, DDP must look for unused
    parameters (strategy `ddp_find_unused_parameters_true`). Sharded models need no setting: a
    process runs a tower that only others have media for on a blank image or sound, and leaves out
    its embedding.

    In addition to the metrics of every task, it logs `val/loss` and `val/media_to_text_recall_1`,
    `..._5`, `..._10`, `val/text_to_media_recall_1`, `..._5` and `..._10`: recall over the whole
    validation set (see `diffmm.training.retrieval.Retrieval`). With both towers, there are also
    those of each modality alone: `val/image_to_text_recall_1`, `val/audio_to_text_recall_1`,
    `val/text_to_image_recall_1`, `val/image_loss` and so on.

    Args:
        model: Contrastive model to train.
        optimizer, schedule, finetune, compile, activation_checkpointing, fp8: See `Task`;
            `finetune` is for the weights of a whole contrastive model.
        loss: `"clip"`, cross-entropy over the batch, or `"siglip"`, a sigmoid per pair, which needs
            the model's `init_bias` (see `diffmm.training.contrastive_losses`).
        image: Weights for the image tower to start from, such as those of a classifier (with
            `new_head`), another contrastive model, or a converted tower of CLIP
            (`new_head: false`), and its frozen part: `freeze: all_but_head` trains only the
            projection (LiT, Zhai et al. 2022). None by default.
        audio: The same for the audio tower.
        text: The same for the text tower.

    Raises:
        ValueError: If the loss and the model's bias do not fit, the model has no such tower, or
            shared blocks would be frozen or loaded twice.
    """

    model: ContrastiveModel
    TARGETS: ClassVar[tuple[str, ...]] = ()
    why_no_accumulation: ClassVar[str] = (
        "is not supported by contrastive training, which cannot compare samples of different "
        "micro-batches: use a larger batch_size (with activation_checkpointing, if memory is "
        "short) or more devices"
    )

    def __init__(
        self,
        model: ContrastiveModel,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        loss: Literal["clip", "siglip"] = "clip",
        image: FineTuneConfig | None = None,
        audio: FineTuneConfig | None = None,
        text: FineTuneConfig | None = None,
        finetune: FineTuneConfig | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        fp8: bool = False,
    ) -> None:
        check_choice("loss", loss, LOSSES)
        if not isinstance(model, ContrastiveModel):
            raise ValueError(
                f"contrastive training needs a ContrastiveModel, got {type(model).__name__}"
            )
        if loss == "siglip" and model.logit_bias is None:
            raise ValueError(
                "loss='siglip' needs a bias: set the model's init_bias, to -10 as in SigLIP"
            )
        if loss == "clip" and model.logit_bias is not None:
            raise ValueError(
                f"loss='clip' does not depend on a bias, but the model has "
                f"init_bias={model.config.init_bias}: leave it out"
            )
        self.loss = loss
        self._host_group: Any = None
        super().__init__(
            model,
            optimizer,
            schedule,
            finetune=finetune,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            fp8=fp8,
        )
        self.image, self.audio, self.text = image, audio, text
        for name, config in self.starts.items():
            self._check_start(name, config)
            self.frozen += freeze(model.towers[name], config)

    @property
    def starts(self) -> dict[str, FineTuneConfig]:
        """The given settings of towers, by their names."""
        starts = {"image": self.image, "audio": self.audio, "text": self.text}
        return {name: config for name, config in starts.items() if config is not None}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        count = self.trainer.accumulate_grad_batches
        if stage == "fit" and count > 1:
            raise ValueError(f"accumulate_grad_batches={count} {self.why_no_accumulation}")

    def load_first_weights(self) -> None:
        super().load_first_weights()
        for name, config in self.starts.items():
            if config.weights is not None:
                load_weights(self.model.towers[name], config.weights, skip_head=config.new_head)

    def make_job(self, data: Any) -> Job:
        # The data may have classes, but the model predicts none.
        return replace(super().make_job(data), class_names=None)

    def layouts(self) -> list[Sequence[str]]:
        fields = [name for name in self._inputs() if name not in ("tokens", "num_tokens")]
        kinds = [[name] for name in fields if name == "images"]
        kinds += [["waveforms", "num_samples"]] if "waveforms" in fields else []
        return [(*kind, "tokens", "num_tokens") for kind in kinds]

    def check_batch(self, batch: Any) -> None:
        kinds = [name for name in MEDIA if name in self._inputs()]
        found = [name for name in MEDIA if name in batch]
        if not found or not set(found) <= set(kinds) or "num_tokens" not in batch:
            raise ValueError(
                f"a batch for this model must have tokens, num_tokens and "
                f"{' or '.join(kinds)}, got {', '.join(batch)}"
            )
        sizes = {name: len(batch[name]) for name in (*found, "tokens")}
        if sum(sizes.values()) != 2 * sizes["tokens"]:
            raise ValueError(
                f"a batch must have a text for each image or sound, got {sizes['tokens']} texts of "
                f"{' and '.join(f'{sizes[name]} {name}' for name in found)}"
            )
        if "document_ids" in batch:
            raise ValueError("packed rows are for captioning: set the data's pairs_per_row to 1")
        tokens, num_tokens = batch["tokens"], batch["num_tokens"]
        config, index = self.model.config.text, batch.get("index")
        check_range("token", tokens, config.vocab_size, of="tokens", index=index)
        if config.pool not in ("eos", "argmax") or tokens.device.type != "cpu":
            return
        pooled = self.model.text.at(tokens)
        lacks = torch.zeros_like(pooled, dtype=torch.bool)
        if config.pool == "eos":
            lacks = ~(tokens == config.eos_id).any(dim=1)
        # The embedding of an earlier token would be that of a part of the text.
        wrong = lacks | (pooled != num_tokens - 1)
        if not wrong.any():
            return
        place = int(wrong.nonzero()[0])
        sample = place if index is None else index[place].item()
        listed = tokens[place, : num_tokens[place]].tolist()
        if lacks[place]:
            raise ValueError(
                f"the text of sample {sample} does not contain the model's eos_id={config.eos_id}: "
                f"its tokens are {listed}; set the eos_id of the tokenizer"
            )
        raise ValueError(
            f"the text of sample {sample} has {len(listed)} tokens, {listed}, but "
            f"pool={config.pool!r} takes number {int(pooled[place]) + 1}: pool='eos' needs texts "
            f"with one eos_id, at the end, and pool='argmax' those that end in their highest id"
        )

    def embeddings(self, batch: Any) -> Embeddings:
        """Return the model's embeddings of a batch."""
        # Blank media are of the modality that the batch lacks.
        given = {**batch, **self._blank_media(batch)}
        texts = batch["tokens"], batch["num_tokens"]
        if "waveforms" not in given:
            return self.model(*texts, given["images"])
        sounds = given["waveforms"], given.get("num_samples")
        found = self.model(*texts, *sounds, given.get("images"))
        first = 0 if "images" in batch else len(given.get("images", ()))
        return found._replace(media=found.media[first : first + len(batch["tokens"])])

    def _blank_media(self, batch: Any) -> dict[str, Tensor]:
        """An image or sound of zeros if this process has none but others have, and the model is
        sharded: all processes gather the weights of a tower together."""
        if not {"image", "audio"} <= set(self.model.towers) or not is_sharded(self.model):
            return {}
        if self._host_group is None:
            # Not that of the devices, which would have to finish their work first.
            self._host_group = torch.distributed.new_group(backend="gloo")
        given = torch.tensor([field in batch for field in MEDIA], dtype=torch.int32)
        torch.distributed.all_reduce(given, ReduceOp.MAX, group=self._host_group)
        blank: dict[str, Tensor] = {}
        for (field, name), is_given in zip(MEDIA.items(), given.tolist(), strict=True):
            if is_given and field not in batch:
                for key, (shape, dtype) in self.model.config.towers[name].input_shapes(1).items():
                    blank[key] = torch.zeros(shape, dtype=dtype, device=batch["tokens"].device)
        return blank

    def pairs(self, batch: Any, found: Embeddings) -> Pairs:
        """Return the pairs of a batch, given its embeddings."""
        ids = text_ids(batch["tokens"], batch["num_tokens"])
        media_ids = batch.get("media_index")
        if media_ids is not None and "waveforms" in batch and self.model.image is not None:
            # So that no sound has the number of an image.
            sounds = media_of(batch)["audio"]
            media_ids = media_ids.clone()
            media_ids[sounds] = ~media_ids[sounds]
        return Pairs(found.media, found.texts, media_ids, ids)

    def loss_sum(self, batch: Any, batch_idx: int) -> LossSum:
        self._check_gradients(batch)
        found = self.embeddings(batch)
        own = self.pairs(batch, found)
        every, first = gathered(own, self._group())
        if len(every.media) == 1:
            raise DataError(
                "a batch of one sample has no negatives, so that nothing can be learned: use more "
                "data or a larger --data.batch_size"
            )
        total = LOSSES[self.loss](own, every, first, found.scale, found.bias)
        return LossSum(total, total.new_full((), len(found.media), dtype=torch.float32))

    def after_step(self) -> None:
        self.model.limit_scale()

    def make_metrics(self) -> dict[str, Metric]:
        media = [name for name in self.model.towers if name != "text"]
        return {"retrieval": Retrieval(self.model.config.embed_dim, self.loss, media)}

    def update_metrics(self, batch: Any, metrics: dict[str, Metric]) -> None:
        found = self.embeddings(batch)
        pairs, index = self.pairs(batch, found), batch.get("index")
        if index is None:
            raise ValueError("batches to evaluate need the index of their samples")
        if pairs.media_ids is None:
            pairs = pairs._replace(media_ids=index)
        for name, place in media_of(batch).items():
            own, places = pairs.at(place), index[place]
            metrics["retrieval"].update(own, places, found.scale, found.bias, name)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return the embeddings of the media and of the texts, both `[B, embed_dim]`."""
        found = self.embeddings(batch)
        return with_index(batch, media=found.media, texts=found.texts)

    def target_shapes(self, inputs: InputShapes) -> InputShapes:
        return {"media_index": inputs["num_tokens"]}

    def _check_gradients(self, batch: Any) -> None:
        """Check that a step gives gradients to all towers that train, if DDP expects them.

        Raises:
            ValueError: If it does not.
        """
        idle = [
            name
            for name, tower in self.model.towers.items()
            if name not in ("text", *media_of(batch)) and any(map(_trains, tower.parameters()))
        ]
        if idle and self.training and needs_all_gradients(self.trainer):
            raise ValueError(
                f"the {idle[0]} tower has no gradients, as the batch has only "
                f"{' and '.join(name for name in MEDIA if name in batch)}, but DDP expects them: "
                f"train on both together (datamodules.ImageAudioTextData), or set "
                f"--trainer.strategy ddp_find_unused_parameters_true"
            )

    def _group(self) -> Any:
        """The processes whose batches form one batch; None for a single process."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return None
        if self.device_mesh is not None:
            # The processes of a tensor-parallel group have the same samples.
            return self.device_mesh[DATA_PARALLEL].get_group()
        return distributed.group.WORLD if self.trainer.world_size > 1 else None

    def _check_start(self, name: str, config: FineTuneConfig) -> None:
        """Check the settings of a tower.

        Raises:
            ValueError: If the model has no such tower, or they do not fit shared blocks.
        """
        tower: nn.Module | None = self.model.towers.get(name)
        if tower is None:
            raise ValueError(
                f"{name} is for a model with that tower, but its towers are "
                f"{' and '.join(self.model.towers)}"
            )
        if config.lora is not None:
            raise ValueError(f"{name}.lora is not supported: give finetune.lora for all towers")
        shared = self.model.config.shared_blocks
        depth = self.model.config.towers[name].backbone.depth
        if shared and (isinstance(config.freeze, str) or config.freeze > depth - shared):
            raise ValueError(
                f"{name}.freeze={config.freeze!r} would freeze blocks that all towers share: "
                f"freeze at most {depth - shared}"
            )
        loaded = [each for each, config in self.starts.items() if config.weights is not None]
        if shared and len(loaded) > 1:
            raise ValueError(
                f"{' and '.join(loaded)} share {shared} blocks, whose weights cannot be those of "
                f"several files: give weights for one of them"
            )


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad
