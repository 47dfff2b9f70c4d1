"""Reading and writing of models of all families."""

import json
from pathlib import Path

from torch import nn

from diffmm.checks import check_choice, did_you_mean
from diffmm.interop.ast import AST
from diffmm.interop.diffclip import DIFFCLIP
from diffmm.interop.diffclip_text import DIFFCLIP_TEXT
from diffmm.interop.diffllama import DIFFLLAMA
from diffmm.interop.family import Family, contents_of, model_of
from diffmm.interop.gemma2 import GEMMA2
from diffmm.interop.llama import LLAMA
from diffmm.interop.mistral import MISTRAL
from diffmm.interop.motif import MOTIF
from diffmm.interop.open_clip import OPEN_CLIP
from diffmm.interop.open_clip_text import OPEN_CLIP_TEXT
from diffmm.interop.qwen import QWEN2, QWEN3
from diffmm.interop.source import Source, read_source
from diffmm.interop.timm_models import TIMM
from diffmm.interop.unilm_decoders import UNILM_V1, UNILM_V2
from diffmm.interop.whisper import WHISPER
from diffmm.models.contents import CONFIG_NAME, Contents
from diffmm.models.safetensors_files import WEIGHTS_NAME, write_tensors
from diffmm.models.tokenizer_files import GENERATION_NAME, tokenizer_files
from diffmm.new_folders import appearing

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA2,
        DIFFLLAMA,
        MOTIF,
        UNILM_V1,
        UNILM_V2,
        TIMM,
        AST,
        WHISPER,
        OPEN_CLIP,
        OPEN_CLIP_TEXT,
        DIFFCLIP,
        DIFFCLIP_TEXT,
    )
}
"""All families by name. A family of your own is added here."""


def read_model(source: str | Path, family: str | None = None) -> nn.Module:
    """Read a model of another implementation, in float32 on the CPU and in evaluation mode.

    Args:
        source: A folder with `config.json` and safetensors, one of those safetensors files, or the
            name of a repository on the Hugging Face hub.
        family: A name in `FAMILIES`; by default the one that `config.json` names.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a file cannot be read, the family is unknown, or diffmm cannot hold a setting
            or a tensor exactly; the message names it.
    """
    return model_of(read_contents(source, family))


def read_contents(source: str | Path, family: str | None = None) -> Contents:
    """Read weights of another implementation as diffmm's, in their own dtypes; see `read_model`."""
    read = read_source(source)
    return family_of(read, family).to_ours(read)


def family_of(source: Source, name: str | None = None) -> Family:
    """The family of a source: the one of this name, or the one that its settings name.

    Raises:
        ValueError: If it is unknown, or the weights are those of another class of the family.
    """
    if name is not None:
        check_choice("family", name, FAMILIES)
        return FAMILIES[name]
    kind = source.config.get("model_type")
    kind = kind.lower() if isinstance(kind, str) else kind
    if kind is None and "architecture" in source.config:
        kind = TIMM.name
    if kind is None and "model_cfg" in source.config:
        kind = OPEN_CLIP.name
    architectures = source.config.get("architectures") or []
    if kind not in FAMILIES:
        raise ValueError(
            f"{source.origin} is a model of type {kind!r}, which diffmm cannot read"
            f"{did_you_mean(kind, FAMILIES)}; it reads {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    if architectures and not set(architectures) & set(family.architectures):
        raise ValueError(
            f"{source.origin} contains a {', '.join(map(str, architectures))}, but of {kind} "
            f"diffmm reads only {', '.join(family.architectures)}"
        )
    return family


def write_model(model: nn.Module, folder: str | Path, family: str) -> Path:
    """Write a model as one of another implementation: `config.json`, `model.safetensors` and, if
    the model has one, its tokenizer (`tokenizer.json`, `tokenizer_config.json`), chat template and
    the ids that end a text.

    Args:
        model: A model of `diffmm.models`.
        folder: The folder, which must not exist or be empty. It appears whole or not at all.
        family: A name in `FAMILIES`.

    Returns:
        The folder.

    Raises:
        ValueError: If the family is unknown or cannot hold a setting of the model, or the folder is
            not empty; the message names it.
    """
    return write_contents(contents_of(model), folder, family)


def write_contents(contents: Contents, folder: str | Path, family: str) -> Path:
    """Write weights of diffmm as a model of another implementation, in their own dtypes; see
    `write_model`."""
    check_choice("family", family, FAMILIES)
    folder = Path(folder)
    check_free(folder)
    files, tensors = FAMILIES[family].to_theirs(contents)
    settings = files[CONFIG_NAME]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if len(dtypes) == 1:
        settings["torch_dtype"] = dtypes.pop()
    assert contents.description is not None
    max_length = contents.description["config"].get("max_length", 0)
    texts, ids = tokenizer_files(contents.job, max_length)
    settings |= ids
    if isinstance(ids.get("eos_token_id"), list):  # older versions of transformers read it there
        files = {**files, GENERATION_NAME: ids}
    with appearing(folder) as unfinished:
        for name, values in files.items():
            (unfinished / name).write_text(json.dumps(values, indent=2) + "\n")
        write_tensors(tensors, unfinished / WEIGHTS_NAME, {"format": "pt"})
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        check_free(folder)
    return folder


def check_free(path: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        ValueError: If `path` is a file or a folder that is not empty.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} exists already: give another target, or remove it")
