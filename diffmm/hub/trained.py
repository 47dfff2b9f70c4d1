"""A trained model with what it is for."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffmm.batch import inputs_of
from diffmm.checkpoint_folders import find_state
from diffmm.hub.predictions import OnError, Prediction, Predictor
from diffmm.hub.readers import check_inputs, make_reader
from diffmm.models.generation import stream
from diffmm.models.job import Job, text_reader
from diffmm.models.text import TextModel
from diffmm.models.weights import load_model, save_model

if TYPE_CHECKING:
    from diffmm.analysis.attention_maps import LayerMaps
    from diffmm.tokenizers import Tokenizer

MAX_NEW_TOKENS = 200


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    reader: Any = None,
    class_names: Sequence[str] | None = None,
    multi_label: bool | None = None,
    tokenizer: str | None = None,
) -> "TrainedModel":
    """A trained model with what it is for: `load(run).predict("cat.jpg")`.

    Args:
        path: a run, a checkpoint's folder, a Lightning checkpoint, or a `.safetensors` file or its
            folder as written by `TrainedModel.save`.
        device: where the model computes; `"auto"` is the accelerator where there is one.
        reader, class_names, multi_label: how inputs are prepared (such as a
            `datamodules.image.ImageReader`) and what outputs mean, in place of what the file says.
        tokenizer: a text model's, by name, in place of what the file says.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it cannot be read or does not describe its model, or the
            device that is not there.

    >>> trained = diffmm.load("runs/image/digits_tiny/first")
    >>> trained.predict("seven.png").label
    '7'
    """
    file = find_state(Path(path))
    model = load_model(file)
    job: Job = model.job or Job()  # type: ignore[assignment]
    if tokenizer is not None:
        if reader is not None:
            raise ValueError("give a reader or a tokenizer, which makes one, and not both")
        reader = text_reader(tokenizer)
    given: dict[str, Any] = {
        "reader": reader if reader is None or isinstance(reader, dict) else reader.describe(),
        "class_names": None if class_names is None else tuple(class_names),
        "multi_label": multi_label,
    }
    job = replace(job, **{name: value for name, value in given.items() if value is not None})
    return TrainedModel(model.to(find_device(device)), job, origin=str(file))


def find_device(name: str | torch.device) -> torch.device:
    """The device that is asked for; `"auto"` is the accelerator where there is one.

    Raises:
        ValueError: for one that is not there.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"there is no device {str(name)!r}: {told}") from error
    return torch.device(name)


