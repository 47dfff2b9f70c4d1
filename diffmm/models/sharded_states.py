"""Sharded states, of which every process writes its own shard by torch's distributed checkpoint.

    state.ckpt/
      meta.pt                   everything except the tensors of the model and the optimizer
      .metadata                 the location of each part of each tensor
      __0_0.distcp, ...         the shards, one file per process

The content does not depend on the number of processes that wrote it, and any number of processes
can read it. Reading runs no code from the files: `.metadata` is a pickle, which is read by an
unpickler that accepts only the classes needed; all other values are tensors and plain values.
"""

import io
import pickle
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from diffmm.checks import reason_of

PLAIN_NAME = "meta.pt"
METADATA_NAME = ".metadata"
WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"
"""Keys of a state whose tensors are sharded; prefixes of the tensors' names in the files."""


def is_sharded_state(path: Path) -> bool:
    """Whether the path is a sharded state."""
    return (path / PLAIN_NAME).is_file()


def write_sharded_state(path: Path, state: dict[str, Any], *, is_first: bool) -> None:
    """Write a state on all processes together, each of which writes its own shard of the tensors.

    Args:
        path: The folder, which is created if necessary.
        state: A Lightning checkpoint, with sharded weights by name under `state_dict`, and under
            `optimizer_states` the optimizers' states by the names of the parameters.
        is_first: Whether this process writes everything outside the shards.

    Raises:
        OSError: On every process, if any of them cannot write its shard.
    """
    path.mkdir(parents=True, exist_ok=True)
    plain = {key: value for key, value in state.items() if key not in (WEIGHTS, OPTIMIZERS)}
    tensors = {f"{WEIGHTS}.{name}": tensor for name, tensor in state[WEIGHTS].items()}
    plain[OPTIMIZERS] = []
    for number, optimizer in enumerate(state.get(OPTIMIZERS, [])):
        rest: dict[str, dict[str, Any]] = {}
        for name, values in optimizer["state"].items():
            rest[name] = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
            tensors |= {
                f"{OPTIMIZERS}.{number}.{name}.{key}": value
                for key, value in values.items()
                if isinstance(value, Tensor)
            }
        plain[OPTIMIZERS].append({"state": rest, "param_groups": optimizer["param_groups"]})
    try:
        dcp.save(tensors, storage_writer=FileSystemWriter(path))
    except CheckpointException as error:
        raise OSError(_cause(error)) from error
    if is_first:
        torch.save(plain, path / PLAIN_NAME)


def read_sharded_state(path: Path, *, weights: bool, optimizer: bool) -> dict[str, Any]:
    """Read a state in the format of a single process, with unsharded tensors on the CPU.

    Args:
        path: The folder.
        weights: Whether to read the weights; otherwise `state_dict` is empty.
        optimizer: Whether to read the optimizers' tensors.

    Raises:
        ValueError: If the folder is damaged or has unexpected content; the message names it.
    """
    state = read_plain(path)
    found = read_metadata(path)
    wanted = tuple(
        f"{key}." for key, is_read in ((WEIGHTS, weights), (OPTIMIZERS, optimizer)) if is_read
    )
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(wanted)
    }
    if tensors:
        read_tensors(path, tensors, together=False)
    prefix = f"{WEIGHTS}."
    state[WEIGHTS] = {
        name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
    }
    if optimizer:
        state[OPTIMIZERS] = [
            numbered(with_tensors(each, number, tensors))
            for number, each in enumerate(state[OPTIMIZERS])
        ]
    return state


def read_plain(path: Path) -> dict[str, Any]:
    """Read everything in a state except its shards.

    Raises:
        ValueError: If the file is damaged; the message names it.
    """
    file = path / PLAIN_NAME
    try:
        plain = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is not a complete file of plain values: {reason_of(error)}"
        ) from error
    if not isinstance(plain, dict):
        raise ValueError(f"{file} does not hold a dict")
    return plain


