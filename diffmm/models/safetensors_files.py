"""Weights in safetensors: one file or several with an index, as Hugging Face's libraries write.

    model.safetensors                                      one file
    model.safetensors.index.json                           the index of several: `{"weight_map":
    model-00001-of-00002.safetensors, ...                  {name of a tensor: name of its file}}`

A path of weights is that of the one file or that of the index.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffmm.models.quantized_file import QUANTIZATION_KEY

WEIGHTS_NAME = "model.safetensors"
"""Name of the one file of weights in a folder."""

INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
"""Name of the index of several files of weights in a folder."""

DESCRIPTION_KEY = "model"
"""Key of the model's description in the metadata, and in a checkpoint."""

JOB_KEY = "job"
"""Key of the model's job (see `diffmm.models.job`) in the metadata, and in a checkpoint."""

SHARDS = "model-*-of-*.safetensors"
"""Pattern of the names of several files of weights."""

ABOUT_MODEL = (DESCRIPTION_KEY, JOB_KEY, QUANTIZATION_KEY)
ENDING, INDEX_ENDING = ".safetensors", ".safetensors.index.json"
SHARD = re.compile(r".*-\d+-of-(\d+)\.safetensors")
SIZE = re.compile(r"(\d+|\d*\.\d+) ?[KMGT]B", re.IGNORECASE)
SHOWN = 4


class TensorFile(NamedTuple):
    """The tensors of a file, or of all files of an index, by name, and the metadata: of an entry
    that files disagree about, the first."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def is_safetensors(file: Path) -> bool:
    """Whether a path is named like a safetensors file or an index of several."""
    return file.name.endswith((ENDING, INDEX_ENDING))


def weights_in(folder: Path) -> Path:
    """The path of the weights in a folder; that of the one file if there are none."""
    one, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    return index if index.is_file() and not one.is_file() else one


def read_tensors(file: Path) -> TensorFile:
    """Read weights, all of them or none.

    Args:
        file: A safetensors file, or an index.

    Raises:
        ValueError: If a file is damaged or truncated, or the index and its files disagree; the
            message names the file, and the tensors in question.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard, expected in _shards(file).items():
        with _opened(shard) as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            _join(metadata, opened.metadata() or {}, shard, file)
        _check_names(shard, found, expected, file)
        tensors |= found
    return TensorFile(tensors, metadata)


def read_metadata(file: Path) -> dict[str, str]:
    """Read the metadata of weights, without their tensors. Arguments and errors as in
    `read_tensors`."""
    metadata: dict[str, str] = {}
    for shard in _shards(file):
        with _opened(shard) as opened:
            _join(metadata, opened.metadata() or {}, shard, file)
    return metadata


def write_tensors(
    tensors: Mapping[str, Tensor],
    file: Path,
    metadata: dict[str, str],
    *,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a safetensors file, or several with an index if one would be too large.

    Args:
        tensors: The tensors by name.
        file: Path of the one file. Several are written beside it, and the index last.
        metadata: Metadata, which are written to every file.
        max_shard_size: Maximum size of the tensors in a file: a number of bytes, or text such as
            `"5GB"` (10^9 bytes each). A larger tensor has a file of its own. By default there is
            one file.

    Raises:
        ValueError: If `max_shard_size` is not a size.
        OSError: If a file cannot be written, such as on a full disk.
    """
    if max_shard_size is None:
        _write(dict(tensors), file, metadata)
        return
    check_size(max_shard_size)
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = f"{file.stem}{{suffix}}{ENDING}"
    plan = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size
    )
    for shard, names in plan.filename_to_tensors.items():
        _write({name: tensors[name] for name in names}, file.with_name(shard), metadata)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        file.with_name(f"{file.stem}{INDEX_ENDING}").write_text(text, encoding="utf-8")


def check_size(max_shard_size: int | str) -> None:
    """Check the maximum size of a file.

    Raises:
        ValueError: If it is not a positive size as `write_tensors` takes it.
    """
    if isinstance(max_shard_size, str):
        is_size = SIZE.fullmatch(max_shard_size) and float(max_shard_size[:-2]) > 0
    else:
        is_size = type(max_shard_size) is int and max_shard_size > 0
    if not is_size:
        raise ValueError(
            f"max_shard_size must be a positive number of bytes or a size such as '5GB' or "
            f"'500MB', got {max_shard_size!r}"
        )


def _shards(file: Path) -> dict[Path, set[str] | None]:
    """The files of weights and the names of the tensors in each, which only an index says."""
    if not file.name.endswith(INDEX_ENDING):
        if (part := SHARD.fullmatch(file.name)) and int(part[1]) > 1:
            raise ValueError(
                f"{file} is one of {int(part[1])} files of the same weights: give their folder, or "
                f"their index ({INDEX_NAME})"
            )
        return {file: None}
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    places: Any = index.get("weight_map") if isinstance(index, dict) else None
    is_map = isinstance(places, dict) and len(places) > 0
    if not is_map or not all(isinstance(each, str) for each in places.values()):
        raise ValueError(f"{file} has no weight_map of tensors to files")
    shards: dict[Path, set[str] | None] = {}
    for name in sorted(set(places.values())):
        # An index must not make us read files elsewhere.
        if Path(name).name != name or not name.endswith(ENDING):
            raise ValueError(
                f"{file} names {name!r}, which is not the name of a safetensors file beside it"
            )
        if not file.with_name(name).is_file():
            raise ValueError(f"{file.parent} has no file {name}, which its {file.name} names")
        shards[file.with_name(name)] = {each for each in places if places[each] == name}
    return shards


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def _join(metadata: dict[str, str], more: dict[str, str], shard: Path, index: Path) -> None:
    """Add the metadata of a file to those of the files before it. What these say about the model
    must not differ."""
    for key, value in more.items():
        if metadata.setdefault(key, value) != value and key in ABOUT_MODEL:
            raise ValueError(
                f"{shard} has another {key!r} in its metadata than the files before it in "
                f"{index.name}: they are not of the same model"
            )


def _check_names(
    shard: Path, found: Collection[str], expected: set[str] | None, index: Path
) -> None:
    """Check that a file has the tensors that its index says."""
    if expected is None:
        return
    if missing := sorted(expected - set(found)):
        raise ValueError(f"{shard} does not contain {_listed(missing)}, as {index.name} says")
    if surplus := sorted(set(found) - expected):
        raise ValueError(f"{shard} contains {_listed(surplus)}, which {index.name} does not say")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more tensors" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _write(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is not None:  # of the system, such as a full disk: `naming` adds the file
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise OSError(f"{file.name} cannot be written: {error}") from error
