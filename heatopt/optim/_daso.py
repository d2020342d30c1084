"""DASO: averages within the node at each update, among nodes now and then, and while training goes on."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch

from heatopt._log import logger
from heatopt.comm import Communicator
from heatopt.local import PERIOD, Cycle, DasoPeriods, LocalSettings, SyncPlan
from heatopt.optim._local import LocalOptimizer
from heatopt.optim._local_arguments import (
    check_choices,
    check_integer,
    check_number,
    check_place,
    make_settings,
)
from heatopt.sync import Call, outside_graphs

__all__ = ["DASO"]


class DASO(LocalOptimizer):
    r"""Distributed asynchronous and selective optimization: Coquelin et al., J. Big Data 9:14 (2022), arXiv 2104.05588.

    Gradients are averaged within each node at every update, while L (below) is 1. Among nodes, parameters are averaged
    by one rank of each, in turn, which passes them on to its neighbours:

    * warm-up and cool-down: after every update, waiting for it;
    * in between: after every B-th update, merged S updates later. B and S shrink when the loss has stopped improving,
      and start anew when B is 1. After the last batch of an epoch all ranks are made equal.

    While L, which is S when B starts anew, is above 1, ranks train alone: instead of gradients at each update, their
    parameters are averaged within the node after every L-th, and before they are sent. When L is 1 again, the node goes
    on with the optimizer state of its first rank.

    The merge, :math:`x^s` being the parameters when they were sent, P the number of nodes:

    .. math::
        \text{"delta":}\; x \leftarrow \frac1P \sum_i x^s_i + (x - x^s), \qquad
        \text{"daso":}\; x \leftarrow \frac{2 S x + \sum_i x^s_i}{2 S + P}

    "daso" is the published formula, which keeps the part 2S / (2S + P) of what was done meanwhile; "delta" keeps all,
    and S is at most B with it.
    Any number of ranks per node will do. Call :meth:`epoch_loss_logic` at the end of each epoch, on all ranks.

    Args:
        local_optimizer: any :class:`torch.optim.Optimizer`.
        total_epochs: number of epochs of the training; tells when to cool down.
        comm: the ranks; default :func:`heatopt.world`.
        warmup_epochs: epochs with an average after each update, at the beginning.
        cooldown_epochs: the same at the end.
        scheduler: a torch scheduler of ``local_optimizer``, which is stepped after each update (one that takes a metric
            at the end of each epoch, with the mean loss); or None: the user steps it.
        stability_level: the relative change of the loss that counts as an improvement.
        max_global_skips: largest B.
        sending_chunk_size: most elements of one message.
        downcast_type: what *changes since the last average* are rounded to on the network: torch.bfloat16, torch.half
            or torch.float. Sums are in single precision. Between warm-up and cool-down "daso" sends parameters, as they
            are; so does ``synchronize()``.
        use_mpi_groups: has no meaning here: groups come from ``comm.split``.
        skip_reduction_factor: what B is divided by on a plateau.
        local_skip_factor: S and L start anew at ``max_global_skips // local_skip_factor``.
        verbose: log each decision on rank 0, at level INFO.
        model: the module: gives names and buffers, as in :class:`LocalSGD`; or call ``set_model``.
        merge: "delta" or "daso".
        timeout: seconds; as in :class:`DataParallelOptimizer`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or a parameter that another wrapper has.
        RankMismatchError: on all ranks, if their optimizers or settings differ; names the first difference.
    """

    decided_options: ClassVar[dict[str, str]] = {
        PERIOD: "cannot be driven: it decides itself, from the loss, how often nodes meet (global_skip) and when that "
        "is merged (batches_to_wait); max_global_skips limits both"
    }
    """Options that no schedule may drive, and why."""

    def __init__(
        self,
        local_optimizer: torch.optim.Optimizer,
        total_epochs: int,
        *,
        comm: Communicator | None = None,
        warmup_epochs: int = 4,
        cooldown_epochs: int = 4,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        stability_level: float = 0.05,
        max_global_skips: int = 8,
        sending_chunk_size: int = 10_000_000,
        downcast_type: torch.dtype = torch.bfloat16,
        use_mpi_groups: bool = True,
        skip_reduction_factor: int = 2,
        local_skip_factor: int = 4,
        verbose: bool = False,
        model: torch.nn.Module | None = None,
        merge: str = "delta",
        timeout: float | None = None,
    ) -> None:
        optimizer, _, seconds = check_choices(
            local_optimizer, model=model, comm=comm, shard="none", timeout=timeout, within="node"
        )
        periods = DasoPeriods(
            total_epochs=check_integer("total_epochs", total_epochs, 1),
            warmup_epochs=check_integer("warmup_epochs", warmup_epochs, 0),
            cooldown_epochs=check_integer("cooldown_epochs", cooldown_epochs, 0),
            stability_level=check_number("stability_level", stability_level, 0, 1),
            max_global_skips=check_integer("max_global_skips", max_global_skips, 0),
            skip_reduction_factor=check_integer("skip_reduction_factor", skip_reduction_factor, 1),
            local_skip_factor=check_integer("local_skip_factor", local_skip_factor, 1),
        )
        _check_downcast(downcast_type)
        for name, flag in (("use_mpi_groups", use_mpi_groups), ("verbose", verbose)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        _check_scheduler(scheduler)
        if merge not in ("delta", "daso"):
            raise ValueError(f"merge must be 'delta' or 'daso', got {merge!r}")
        settings = make_settings(
            self,
            optimizer,
            periods,
            merge=merge,
            wire_dtype=None if downcast_type == torch.float32 else downcast_type,
            chunk=check_integer("sending_chunk_size", sending_chunk_size, 1),
            within="node",
            timeout=seconds,
        )
        self._begin(settings, scheduler, verbose)
        self._construct(optimizer, check_place(comm, model, "node"), settings)

    def _begin(self, settings: LocalSettings, scheduler: Any = None, verbose: bool = False) -> None:
        self._cycle = Cycle(settings.periods, keeps_all=settings.merge == "delta")
        self.last_batch: int | None = None
        """Index of the last batch of an epoch, counted from 0. Set it, or let the first epoch tell."""
        self.current_batch = 0
        """Index of the next batch."""
        self.scheduler = scheduler
        """What is stepped after each update, or epoch."""
        self.verbose = verbose
        """Log each decision."""
        self._scaler: Any = None
        self._scaling = False  # the scaler is about to call step() itself
        self._equal_after = 0  # the update after which all ranks were equal

    # What to look at

    @property
    def epoch(self) -> int:
        """Number of epochs that have ended."""
        return self._cycle.epoch

    @property
    def phase(self) -> str:
        """ "warm-up", "cycling" or "cool-down"."""
        return self._cycle.phase.value

    @property
    def global_skip(self) -> int:
        """B, updates between two averages among nodes; 0: they are averaged after each update."""
        return self._cycle.global_skip

    @property
    def local_skip(self) -> int:
        """L, updates between two averages within the node: of gradients if 1, of parameters if more; 0 where B is 0."""
        return self._cycle.local_skip

    @property
    def batches_to_wait(self) -> int:
        """S, updates between sending and merging."""
        return self._cycle.batches_to_wait

    @property
    def stability(self) -> Any:
        """The :class:`DetectMetricPlateau` that watches the loss."""
        return self._cycle.plateau

    # Training

    def add_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Let ``step()`` call ``scaler.step`` and ``scaler.update``."""
        if not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        self._scaler = scaler

    def _update(self, *arguments: Any, **keywords: Any) -> Any:
        if self._scaler is None or self._scaling:
            return self._update_once(*arguments, **keywords)
        self._scaling = True
        before = self._engine.updates
        try:
            result = self._scaler.step(self, *arguments, **keywords)
        finally:
            self._scaling = False
        if self._engine.updates == before:
            self.skip_update()
        self._scaler.update()
        return result

    def _update_once(self, *arguments: Any, **keywords: Any) -> Any:
        result = super()._update(*arguments, **keywords)
        if self._comm.size == 1:
            self.current_batch += 1
            self._step_scheduler()
        return result

    def _step_scheduler(self) -> None:
        """Also after an update that was skipped, which other ranks may have made: learning rates stay equal."""
        if self.scheduler is not None and not _takes_metric(self.scheduler):
            self.torch_optimizer._opt_called = True  # type: ignore[attr-defined] # or the scheduler warns
            self.scheduler.step()

    def _plan(self) -> SyncPlan:
        return self._cycle.plan(self.current_batch, self.last_batch)

    def _after_update(self, plan: SyncPlan) -> None:
        ends = self.global_skip == 0 or self.current_batch == self.last_batch
        self.current_batch += 1
        super()._after_update(plan)
        if ends:
            self._equal_after = self._engine.updates
        self._step_scheduler()

    @outside_graphs
    def epoch_loss_logic(self, loss: torch.Tensor | float, loss_globally_averaged: bool = False) -> None:
        """End an epoch: make all ranks equal, if they are not yet, and decide on B and S of the next one. Collective.

        Args:
            loss: the training loss of the epoch, on this rank.
            loss_globally_averaged: take rank 0's; otherwise the mean over ranks.

        Raises:
            RankMismatchError: on all ranks, if some have made other numbers of updates.
        """
        if not isinstance(loss_globally_averaged, bool):
            raise TypeError(f"loss_globally_averaged must be True or False, got {loss_globally_averaged!r}")
        number = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        # All decisions are made from what the header has shown to all ranks.
        if self._equal_after == self._engine.updates:
            rows = self._engine.meet(Call.EPOCH, number)
        else:
            rows = self._engine.synchronize(Call.EPOCH, number)
            self._equal_after = self._engine.updates
        losses = [row.payload for row in rows] or [number]
        mean = losses[0] if loss_globally_averaged else sum(losses) / len(losses)
        if self.last_batch is None and self.current_batch:
            self.last_batch = self.current_batch - 1
        self.current_batch = 0
        self._cycle.finish_epoch(mean)
        self._choose_stepper()
        if self.scheduler is not None and _takes_metric(self.scheduler):
            self.scheduler.step(mean)
        if self.verbose and self._comm.rank == 0:
            logger.info(
                "DASO: epoch %d ended with loss %g; next is %s with B = %d, L = %d, S = %d",
                *(self.epoch, mean, self.phase, self.global_skip, self.local_skip, self.batches_to_wait),
            )

    def synchronize(self) -> None:
        super().synchronize()
        self._equal_after = self._engine.updates

    def reset(self) -> None:
        """Merge what is on its way, make all ranks equal, and begin at the first epoch again. Collective."""
        self.synchronize()
        self._cycle.reset()
        self.last_batch = None
        self.current_batch = 0
        self._choose_stepper()
        self.zero_grad()

    # State

    def _more(self) -> dict[str, Any]:
        return {
            "cycle": self._cycle.state_dict(),
            "batch": self.current_batch,
            "last_batch": self.last_batch,
            "equal_after": self._equal_after,
        }

    def _take_more(self, more: dict[str, Any]) -> None:
        if "cycle" not in more:  # a plain torch optimizer's, or another method's
            self._cycle.reset()
            self.current_batch = self._equal_after = 0
            return
        self._cycle.load_state_dict(more["cycle"])
        self.current_batch, self.last_batch = more["batch"], more["last_batch"]
        self._equal_after = more["equal_after"]

    def __deepcopy__(self, memo: dict[int, Any]) -> DASO:
        duplicate = super().__deepcopy__(memo)
        assert isinstance(duplicate, DASO)
        memo[id(self.torch_optimizer)] = duplicate.torch_optimizer  # what the scheduler's copy schedules
        duplicate.scheduler = copy.deepcopy(self.scheduler, memo)
        duplicate._scaler = copy.deepcopy(self._scaler, memo)
        duplicate.verbose = self.verbose
        return duplicate

    def _restore(self, state: dict[str, Any], place: Any) -> None:
        self._begin(state["settings"])
        super()._restore(state, place)


def _check_downcast(downcast_type: object) -> None:
    allowed = "downcast_type must be torch.bfloat16, torch.half or torch.float"
    if not isinstance(downcast_type, torch.dtype):
        raise TypeError(f"{allowed}, got {downcast_type!r}")
    if downcast_type not in (torch.bfloat16, torch.half, torch.float):
        raise ValueError(f"{allowed}, got {downcast_type}")


def _takes_metric(scheduler: object) -> bool:
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def _check_scheduler(scheduler: object) -> None:
    if scheduler is None or isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        return
    what = "the class: make an instance of it first" if isinstance(scheduler, type) else type(scheduler).__name__
    raise TypeError(f"scheduler must be a torch learning-rate scheduler or None, got {what}")
