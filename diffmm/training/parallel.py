"""Strategies for `--trainer.strategy` beyond Lightning's own, and checkpoint loading for all."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from diffmm.models.checkpoint_files import read_checkpoint
from diffmm.models.sharded_states import (
    OPTIMIZERS,
    WEIGHTS,
    read_metadata,
    read_plain,
    read_tensors,
    renamed,
    with_tensors,
    write_sharded_state,
)
from diffmm.renamed import weight_name, weights_with_new_names
from diffmm.training.lightning_internals import set_data_parallel_size


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2, with or without tensor parallelism: Lightning's `ModelParallelStrategy` for models
    that `diffmm.training.Task` shards. Registered as `fsdp2`, and with tensor parallelism over 2,
    4 or 8 devices as `fsdp2_tp2`, `fsdp2_tp4` and `fsdp2_tp8`.

    Each process writes its own shard of a checkpoint (see `diffmm.models.sharded_states`); no
    process gathers all of it. A sharded checkpoint loads under every strategy and on any number of
    devices, and the single-file checkpoints of other strategies load under this one.

    Args:
        tensor_parallel_size: Number of devices that share the heads of every block and compute on
            the same samples. It should divide the number of devices per node, because these devices
            communicate most.

    Raises:
        ValueError: If `tensor_parallel_size` is below 1 or, when a run starts, does not divide the
            number of devices.
    """

    def __init__(self, tensor_parallel_size: int = 1) -> None:
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
        super().__init__(tensor_parallel_size=tensor_parallel_size)
        self.tensor_parallel_size = tensor_parallel_size

    def setup_environment(self) -> None:
        num_devices = self.num_nodes * self.num_processes
        if num_devices % self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size must divide the number of devices, got "
                f"{self.tensor_parallel_size} and {num_devices}"
            )
        set_data_parallel_size(self, num_devices // self.tensor_parallel_size)
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint. Must be called by all processes, each of which writes its shard."""
        if storage_options is not None:
            raise TypeError("storage_options need a strategy that has a CheckpointIO")
        path = Path(self.broadcast(filepath))
        write_sharded_state(path, checkpoint, is_first=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Load a checkpoint of any strategy. Each process reads only the tensors that it needs."""
        path = Path(self.broadcast(checkpoint_path))
        return self._load_shares(path) if path.is_dir() else self._load_file(path, weights_only)

    def _load_shares(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        checkpoint = read_plain(path)
        names = {weight_name(name): name for name in read_metadata(path).state_dict_metadata}
        weights = get_model_state_dict(self.model)
        states: list[Any] = [get_optimizer_state_dict(self.model, o) for o in self.optimizers]
        # An evaluation has no optimizer.
        saved = checkpoint.get(OPTIMIZERS, []) if states else []
        if len(saved) != len(states):
            raise ValueError(f"{path} has {len(saved)} optimizers, the run has {len(states)}")
        wanted: dict[str, Any] = {f"{WEIGHTS}.{name}": tensor for name, tensor in weights.items()}
        for number, state in enumerate(states):
            wanted |= {
                f"{OPTIMIZERS}.{number}.{name}.{key}": value
                for name, values in state["state"].items()
                for key, value in values.items()
                if isinstance(value, Tensor)
            }
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} tensors (the first is {missing[0]})")
        unknown = [name for name in names if name.startswith(f"{WEIGHTS}.") and name not in wanted]
        if unknown:
            raise ValueError(
                f"{path} has {len(unknown)} weights that the model lacks (the first is "
                f"{unknown[0]})"
            )
        read_tensors(path, {names[name]: tensor for name, tensor in wanted.items()}, together=True)
        set_model_state_dict(self.model, weights)
        for number, (optimizer, plain) in enumerate(zip(self.optimizers, saved, strict=True)):
            today = {n: weight_name(n) for group in plain["param_groups"] for n in group["params"]}
            state = with_tensors(renamed(plain, today), number, wanted)
            set_optimizer_state_dict(self.model, optimizer, state)
        return {**checkpoint, WEIGHTS: {}}

    def _load_file(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        assert self.model is not None
        # Lightning does not pass `weights_only` on to a strategy that is set up first.
        tensors_only = weights_only is not False
        checkpoint = torch.load(path, map_location="cpu", weights_only=tensors_only, mmap=True)
        whole = StateDictOptions(full_state_dict=True)
        weights = weights_with_new_names(checkpoint["state_dict"])
        set_model_state_dict(self.model, weights, options=whole)
        states = checkpoint.get("optimizer_states", []) if self.optimizers else []
        for optimizer, state in zip(self.optimizers, states, strict=True):
            named: Any = get_optimizer_state_dict(self.model, optimizer)
            names = [name for group in named["param_groups"] for name in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            state = renamed(state, dict(zip(numbers, names, strict=True)))
            set_optimizer_state_dict(self.model, optimizer, state, options=whole)
        return checkpoint


class AnyCheckpoint(TorchCheckpointIO):
    """Reads single-file and sharded checkpoints, for strategies that do not shard the model."""

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(path).is_dir():
            return read_checkpoint(Path(path), optimizer=True)
        return super().load_checkpoint(path, map_location, weights_only)


def read_any_checkpoint(strategy: Strategy) -> None:
    """Let a strategy with Lightning's default checkpoint IO read sharded checkpoints, too."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AnyCheckpoint()


def data_share(trainer: Trainer) -> tuple[int, int]:
    """Return this process's data-parallel rank and the data-parallel size. All processes of a
    tensor-parallel group have the same data-parallel rank."""
    share = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return (share["rank"], share["num_replicas"]) if share else (0, 1)


for _size in (1, 2, 4, 8):
    StrategyRegistry.register(
        "fsdp2" if _size == 1 else f"fsdp2_tp{_size}",
        FSDP2Strategy,
        description="FSDP2" if _size == 1 else f"FSDP2, heads split over {_size} devices",
        tensor_parallel_size=_size,
    )
