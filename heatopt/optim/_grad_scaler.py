"""torch's GradScaler, with the overflow decision agreed by all ranks."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import torch

from heatopt.optim._data_parallel import DataParallelOptimizer
from heatopt.optim._local import LocalOptimizer

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """:class:`torch.amp.GradScaler` for a :class:`DataParallelOptimizer`: all ranks skip a step, or none does.

    ``unscale_`` and ``step`` first make every gradient an average, also those set by hand and on ranks that called no
    backward; then an overflow that any rank finds counts on all, so all scales stay equal. With another optimizer it is
    torch's scaler. With a local-update method this holds among ranks that average gradients; the others go on, and the
    skipped step is counted, so that averages stay in step. Compressed gradients that are sent later follow the scale.
    Arguments as there.
    """

    _compressing: tuple[weakref.ref[DataParallelOptimizer], ...] = ()
    """Optimizers whose residuals are in the unit of the scale."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self._start()
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        self._start()
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        self._start()
        optimizers = [optimizer for found in self._compressing if (optimizer := found()) is not None]
        before = self.get_scale() if optimizers else 1.0
        super().update(new_scale)
        if optimizers and (factor := self.get_scale() / before) != 1.0:
            for optimizer in optimizers:
                optimizer.rescale_residuals(factor)

    def __getstate__(self) -> dict[str, Any]:
        # A copy meets its own optimizers.
        return {name: value for name, value in super().__getstate__().items() if name != "_compressing"}

    def _start(self) -> None:
        """Make the scale, which torch does at the first loss: this rank may have scaled none yet, unlike others."""
        if self._enabled and self._scale is None:
            self._lazy_init_scale_growth_tracker(torch.device(self._device))

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: torch.Tensor,
        found_inf: torch.Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, torch.Tensor]:
        if isinstance(optimizer, LocalOptimizer):
            optimizer = optimizer.stepper
        if not isinstance(optimizer, DataParallelOptimizer):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        if optimizer._settings.compression is not None and all(known() is not optimizer for known in self._compressing):
            self._compressing += (weakref.ref(optimizer),)
        optimizer.unscale_agreed(0.0)  # gradients must be final before they are scaled
        holders: Any = SimpleNamespace(param_groups=[{"params": optimizer.gradient_holders()}])
        # torch refuses float16 gradients, taking the parameters for what is updated; with masters that is not so.
        allow_fp16 = allow_fp16 or optimizer._settings.master_dtype is not None
        per_device = super()._unscale_grads_(holders, inv_scale, found_inf, allow_fp16)
        found = max((float(flag) for flag in per_device.values()), default=0.0)
        agreed = optimizer.unscale_agreed(found)
        if not per_device:
            per_device[inv_scale.device] = found_inf
        for flag in per_device.values():
            flag.fill_(agreed)
        if agreed:
            optimizer.give_up_gradients()
        return per_device

    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        overflow = any(flag.item() for flag in optimizer_state["found_inf_per_device"].values())
        if overflow and isinstance(optimizer, LocalOptimizer):
            optimizer.skip_update()
        return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
