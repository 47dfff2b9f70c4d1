"""Folders for the hub: a model's weights, its settings, its tokenizer or preprocessing, its card.

model.safetensors         the weights, with the description of the model and its job; or
                          model-00001-of-00002.safetensors, ..., model.safetensors.index.json
config.json               the same description and job, as other libraries read them
preprocessor_config.json  of an image or audio model: how its inputs are prepared
tokenizer.json, tokenizer_config.json, generation_config.json    of a text model
chat_template.jinja       of a text model that was trained on conversations
README.md                 the model card
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import diffmm
from diffmm.models.contents import CONFIG_NAME, MODEL_TYPE, write_contents
from diffmm.models.description import describe, unwrap
from diffmm.models.hub_files import CARD_NAME
from diffmm.models.model_card import model_card
from diffmm.models.safetensors_files import INDEX_NAME, JOB_KEY, SHARDS, WEIGHTS_NAME, check_size
from diffmm.models.text import TextModel
from diffmm.models.tokenizer_files import (
    CHAT_TEMPLATE_NAME,
    GENERATION_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    tokenizer_files,
)
from diffmm.models.weights import saved_contents
from diffmm.new_folders import appearing

PREPROCESSOR_NAME = "preprocessor_config.json"

OWN_FILES = (
    WEIGHTS_NAME,
    INDEX_NAME,
    SHARDS,
    CONFIG_NAME,
    PREPROCESSOR_NAME,
    TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE_NAME,
    GENERATION_NAME,
)
"""The files of a model, also those that other libraries write; those of an earlier one are removed
from a folder."""

CAUSAL_LM = "DiffmmForCausalLM"
"""The class of `diffmm.interop.transformers_models` that holds a decoder."""


def write_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a model's folder for the hub.

    A new folder appears whole or not at all. In an existing one, the files named above are
    replaced one by one, and those of an earlier model that this one does not have are removed, but
    a card that is already there is kept.

    Args:
        model: A model of `diffmm.models`.
        folder: The folder.
        name: The model's name in its card; that of the folder by default.
        metrics: Metrics for its card.
        max_shard_size: Maximum size of a file of weights, as in
            `diffmm.models.safetensors_files.write_tensors`; by default there is one file.

    Returns:
        The folder.

    Raises:
        ValueError: As `diffmm.models.weights.save_model`, or if the folder is a file, a metric is
            not a number, or `max_shard_size` is not a size.
    """
    model, folder = unwrap(model), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the name of a folder")
    if max_shard_size is not None:
        check_size(max_shard_size)
    texts = {
        **settings_files(model),
        CARD_NAME: model_card(model, name or folder.resolve().name, metrics or {}),
    }
    with appearing(folder, kept=[CARD_NAME], removed=OWN_FILES) as unfinished:
        write_contents(
            saved_contents(model), unfinished / WEIGHTS_NAME, max_shard_size=max_shard_size
        )
        for file, text in texts.items():
            (unfinished / file).write_text(text, encoding="utf-8")
    return folder


def settings_files(model: nn.Module) -> dict[str, str]:
    """The text of every file of a model's folder except the weights and the card, by name."""
    job: Any = getattr(model, "job", None)
    plain = None if job is None else job.plain()
    is_decoder = isinstance(model, TextModel) and model.config.causal
    weight = max(model.parameters(), key=lambda parameter: parameter.numel())
    settings: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": [CAUSAL_LM if is_decoder else type(model).__name__],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "diffmm_version": diffmm.__version__,
        "description": describe(model),
    }
    if plain is not None:
        settings[JOB_KEY] = plain
    files: dict[str, str] = {}
    if isinstance(model, TextModel):
        texts, ids = tokenizer_files(plain, model.config.max_length)
        files |= texts
        if is_decoder and ids:
            files[GENERATION_NAME] = as_json(ids)
    elif plain is not None and plain["reader"] is not None:
        files[PREPROCESSOR_NAME] = as_json(plain["reader"])
    return {CONFIG_NAME: as_json(settings), **files}


def as_json(values: Mapping[str, Any]) -> str:
    """Values as the text of a JSON file."""
    return json.dumps(values, indent=2) + "\n"
