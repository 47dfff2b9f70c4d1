"""Many devices, one run: what `--trainer.strategy` may be besides Lightning's own `ddp`."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from diffmm.renamed import weights_with_new_names

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2, with or without tensor parallelism: Lightning's `ModelParallelStrategy` for models
    that `diffmm.training.Task` shards. Registered as `fsdp2`, and with tensor parallelism over 2,
    4 or 8 devices as `fsdp2_tp2`, `fsdp2_tp4` and `fsdp2_tp8`.

    Its checkpoints are those of one device: a file with whole weights and moments, under the same
    names and numbers. So they load under every strategy and on any number of devices.

    Args:
        tensor_parallel_size: devices that share the heads of every block and compute on the same
            samples; at best a divisor of the devices in a node, between which they talk most.

    Raises:
        ValueError: (when a run starts) if it does not divide the number of devices.
    """

    def __init__(self, tensor_parallel_size: int = 1) -> None:
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
        super().__init__(
            tensor_parallel_size=tensor_parallel_size, save_distributed_checkpoint=False
        )
        self.tensor_parallel_size = tensor_parallel_size

    def setup_environment(self) -> None:
        num_devices = self.num_nodes * self.num_processes
        if num_devices % self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size must divide the number of devices, got "
                f"{self.tensor_parallel_size} and {num_devices}"
            )
        self._data_parallel_size = num_devices // self.tensor_parallel_size
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on the CPU of rank 0, and nothing on the others."""
        assert self.model is not None
        return get_model_state_dict(self.model, options=WHOLE)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole moments on the CPU of rank 0, numbered as the optimizer itself would."""
        assert self.model is not None
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        named: Any = get_optimizer_state_dict(self.model, optimizer, options=WHOLE)
        if not named:
            return {}
        names = [name for group in named["param_groups"] for name in group["params"]]
        return _renamed(named, {name: number for number, name in enumerate(names)})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Put a checkpoint of any strategy in place; every process reads what it needs of it."""
        assert self.model is not None
        # Where a strategy is set up first, Lightning does not pass on what it was told.
        tensors_only = weights_only is not False
        checkpoint = torch.load(
            checkpoint_path, map_location="cpu", weights_only=tensors_only, mmap=True
        )
        whole = StateDictOptions(full_state_dict=True)
        weights = weights_with_new_names(checkpoint["state_dict"])
        set_model_state_dict(self.model, weights, options=whole)
        states = checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=True):
            named: Any = get_optimizer_state_dict(self.model, optimizer)
            names = [name for group in named["param_groups"] for name in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            state = _renamed(state, dict(zip(numbers, names, strict=True)))
            set_optimizer_state_dict(self.model, optimizer, state, options=whole)
        return checkpoint


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other names for its parameters."""
    groups = [
        {**group, "params": [names[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        "state": {names[name]: value for name, value in state["state"].items()},
        "param_groups": groups,
    }


def data_share(trainer: Trainer) -> tuple[int, int]:
    """Which share of the samples is this process's, and how many shares there are. The processes
    of one tensor-parallel group have the same."""
    share = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return (share["rank"], share["num_replicas"]) if share else (0, 1)


for _size in (1, 2, 4, 8):
    StrategyRegistry.register(
        "fsdp2" if _size == 1 else f"fsdp2_tp{_size}",
        FSDP2Strategy,
        description="FSDP2" if _size == 1 else f"FSDP2, heads split over {_size} devices",
        tensor_parallel_size=_size,
    )
