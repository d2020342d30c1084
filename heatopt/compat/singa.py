"""SINGA's optimizers, its distributed modes, and its way to train one batch, on torch tensors and modules.

>>> model.set_optimizer(singa.SGD(lr=0.1, momentum=0.9))  # model: a singa.Model, a torch.nn.Module
>>> out, loss = model(tx, ty)

An optimizer is data-parallel by itself; :class:`DistOpt` is there for its other modes. ``lr``, ``momentum`` and
``weight_decay`` take a number or a scheduler: :class:`ExponentialDecay`, :class:`Constant`, or any other
:class:`heatopt.lr_scheduler.Schedule`, of the number of steps taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from heatopt.comm import Communicator, world
from heatopt.compat._late import LateOptimizer
from heatopt.compat._rms_prop import RootedRMSprop
from heatopt.lr_scheduler import Constant, ExponentialDecay, Schedule
from heatopt.optim import LocalSGD, broadcast_parameters
from heatopt.sync import Threshold, TopK

__all__ = ["SGD", "AdaGrad", "Adam", "Constant", "DistOpt", "ExponentialDecay", "Model", "RMSProp"]

Number = float | Schedule


class _Optimizer(LateOptimizer):
    """What SINGA's optimizers have in common.

    Args:
        make: makes the torch optimizer for parameters.
        schedules: numbers, or schedules, by torch's names of the options.
        options: of :class:`heatopt.DataParallelOptimizer`.
    """

    def __init__(
        self,
        make: Callable[[list[Any]], torch.optim.Optimizer],
        schedules: dict[str, Number],
        options: dict[str, Any],
    ) -> None:
        for name, given in schedules.items():
            first = given.value(0) if isinstance(given, Schedule) else given
            if isinstance(first, bool) or not isinstance(first, (int, float)):
                raise TypeError(f"{name} must be a number or a heatopt.lr_scheduler.Schedule, got {given!r}")
            if first < 0:
                raise ValueError(f"{name} must be >= 0, got {given!r}")
        make([torch.zeros(0)])  # torch's own checks, now
        super().__init__(make, schedules, options)

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        """Update the parameters by the averaged gradients of ``loss``, which is returned without its graph. Collective.

        The parameters are those of the module that :meth:`Model.set_optimizer` has named, or else those that require
        gradients in the graph of the first loss.
        """
        return self.update(loss)

    def backward_and_update(self, loss: torch.Tensor) -> torch.Tensor:
        """The same as calling it."""
        return self(loss)

    def prepare(self, model: torch.nn.Module) -> None:
        """Update the parameters of this module, which become rank 0's on all ranks. Collective."""
        self.attach(model.parameters(), model=model)


class SGD(_Optimizer):
    """:class:`torch.optim.SGD`: v = momentum v + g, x = x - lr v. Options: see :class:`Adam`.

    ``dampening`` is refused: SINGA applies it to the first gradient too, unlike torch; lr (1 - dampening) is the same.
    """

    def __init__(
        self,
        lr: Number = 0.1,
        momentum: Number = 0.0,
        dampening: float = 0.0,
        weight_decay: Number = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        if dampening != 0:
            raise ValueError(
                f"dampening must be 0, got {dampening!r}: SINGA applies it to the first gradient too, torch does not; "
                "multiply lr by 1 - dampening instead, which is the same as SINGA's"
            )
        some = 0.9 if isinstance(momentum, Schedule) else momentum

        def make(parameters: list[Any]) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, momentum=some, nesterov=nesterov)

        super().__init__(make, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, options)


class RMSProp(_Optimizer):
    """RMSprop that divides by the root of (average + epsilon), where torch's adds epsilon to the root.

    So this is no :class:`torch.optim.RMSprop`. Sharded, it is divided by whole tensors; fused it cannot be. Options:
    see :class:`Adam`.
    """

    def __init__(
        self,
        lr: Number = 0.1,
        rho: float = 0.9,
        epsilon: float = 1e-8,
        weight_decay: Number = 0.0,
        **options: Any,
    ) -> None:
        if not 0 <= rho <= 1:
            raise ValueError(f"rho must be in [0, 1], got {rho!r}")
        if not epsilon >= 0:
            raise ValueError(f"epsilon must be >= 0, got {epsilon!r}")

        def make(parameters: list[Any]) -> torch.optim.Optimizer:
            return RootedRMSprop(parameters, lr=0.0, alpha=rho, eps=epsilon, weight_decay=0.0)

        super().__init__(make, {"lr": lr, "weight_decay": weight_decay}, options)


