"""Trained models with their task: prediction and text generation."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffmm.checks import article, check_count
from diffmm.hub.devices import find_device
from diffmm.hub.features import features_of
from diffmm.hub.metrics import metrics_at
from diffmm.hub.predictions import OnError
from diffmm.hub.predictors import predictor_of
from diffmm.hub.readers import check_inputs, make_reader
from diffmm.hub.writing import tokenizer_of, written
from diffmm.hub.zero_shot import (
    TEMPLATES,
    embed_classes,
    embed_media,
    embed_texts,
    towers_of,
)
from diffmm.models.contrastive import ContrastiveModel, ZeroShotClassifier
from diffmm.models.folders import write_folder
from diffmm.models.job import Job
from diffmm.models.pretrained import COMMIT_MESSAGE
from diffmm.models.text import TextModel
from diffmm.models.weights import save_model
from diffmm.tokenizers import Tokenizer

if TYPE_CHECKING:
    from diffmm.analysis.attention_maps import LayerMaps
    from diffmm.analysis.word_maps import Written


class TrainedModel:
    """A model with the preprocessing of its inputs and the meaning of its outputs.

    Args:
        model: A model of `diffmm.models`; it is set to evaluation mode.
        job: The task of the model.
        origin: The name of the model in messages, usually its file.

    Attributes:
        model: The network, an `nn.Module`.
        job: A `diffmm.models.job.Job`: class names, reader and recipe.

    Raises:
        ValueError: If the number of class names is not that of the model's classes.

    >>> trained = diffmm.load("runs/image/digits_tiny/first")
    >>> trained
    TrainedModel(ImageModel, recipe='image/digits_tiny', 10 classes)
    >>> prediction = trained.predict("seven.png", top_k=2)
    >>> prediction.labels[0], prediction.score > 0.5, len(prediction.labels)
    ('7', True, 2)
    >>> trained.save("exported").name
    'model.safetensors'
    >>> diffmm.load("exported").class_names[:3]
    ('0', '1', '2')
    """

    def __init__(self, model: nn.Module, job: Job, *, origin: str = "the model") -> None:
        job.check_fit(model)
        self.model = model.eval()
        self.job = job
        self.origin = origin
        model.job = job  # type: ignore[assignment]  # so it is saved with the weights

    def __repr__(self) -> str:
        about = [type(self.model).__name__]
        if self.job.recipe is not None:
            about.append(f"recipe={self.job.recipe!r}")
        if self.job.class_names is not None:
            about.append(f"{len(self.job.class_names)} classes")
        return f"TrainedModel({', '.join(about)})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the outputs; their indices if the names are unknown."""
        if self.job.class_names is not None:
            return self.job.class_names
        return tuple(map(str, range(getattr(self.model, "num_classes", 0))))

    @cached_property
    def reader(self) -> Any:
        """The reader of the model's inputs from files or memory.

        Raises:
            ValueError: If the file names no reader, or an invalid one.
        """
        if self.job.reader is None:
            raise ValueError(
                f"{self.origin} does not say how its inputs are prepared: give the recipe that "
                f"trained it (diffmm predict --config RECIPE), or a reader and class_names "
                f"(diffmm.load)"
            )
        reader = make_reader(self.job, self.origin)
        check_inputs(reader, self.model, self.origin)
        return reader

    def to(self, device: str | torch.device) -> "TrainedModel":
        """Move the model to another device."""
        self.model.to(find_device(device))
        return self

    def save(self, path: str | Path) -> Path:
        """Save weights, description and job as safetensors, to be read by `load`.

        Args:
            path: A file ending in `.safetensors`, or a folder, in which `model.safetensors` is
                written.

        Returns:
            The path of the file.

        Raises:
            ValueError: If the path ends like a file of another format, such as `.pt`.
        """
        return save_model(self.model, path)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        metrics: Mapping[str, float] | None = None,
        max_shard_size: int | str | None = None,
    ) -> Path:
        """Write a folder for the Hugging Face hub: weights, settings, tokenizer or preprocessing,
        and a model card.

        Args:
            folder: The folder; see `diffmm.models.pretrained.Pretrained.save_pretrained`.
            metrics: Values for the model card by the names of metrics; by default those of the run
                that the model is from, if it is from one.
            max_shard_size: As in `diffmm.models.pretrained.Pretrained.save_pretrained`.

        Raises:
            ValueError: As `diffmm.models.pretrained.Pretrained.save_pretrained`, or if the metrics
                of the run cannot be read; the message names the file.
        """
        return write_folder(
            self.model, folder, metrics=self._metrics(metrics), max_shard_size=max_shard_size
        )

    def push_to_hub(
        self,
        name: str,
        *,
        metrics: Mapping[str, float] | None = None,
        max_shard_size: int | str | None = None,
        private: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = COMMIT_MESSAGE,
    ) -> str:
        """Upload the folder of `save_pretrained` to the Hugging Face hub, and return its address.

        Args:
            name: Name of the repository, `user/name`.
            metrics: As in `save_pretrained`.
            max_shard_size: As in `save_pretrained`.
            private: As in `diffmm.models.pretrained.Pretrained.push_to_hub`.
            token: As there.
            revision: As there.
            commit_message: As there.

        Raises:
            ValueError: As `save_pretrained`, or if the hub cannot be reached or refuses the upload;
                the message says why.
        """
        model: Any = self.model
        return model.push_to_hub(
            name,
            metrics=self._metrics(metrics),
            max_shard_size=max_shard_size,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )

    def _metrics(self, given: Mapping[str, float] | None) -> Mapping[str, float]:
        """The metrics for the model card."""
        return metrics_at(self.origin) if given is None else given

    def predict(self, inputs: Any, *, top_k: int = 5, batch_size: int = 32) -> Any:
        """Predict the most likely classes of an input, describe it, or generate text after a
        prompt.

        Args:
            inputs: The path of a file; an image as a Pillow image or an array; a pair `(waveform,
                sample_rate_hz)`; or a prompt. Also a list of these, or a folder of files.
            top_k: Number of classes per prediction, at most the number of classes.
            batch_size: Number of inputs per forward pass.

        Returns:
            A `Prediction` with `labels` and `scores`, or a list of them for a list or a folder; of
            a captioning or CTC model, a `Caption` with the `text` instead. For a text decoder, the
            generated text, with the defaults of `generate`.

        Raises:
            ValueError: If the model has no classes, the file does not say how its inputs are
                prepared, or an input cannot be read; the message names it.
        """
        if isinstance(self.model, TextModel):
            if isinstance(inputs, list):
                return [self.generate(prompt) for prompt in inputs]
            return self.generate(inputs)
        is_folder = isinstance(inputs, str | os.PathLike) and Path(inputs).is_dir()
        items = inputs if isinstance(inputs, list) else [inputs]
        predictions = list(self.stream(items, top_k=top_k, batch_size=batch_size))
        return predictions if isinstance(inputs, list) or is_folder else predictions[0]

    @torch.inference_mode()
    def features(self, inputs: Any, *, batch_size: int = 32) -> Tensor:
        """Compute the features of images or sounds that the model's head reads, for a classifier,
        a search or a cluster analysis.

        Args:
            inputs: As in `predict`, also a list or a folder.
            batch_size: Number of inputs per forward pass.

        Returns:
            Pooled features, `[N, dim]` float32 on the CPU; of no inputs, `[0, dim]`.

        Raises:
            ValueError: If the model is not an image or audio encoder, or an input cannot be read;
                the message names it.

        >>> trained = diffmm.load("runs/image/digits_tiny/first")
        >>> trained.features(["seven.png", "seven.png"]).shape
        torch.Size([2, 64])
        """
        check_count("batch_size", batch_size)
        return features_of(self.model, self.reader, inputs, batch_size, self.origin)

    def similarity(
        self, inputs: Any, texts: str | Sequence[str], *, batch_size: int = 32
    ) -> Tensor:
        """Compute the similarity of images or sounds with texts, by a contrastive model.

        Args:
            inputs: As in `predict`, also a list or a folder.
            texts: A text, or a list of texts.
            batch_size: Number of inputs per forward pass.

        Returns:
            The cosine of the angle between the embeddings, in [-1, 1]: `[I, T]` float32 on the CPU,
            for `I` inputs and `T` texts.

        Raises:
            ValueError: If the model is not a contrastive one, an input cannot be read, or a text is
                too long; the message names it.
        """
        check_count("batch_size", batch_size)
        model, texts = self._contrastive, [texts] if isinstance(texts, str) else list(texts)
        items = inputs if isinstance(inputs, list) else [inputs]
        media = embed_media(model, self.reader, items, batch_size)
        return media @ embed_texts(model, self.reader, texts, batch_size).T

    def zero_shot(
        self,
        inputs: Any,
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = TEMPLATES,
        top_k: int = 5,
        batch_size: int = 32,
    ) -> Any:
        """Classify images or sounds by the names of classes, with a contrastive model that was not
        trained on them.

        The embedding of a class is the normalized mean of those of its templates. Scores are the
        softmax over the classes of the scaled similarities (CLIP) or, if the model has a bias
        (SigLIP), their sigmoids, which do not sum to 1.

        Args:
            inputs: As in `predict`.
            class_names: Names of the classes.
            templates: Texts with `{}` in place of a class's name.
            top_k: As in `predict`.
            batch_size: As in `predict`.

        Returns:
            As in `predict`.

        Raises:
            ValueError: If the model is not a contrastive one, names or templates are invalid, or an
                input cannot be read; the message names it.
        """
        classifier = self.zero_shot_classifier(class_names, templates=templates)
        return classifier.predict(inputs, top_k=top_k, batch_size=batch_size)

    def zero_shot_classifier(
        self, class_names: Sequence[str], *, templates: Sequence[str] = TEMPLATES
    ) -> "TrainedModel":
        """The classifier of `zero_shot`, which embeds the classes once. Arguments and errors as
        there."""
        model = self._contrastive
        classes = embed_classes(model, self.reader, class_names, templates)
        towers = towers_of(model, self.reader)
        tower = towers[0] if len(towers) == 1 else None
        classifier = ZeroShotClassifier(model, classes, tower)
        job = replace(
            self.job, class_names=tuple(class_names), multi_label=model.logit_bias is not None
        )
        return TrainedModel(classifier.to(model.logit_scale.device), job, origin=self.origin)

    @property
    def _contrastive(self) -> ContrastiveModel:
        """The model, if it is a contrastive one."""
        if not isinstance(self.model, ContrastiveModel):
            raise ValueError(
                f"{self.origin} contains {article(type(self.model).__name__)}: only contrastive "
                f"models compare images or sounds with texts"
            )
        return self.model

    def stream(
        self,
        inputs: Iterable[Any],
        *,
        top_k: int = 5,
        batch_size: int = 32,
        num_workers: int = 0,
        on_error: OnError | None = None,
    ) -> Iterator[Any]:
        """Yield predictions for any number of inputs, with one batch in memory at a time.

        Args:
            inputs: As in `predict`; folders are listed lazily.
            top_k: As in `predict`.
            batch_size: As in `predict`.
            num_workers: Number of worker processes that read files. They need a list of inputs,
                because each of them iterates over it.
            on_error: Called with each input that cannot be read and the error; the prediction
                then continues. By default the first error is raised.

        Raises:
            ValueError: As `predict`.
        """
        check_count("top_k", top_k)
        check_count("batch_size", batch_size)
        if not isinstance(num_workers, int) or num_workers < 0:
            raise ValueError(f"num_workers must be an integer of at least 0, got {num_workers}")
        if num_workers and not isinstance(inputs, Sequence):
            raise ValueError(f"num_workers={num_workers} needs a list of inputs, not an iterator")
        predictor = predictor_of(self, top_k)
        return predictor.stream(
            inputs, batch_size=batch_size, num_workers=num_workers, on_error=on_error
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a text model or a captioning model.

        Raises:
            ValueError: If the model is another one, or the file names no tokenizer.
        """
        return tokenizer_of(self)

    def generate(self, prompt: Any, text: str = "", **settings: Any) -> str:
        """Generate text after a prompt, or about an image or sound. Arguments and errors as in
        `write`."""
        return "".join(self.write(prompt, text, **settings))

    def chat(self, messages: str | Sequence[Mapping[str, str]], **settings: Any) -> str:
        """Answer a question or a conversation, with a model that was trained on conversations.

        Args:
            messages: The question, or messages such as `{"role": "user", "content": "..."}`, of
                which the last one is to be answered.
            settings: As in `write`.

        Raises:
            ValueError: As `write`; or if the model was not trained on conversations, or the
                messages do not fit its template.
        """
        return "".join(self.write(messages, chat=True, **settings))

    def write(
        self,
        prompt: Any,
        text: str = "",
        *,
        chat: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        prompt_lookup_num_tokens: int | None = None,
    ) -> Iterator[str]:
        """Generate text after a prompt and yield it piece by piece.

        Args:
            prompt: The text to continue, or the `pathlib.Path` of a text file; or the messages of a
                conversation. For a captioning model, an image or a sound as in `predict`, or a list
                of them that are described by one text.
            text: For a captioning model, the beginning of the text, which is not repeated.
            chat: Whether `prompt` is a question to answer instead of a text to continue.
            max_new_tokens: Maximum number of generated tokens; by default 200, of a captioning
                model that of the texts it was trained on, or less if the model's `max_length`
                leaves less.
            temperature: As in `diffmm.models.generation.stream`; by default 0.8, and 0 for a
                captioning model.
            top_k: As in `diffmm.models.generation.stream`.
            top_p: As in `diffmm.models.generation.stream`.
            seed: Seed of the random numbers; the same seed generates the same text.
            prompt_lookup_num_tokens: As in `diffmm.models.generation.stream`.

        Raises:
            ValueError: If the model does not generate text, or was not trained on conversations but
                is given one; the prompt is empty or not a conversation; or a number is out of
                range.
        """
        return written(
            self,
            prompt,
            text,
            chat=chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        )

    def attention_maps(
        self, item: Any, layers: Sequence[int] | None = None, *, text: str | None = None
    ) -> "list[LayerMaps]":
        """Compute the attention maps for one input (see `diffmm.analysis.attention_maps`); of a
        contrastive model, those of the tower of the images or sounds; of a captioning model, those
        of its encoder and then those of its decoder, over the media and a text.

        Args:
            item: A single input, as in `predict`.
            layers: Indices of the attention layers; all by default.
            text: For a captioning model, the text; by default the one that it generates.

        Raises:
            ValueError: If a text is given to another model, or an index is out of range.
        """
        from diffmm.hub.maps import input_maps

        return input_maps(self, item, layers, text)

    def word_maps(
        self,
        item: Any,
        text: str | None = None,
        *,
        words: Sequence[str] | None = None,
        max_words: int | None = None,
        layers: Sequence[int] | None = None,
    ) -> "Written":
        """Compute the attention maps of the words that a captioning or CTC model writes about an
        image or sound (see `diffmm.analysis.word_maps`).

        Args:
            item: A single input, as in `predict`.
            text: For a captioning model, another text than the one that it generates.
            words: Words of the text; by default the first ones.
            max_words: Maximum number of words if they are not given; by default
                `diffmm.analysis.word_maps.MAX_WORDS`.
            layers: Indices of the decoder's (of a CTC model, the encoder's) layers; all by default.

        Raises:
            ValueError: If the model is another one, or as `diffmm.analysis.word_maps.word_maps`.
        """
        from diffmm.hub.maps import maps_of_words

        return maps_of_words(self, item, text, words=words, max_words=max_words, layers=layers)
