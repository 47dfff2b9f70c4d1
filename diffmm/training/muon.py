"""Muon for the matrices inside the blocks and AdamW for all other parameters, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimizer with one list of parameter groups
    and one state.

    Muon (Jordan et al. 2024) moves a matrix by its orthogonalized momentum. Its rates are scaled by
    `0.2 * sqrt(max(rows, columns))` (`adjust_lr_fn="match_rms_adamw"`; Liu et al. 2025, Moonlight),
    so that its steps are about as large as AdamW's, and AdamW's learning rate and weight decay can
    be kept.

    If AdamW is fused, a step is skipped on the device, without a synchronization, if the attribute
    `found_inf` is not 0, and gradients are divided by the attribute `grad_scale`, as
    `NonFiniteGuard` and gradient scalers expect. While `found_inf` is set, a step temporarily holds
    copies of Muon's matrices and momenta.

    Args:
        matrices: Parameter groups of Muon. All parameters must have two dimensions.
        others: Parameter groups of AdamW.
        momentum: Decay rate of Muon's momentum, in [0, 1).
        betas: AdamW's decay rates, each in [0, 1).
        eps: AdamW's constant in the denominator.
        fused: Whether AdamW uses its fused kernel.

    Raises:
        ValueError: If a group of Muon holds a parameter that is not a matrix.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ) -> None:
        self.muon = Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW(others, betas=betas, eps=eps, fused=fused or None)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._step_supports_amp_scaling = fused
        self._share()

    def _share(self) -> None:
        """Let both optimizers use the groups and the state of this one."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = (
            self.param_groups[:count],
            self.param_groups[count:],
        )
        self.muon.state = self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step, after a call of `closure` if it is given; returns its result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        self.adamw.found_inf, self.adamw.grad_scale = found_inf, grad_scale  # type: ignore[attr-defined]
        self.adamw.step()
        if grad_scale is not None:
            for parameter in self._moved_by_muon():
                parameter.grad.div_(grad_scale)
        if found_inf is None:
            self.muon.step()
            return loss
        before = [(tensor, tensor.clone()) for tensor in self._changed_by_muon()]
        self.muon.step()
        is_skipped = found_inf > 0
        for tensor, copy in before:
            tensor.copy_(torch.where(is_skipped, copy, tensor))
        return loss

    def _moved_by_muon(self) -> list[Any]:
        """The matrices that a step of Muon changes."""
        matrices = (p for group in self.muon.param_groups for p in group["params"])
        return [parameter for parameter in matrices if parameter.grad is not None]

    def _changed_by_muon(self) -> list[Tensor]:
        """The matrices that a step of Muon changes, and their momenta, which begin at 0."""
        tensors = []
        for parameter in self._moved_by_muon():
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            tensors += [parameter, state["momentum_buffer"]]
        return tensors

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of AdamW."""
        super().add_param_group(param_group)
        if param_group.keys().isdisjoint(("betas", "momentum")):  # not a group of `__init__`
            self.adamw.add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the same groups.

        Raises:
            ValueError: If the state has other groups, as that of AdamW alone.
        """
        saved, own = (
            [group.get("name") for group in groups]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        if saved != own:
            raise ValueError(
                f"the optimizer's state has the groups {saved}, but kind='muon' needs {own}: "
                f"continue with the kind that the run started with"
            )
        super().load_state_dict(state_dict)
        self._share()