class AdaGrad(_Optimizer):
    """:class:`torch.optim.Adagrad` whose sum starts at epsilon, and to whose root nothing is added.

    That is SINGA's g / sqrt(history + epsilon); the state ``sum`` is history + epsilon. Options: see :class:`Adam`.
    """

    def __init__(self, lr: Number = 0.1, epsilon: float = 1e-8, weight_decay: Number = 0.0, **options: Any) -> None:
        def make(parameters: list[Any]) -> torch.optim.Optimizer:
            return torch.optim.Adagrad(parameters, initial_accumulator_value=epsilon, eps=0.0)

        super().__init__(make, {"lr": lr, "weight_decay": weight_decay}, options)


class Adam(_Optimizer):
    """:class:`torch.optim.Adam`, whose formula is SINGA's.

    Args:
        lr: a number or a schedule.
        beta_1: decay of the average of the gradients.
        beta_2: decay of the average of their squares.
        epsilon: added to the root of the latter.
        weight_decay: times the parameter is added to its gradient: a number or a schedule.
        options: of :class:`heatopt.DataParallelOptimizer`: ``comm``, ``shard``, ``fuse``, ...

    Raises:
        TypeError: an argument of the wrong type, or an unknown keyword.
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        lr: Number = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: Number = 0.0,
        **options: Any,
    ) -> None:
        def make(parameters: list[Any]) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, betas=(beta_1, beta_2), eps=epsilon)

        super().__init__(make, {"lr": lr, "weight_decay": weight_decay}, options)


class DistOpt:
    """SINGA's distributed modes of an optimizer, of which the first call chooses one, with its arguments, for good.

    Plain, half precision, partial update and sparse. Where SINGA is given an id and the numbers of ranks, the launcher
    knows here.

    Args:
        opt: an optimizer of this module that has no parameters yet; default ``SGD()``.
        comm: the ranks; default :func:`heatopt.world`.

    Raises:
        TypeError: ``opt`` is none.
        ValueError: ``opt`` has parameters, or a ``comm``, already.
    """

    def __init__(self, opt: _Optimizer | None = None, *, comm: Communicator | None = None) -> None:
        opt = SGD() if opt is None else opt
        if not isinstance(opt, _Optimizer):
            raise TypeError(f"opt must be an optimizer of heatopt.compat.singa, got {opt!r}")
        if opt.is_attached:
            raise ValueError("opt has parameters already; give DistOpt a new one")
        self.opt = opt
        self._comm = world() if comm is None else comm
        opt.add_options(comm=self._comm)
        self._mode: str | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._comm.size

    @property
    def global_rank(self) -> int:
        """This rank's number."""
        return self._comm.rank

    @property
    def local_rank(self) -> int:
        """This rank's number on its node."""
        return self._comm.node_rank

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        """The same as :meth:`backward_and_update`."""
        return self.backward_and_update(loss)

    def backward_and_update(self, loss: torch.Tensor, threshold: int | None = None) -> torch.Tensor:
        """Update by averaged gradients. Collective.

        Args:
            loss: of this rank.
            threshold: elements, of four bytes, that travel together: the size of a bucket. The result does not depend
                on it. Default: found out by measuring.

        Returns:
            The loss, without its graph.

        Raises:
            ValueError: another mode or threshold than at first.
        """
        self._choose("backward_and_update", threshold)
        return self.opt.update(loss)

    def backward_and_update_half(
        self, loss: torch.Tensor, threshold: int | None = None, clipping: bool = False, clip_Value: float = 100.0
    ) -> torch.Tensor:
        """The same, with gradients that cross the network in half precision, ``torch.float16``. Collective.

        They are rounded where they cross it, and not within a node, where SINGA rounds all.

        Args:
            loss: of this rank.
            threshold: see :meth:`backward_and_update`.
            clipping: bound each element of this rank's gradients, before they are averaged.
            clip_Value: the bound of its absolute value.

        Returns:
            The loss, without its graph.

        Raises:
            ValueError: another mode or threshold than at first.
        """
        self._choose("backward_and_update_half", threshold, wire_dtype=torch.float16)
        return self.opt.update(loss, clip=clip_Value if clipping else None)

    def backward_and_partial_update(self, loss: torch.Tensor, threshold: int = 2097152) -> torch.Tensor:
        """Update by this rank's own gradients, then average one part of the parameters over ranks. Collective.

        The parts take turns, so that each is averaged once in as many steps as there are parts:
        :class:`heatopt.LocalSGD` with ``sync_every`` and ``fragments`` equal to their number. Ranks differ meanwhile;
        at the end of training call ``opt.wrapped.synchronize()``.

        Args:
            loss: of this rank.
            threshold: decides the number of parts: one for each parameter of more elements, and one for as many of the
                others, in the order of backward, as together have more. The parts are of about equal size.

        Returns:
            The loss, without its graph.

        Raises:
            ValueError: another mode or threshold than at first.
            TypeError: the optimizer has an option that local updates do not take.
        """
        if self._choose("backward_and_partial_update", threshold, bucket=False):
            self.opt.use(partial(_average_in_turn, threshold=threshold))
        return self.opt.update(loss)

    def backward_and_sparse_update(
        self,
        loss: torch.Tensor,
        threshold: int | None = None,
        spars: float = 0.05,
        topK: bool = False,
        corr: bool = True,
    ) -> torch.Tensor:
        """Update by averages of the elements of the gradients that matter. Collective.

        They are chosen for each parameter, where SINGA chooses among all that travel together.

        Args:
            loss: of this rank.
            threshold: see :meth:`backward_and_update`.
            spars: with ``topK`` the share of the elements that are sent, :class:`heatopt.TopK`; otherwise those of at
                least this absolute value, :class:`heatopt.Threshold`.
            topK: which of the two.
            corr: add what is not sent to the next gradient; otherwise it is lost.

        Returns:
            The loss, without its graph.

        Raises:
            ValueError: another mode or other arguments than at first, or ``spars`` is out of its range.
        """
        compression = TopK(spars, error_feedback=corr) if topK else Threshold(spars, error_feedback=corr)
        self._choose("backward_and_sparse_update", threshold, compression=compression)
        return self.opt.update(loss)

    def prepare(self, model: torch.nn.Module) -> None:
        """Update the parameters of this module, which become rank 0's on all ranks. Collective."""
        broadcast_parameters(model, comm=self._comm)
        self.opt.expect(model)

    def _choose(self, method: str, threshold: int | None, *, bucket: bool = True, **options: Any) -> bool:
        """Fix the mode at the first call, and see to it that it stays; True at that call."""
        arguments = {"threshold": threshold, **options}
        mode = f"{method}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
        if self._mode == mode:
            return False
        if self._mode is not None:
            raise ValueError(f"this DistOpt has been used with {self._mode}, and now with {mode}; make another one")
        bucket_mb = threshold * 4 / 2**20 if bucket and threshold is not None else None
        self.opt.add_options(bucket_mb=bucket_mb, **options)
        self._mode = mode
        return True