def read_tensors(path: Path, tensors: dict[str, Tensor], *, together: bool) -> None:
    """Fill tensors in place.

    Args:
        path: The folder.
        tensors: Tensors by their names in the files; of a sharded one, only its own part is read.
        together: Whether all processes call this at the same time, each for its own tensors.

    Raises:
        ValueError: If the files cannot be read; the message names the folder and the problem.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=_Reader(path), no_dist=not together)
    except CheckpointException as error:
        raise ValueError(f"{path} cannot be read: {_cause(error)}") from error


def with_tensors(
    optimizer: dict[str, Any], number: int, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Add the tensors to the plain part of an optimizer's state, by the names of the parameters."""
    state: dict[str, dict[str, Any]] = {k: dict(v) for k, v in optimizer["state"].items()}
    prefix = f"{OPTIMIZERS}.{number}."
    for full_name, tensor in tensors.items():
        if full_name.startswith(prefix):
            name, _, key = full_name.removeprefix(prefix).rpartition(".")
            state.setdefault(name, {})[key] = tensor
    return {**optimizer, "state": state}


def numbered(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state by the numbers of the parameters, the optimizer's own format."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    return renamed(optimizer, {name: number for number, name in enumerate(names)})


def renamed(optimizer: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """Return an optimizer's state with other names for its parameters."""
    groups = [
        {**group, "params": [names[name] for name in group["params"]]}
        for group in optimizer["param_groups"]
    ]
    state = {names[name]: value for name, value in optimizer["state"].items()}
    return {"state": state, "param_groups": groups}


def read_metadata(path: Path) -> Metadata:
    """Read the metadata of the shards and check it against the files.

    Raises:
        ValueError: If it is invalid; the message names the file and the problem.
    """
    try:
        content = _Unpickler(io.BytesIO((path / METADATA_NAME).read_bytes())).load()
        _check(path, content)
    except ValueError as error:
        raise ValueError(f"{path / METADATA_NAME} cannot be used: {error}") from error
    except Exception as error:
        # A damaged pickle can raise any error.
        raise ValueError(f"{path / METADATA_NAME} cannot be read: {reason_of(error)}") from error
    return content


_CLASSES: dict[str, Any] = {
    **{
        name: getattr(metadata, name)
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
            *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    },
    "_StorageInfo": filesystem._StorageInfo,
}
"""Classes that metadata may contain, besides sizes, dtypes and the path it was written to."""


class _Unpickler(pickle.Unpickler):
    """Unpickles only the classes that metadata may contain."""

    def find_class(self, module: str, name: str) -> Any:
        found: Any = None
        if name in _CLASSES and module == _CLASSES[name].__module__:
            found = _CLASSES[name]
        elif module == "torch":
            value = getattr(torch, name, None)
            found = value if isinstance(value, torch.dtype) or value is torch.Size else None
        elif (module, name) == ("torch.serialization", "_get_layout"):
            found = {"torch.strided": torch.strided}.__getitem__
        elif module in ("pathlib", "pathlib._local"):
            found = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}.get(name)
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed there")
        return found


def _check(path: Path, content: Any) -> None:
    """Raise if metadata refers to files outside the folder, or to more bytes than they contain."""
    if not isinstance(content, Metadata) or not isinstance(content.storage_data, dict):
        raise ValueError("it is not the metadata of a distributed checkpoint")
    sizes: dict[str, int] = {}
    for place in content.storage_data.values():
        name = place.relative_path
        if not isinstance(name, str) or Path(name).name != name or place.transform_descriptors:
            raise ValueError(f"it refers to {name!r:.80}, which is not a file in this folder")
        if name not in sizes:
            sizes[name] = (path / name).stat().st_size if (path / name).is_file() else -1
        if not 0 <= place.offset <= place.offset + place.length <= sizes[name]:
            raise ValueError(f"{name} is missing or truncated")
    needed = 0
    for name, entry in content.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        needed += entry.size.numel() * entry.properties.dtype.itemsize
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise ValueError(
                f"the parts of {name} do not form a tensor of shape {tuple(entry.size)}"
            )
    if needed > sum(sizes.values()):
        raise ValueError(
            f"its tensors need {needed:,} bytes, but the files have {sum(sizes.values()):,}"
        )


class _Reader(FileSystemReader):
    """torch's reader, with checked metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = read_metadata(Path(self.path))
        found.storage_meta = StorageMeta(load_id=self.load_id)
        return found


def _cause(error: CheckpointException) -> str:
    """The first failure, in one line."""
    first = next((each[0] for each in error.failures.values()), error)
    return reason_of(first)
