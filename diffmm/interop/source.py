"""Weights of other implementations on disk or on the Hugging Face hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from diffmm.chat_templates import template_in
from diffmm.models.contents import CONFIG_NAME, describes_model, settings_beside
from diffmm.models.hub_files import resolve
from diffmm.models.safetensors_files import (
    INDEX_NAME,
    WEIGHTS_NAME,
    is_safetensors,
    read_tensors,
    weights_in,
)
from diffmm.models.tokenizer_files import GENERATION_NAME, TOKENIZER_NAME

OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"
OPEN_CLIP_WEIGHTS_NAME = "open_clip_model.safetensors"
PREPROCESSOR_NAME = "preprocessor_config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")


class Source(NamedTuple):
    """Weights with the settings and the tokenizer beside them.

    Attributes:
        origin: Name of the folder, for messages.
        config: The settings in `config.json`.
        tensors: The weights by their names, in their own dtypes.
        tokenizer: The text of `tokenizer.json`, or None.
        preprocessor: The settings in `preprocessor_config.json`, or None.
        generation: The settings in `generation_config.json`; empty without it.
        chat_template: The chat template beside the tokenizer, or None.
    """

    origin: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: str | None
    preprocessor: dict[str, Any] | None = None
    generation: Mapping[str, Any] = {}
    chat_template: str | None = None


def read_source(source: str | Path) -> Source:
    """Read weights of another implementation.

    Args:
        source: A folder with `config.json` and safetensors (one file, or several with an index),
            one of those files, or the name of a repository on the Hugging Face hub.

    Raises:
        FileNotFoundError: If there is no such file or folder, and it is not a name on the hub.
        ValueError: If a file is missing, damaged or not what its name says, or the hub cannot be
            reached; the message names it.
    """
    folder, file = locate(source)
    is_clip = _is_open_clip(folder)
    if is_clip and file is None and (folder / OPEN_CLIP_WEIGHTS_NAME).is_file():
        file = folder / OPEN_CLIP_WEIGHTS_NAME
    config = read_json(folder / (OPEN_CLIP_CONFIG_NAME if is_clip else CONFIG_NAME))
    weights = read_tensors(file or _weights_in(folder)).tensors
    tokenizer = folder / TOKENIZER_NAME
    text = None
    if tokenizer.is_file():
        read_json(tokenizer)
        text = tokenizer.read_text(encoding="utf-8")
    preprocessor = folder / PREPROCESSOR_NAME
    prepared = read_json(preprocessor) if preprocessor.is_file() else None
    generation = folder / GENERATION_NAME
    settings = read_json(generation) if generation.is_file() else {}
    template = None if text is None else template_in(folder)
    return Source(str(source), config, weights, text, prepared, settings, template)


def locate(source: str | Path) -> tuple[Path, Path | None]:
    """The local folder of a source, and its file of weights if the source is one.

    Raises:
        FileNotFoundError, ValueError: As `read_source`.
    """
    path = resolve(source)
    if path.is_dir():
        return path, None
    if path.is_file():
        return path.parent, path
    raise FileNotFoundError(f"there is no file or folder {source}")


def is_of_others(source: str | Path) -> bool:
    """Whether a source has the settings of another implementation beside its weights (it is not a
    run or a file of diffmm). A repository of the hub is fetched.

    Raises:
        ValueError: If the hub cannot be reached, or a file is damaged.
    """
    path = resolve(source)
    if not path.exists():
        return False
    folder = path if path.is_dir() else path.parent
    file = weights_in(path) if path.is_dir() else path
    if file.is_file() and not (is_safetensors(file) and not describes_model(file)):
        return False
    has_settings = (folder / CONFIG_NAME).is_file() and not settings_beside(file)
    return has_settings or _is_open_clip(folder)


def _is_open_clip(folder: Path) -> bool:
    """Whether a folder is to be read as one of open_clip: it has its settings, and no others except
    perhaps those of the same model for transformers."""
    if not (folder / OPEN_CLIP_CONFIG_NAME).is_file():
        return False
    others = folder / CONFIG_NAME
    return not others.is_file() or read_json(others).get("model_type") == "clip"


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with a JSON object.

    Raises:
        ValueError: If it is missing, or not an object in JSON.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must contain an object, got {type(values).__name__}")
    return values


def _weights_in(folder: Path) -> Path:
    """The weights of a folder: one file, or the index of several."""
    file = weights_in(folder)
    if not file.is_file():
        pickles = [name for name in PICKLES if (folder / name).is_file()]
        hint = f", only {pickles[0]}: save its weights as safetensors" if pickles else ""
        raise ValueError(f"{folder} has no {WEIGHTS_NAME} and no {INDEX_NAME}{hint}")
    return file