class TrainedModel:
    """A model that knows how its inputs are prepared and what its outputs mean.

    Args:
        model: any of `diffmm.models`; it is put in evaluation mode.
        job: what it is for.
        origin: what it is called in messages, usually its file.

    Attributes:
        model: the network, an `nn.Module`.
        job: a `diffmm.models.job.Job`: the class names, the reader of its inputs, the recipe.

    Raises:
        ValueError: if the job names another number of classes than the model has.

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
        """The name of each output; its number, where no names are known."""
        if self.job.class_names is not None:
            return self.job.class_names
        return tuple(map(str, range(getattr(self.model, "num_classes", 0))))

    @cached_property
    def reader(self) -> Any:
        """What makes the model's inputs of files and of the like in memory.

        Raises:
            ValueError: if the file says nothing of that, or names what is no reader.
        """
        if self.job.reader is None:
            raise ValueError(
                f"{self.origin} does not say how its inputs are prepared: give the recipe that it "
                f"was trained by (diffmm predict --config RECIPE), or a reader and class_names "
                f"(diffmm.load)"
            )
        reader = make_reader(self.job, self.origin)
        check_inputs(reader, self.model, self.origin)
        return reader

    def to(self, device: str | torch.device) -> "TrainedModel":
        """Compute on another device from now on."""
        self.model.to(find_device(device))
        return self

    def save(self, path: str | Path) -> Path:
        """Write weights, description and job as safetensors (see `diffmm.models.save_model`)."""
        return save_model(self.model, path)

    def predict(self, inputs: Any, *, top_k: int = 5, batch_size: int = 32) -> Any:
        """The likeliest classes of an input; what a text decoder writes after a prompt.

        Args:
            inputs: the path of a file; an image, a Pillow one or an array; a waveform with its
                sample rate, `(waveform, sample_rate_hz)`; or a prompt. Of a list of these or a
                folder, all of them are predicted.
            top_k: classes per prediction, at most as many as there are.
            batch_size: inputs per forward pass.

        Returns:
            A `Prediction` with `labels` and `scores`, or a list of them for a list or a folder. Of
            a text decoder, the text that follows, as `generate` gives it with its defaults.

        Raises:
            ValueError: if the model has no classes, the file does not say how its inputs are
                prepared, or an input cannot be read, naming it.
        """
        is_many = isinstance(inputs, list) or (
            isinstance(inputs, str | os.PathLike)
            and not isinstance(self.model, TextModel)
            and Path(inputs).is_dir()
        )
        if isinstance(self.model, TextModel):
            return [self.generate(item) for item in inputs] if is_many else self.generate(inputs)
        items = inputs if isinstance(inputs, list) else [inputs]
        predictions = list(self.stream(items, top_k=top_k, batch_size=batch_size))
        return predictions if is_many else predictions[0]

    def stream(
        self,
        inputs: Iterable[Any],
        *,
        top_k: int = 5,
        batch_size: int = 32,
        num_workers: int = 0,
        on_error: OnError | None = None,
    ) -> Iterator[Prediction]:
        """Predictions of any number of inputs as they are made, with a batch in memory.

        Args:
            inputs: as in `predict`; folders are walked as the predictions are taken.
            top_k, batch_size: as in `predict`.
            num_workers: processes that read files beside this one, which then need a list of
                inputs: each of them goes through it.
            on_error: called with an input that cannot be read and what is wrong with it; then the
                rest goes on. By default the first one ends all.

        Raises:
            ValueError: as `predict`.
        """
        for name, value in (("top_k", top_k), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(num_workers, int) or num_workers < 0:
            raise ValueError(f"num_workers must be a whole number of at least 0, got {num_workers}")
        if num_workers and not isinstance(inputs, Sequence):
            raise ValueError(f"num_workers={num_workers} needs a list of inputs, to be shared out")
        if getattr(self.model, "num_classes", 0) < 1:
            hint = "; it writes text (generate)" if isinstance(self.model, TextModel) else ""
            name = type(self.model).__name__
            raise ValueError(f"{self.origin} holds a {name}, which has no classes{hint}")
        predictor = Predictor(
            self.model, self.reader, self.class_names, multi_label=self.job.multi_label
        )
        return predictor.stream(
            inputs, top_k=top_k, batch_size=batch_size, num_workers=num_workers, on_error=on_error
        )

    @property
    def tokenizer(self) -> "Tokenizer":
        """A text model's tokenizer.

        Raises:
            ValueError: for another model, or if the file names none.
        """
        if not isinstance(self.model, TextModel):
            raise ValueError(
                f"{self.origin} holds a {type(self.model).__name__}: only a text model writes text"
            )
        if self.job.reader is None:
            raise ValueError(f"{self.origin} names no tokenizer: give it (--tokenizer bytes)")
        tokenizer: Tokenizer = self.reader.encoder
        if tokenizer.vocab_size > self.model.config.vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model of "
                f"{self.origin} knows {self.model.config.vocab_size}: give the one it was trained "
                f"with (--tokenizer)"
            )
        return tokenizer

    def generate(self, prompt: str | Path, **settings: Any) -> str:
        """What a text decoder writes after a prompt. Arguments and errors as in `write`."""
        return "".join(self.write(prompt, **settings))

    def write(
        self,
        prompt: str | Path,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """What a text decoder writes after a prompt, piece by piece as it comes.

        Args:
            prompt: the text to continue, or the `pathlib.Path` of a file of it.
            max_new_tokens: 200 by default, or what the model's `max_length` leaves.
            temperature, top_k, top_p: as in `diffmm.models.generation.stream`.
            seed: the same seed writes the same.

        Raises:
            ValueError: for a model that writes no text, an empty prompt, or a number out of its
                range.
        """
        from diffmm.tokenizers import StreamDecoder

        tokenizer = self.tokenizer
        assert isinstance(self.model, TextModel)
        ids = self.reader.read(prompt)["tokens"]
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must be a number of 64 bits, got {seed}")
        if max_new_tokens is None:
            max_new_tokens = max(1, min(MAX_NEW_TOKENS, self.model.config.max_length - len(ids)))
        device = self.model.embedding.weight.device
        steps = stream(
            self.model,
            torch.as_tensor(ids, device=device)[None],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_ids=[tokenizer.eos_id],
            generator=torch.Generator(device).manual_seed(seed),
        )
        decoder = StreamDecoder(tokenizer)
        for new in steps:
            yield decoder.feed(new.tolist())
        yield decoder.flush()

    def attention_maps(self, item: Any, layers: Sequence[int] | None = None) -> "list[LayerMaps]":
        """The attention maps for one input (see `diffmm.analysis.attention_maps`).

        Args:
            item: as in `predict`, one alone.
            layers: which attention layers, by number; all by default.
        """
        from diffmm.analysis.attention_maps import attention_maps

        device = next(self.model.parameters()).device
        batch = self.reader.collate([self.reader.read(item)])
        moved: Any = {name: tensor.to(device) for name, tensor in batch.items()}
        inputs = inputs_of(self.model, moved)
        return attention_maps(self.model, *inputs, layers=layers)