def _average_in_turn(optimizer: torch.optim.Optimizer, *, threshold: int, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of partial updates; see :meth:`DistOpt.backward_and_partial_update`."""
    sizes = [parameter.numel() for group in optimizer.param_groups for parameter in group["params"]]
    parts = _count_parts(sizes, threshold)
    return LocalSGD(optimizer, sync_every=parts, fragments=parts, **options)


def _count_parts(sizes: Sequence[int], threshold: int) -> int:
    """How many parts SINGA cuts parameters of these numbers of elements into."""
    count, gathered = 0, 0
    for size in reversed(sizes):
        if size > threshold:
            count += 1
            continue
        gathered += size
        if gathered > threshold:
            count, gathered = count + 1, 0
    return max(count + (gathered > 0), 1)


class Model(torch.nn.Module):
    """A module that trains one batch when it is called in training mode, as SINGA's ``model.Model``.

    Define ``forward`` and :meth:`train_one_batch`; the latter calls ``self.forward`` and ``self.optimizer(loss)``. In
    evaluation mode (``model.eval()``) a call is that of any :class:`torch.nn.Module`.
    """

    optimizer: Any = None

    def set_optimizer(self, optimizer: _Optimizer | DistOpt) -> None:
        """Let the optimizer update the parameters of this module, which become rank 0's on all ranks. Collective.

        Raises:
            TypeError: it is no optimizer of :mod:`heatopt.compat.singa`.
        """
        if not isinstance(optimizer, (_Optimizer, DistOpt)):
            raise TypeError(f"optimizer must be one of heatopt.compat.singa, got {optimizer!r}")
        optimizer.prepare(self)
        self.optimizer = optimizer

    def compile(
        self, inputs: Sequence[Any] = (), is_train: bool = True, use_graph: bool = False, sequential: bool = False
    ) -> None:
        """Set training or evaluation mode; nothing else, for a module here has its parameters when it is made.

        Not torch's :meth:`torch.nn.Module.compile`: for that call ``torch.compile`` in :meth:`train_one_batch`.

        Args:
            inputs: examples, from which SINGA learns the sizes of the layers.
            is_train: training mode.
            use_graph: of SINGA's execution; without effect on results there, and without meaning here.
            sequential: the same.
        """
        self.train(is_train)

    def train_one_batch(self, *batch: Any) -> Any:
        """Compute the loss of a batch, call ``self.optimizer(loss)``, and return output and loss."""
        raise NotImplementedError(f"{type(self).__name__} must define train_one_batch")

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        if self.training:
            return self.train_one_batch(*inputs, **keywords)
        return super().__call__(*inputs, **keywords)


def __dir__() -> list[str]:
    return list(__all__)
