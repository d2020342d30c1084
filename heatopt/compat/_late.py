"""Optimizers that are made before their parameters are known.

[Note: Parameters from the loss]
Hetu and SINGA find the parameters in the graph of the loss, so their constructors take none. Here that graph is read
once, at the first loss; what it has are the parameters from then on. The optimizer can only be made then, after the
forward pass, and making it broadcasts rank 0's parameters. Gradients are taken before that; if the broadcast changed
any of the parameters, these gradients belong to others: an error, on all ranks, instead of a wrong first step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

from heatopt.comm import world
from heatopt.lr_scheduler import ParamScheduler
from heatopt.optim import DataParallelOptimizer

__all__ = ["LateOptimizer", "leaves_of"]

T = TypeVar("T")
Wrap = Callable[..., torch.optim.Optimizer]

_OPTIONS = set(inspect.signature(DataParallelOptimizer.__init__).parameters) - {"self", "torch_optimizer"}


def leaves_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """All tensors that ``loss`` was computed from and that collect gradients, about in the order of their use.

    What recomputes its part of the graph in backward (re-entrant checkpointing) hides its parameters.
    """
    found: list[torch.Tensor] = [] if loss.grad_fn is not None or not loss.requires_grad else [loss]
    waiting = [loss.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.append(variable)
        waiting.extend(following for following, _ in reversed(node.next_functions))
    return found[::-1]


def _known(made: T | None) -> T:
    """What is made once the parameters are known."""
    if made is None:
        raise RuntimeError("the parameters are not known before the first loss, unless they are given (params=)")
    return made


class LateOptimizer:
    """A data-parallel optimizer and its schedules, made once the parameters are known.

    Args:
        make: makes the torch optimizer for parameters.
        schedules: of its options; counts are of steps taken, from 0.
        options: of :class:`DataParallelOptimizer`.
    """

    def __init__(
        self,
        make: Callable[[list[Any]], torch.optim.Optimizer],
        schedules: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise TypeError(
                f"unexpected keyword argument {unknown[0]!r}; allowed are its own, and of DataParallelOptimizer "
                f"{', '.join(sorted(_OPTIONS))}"
            )
        self._make = make
        self._schedules = schedules
        self._options = dict(options)
        self._wrap: Wrap = DataParallelOptimizer
        self._expected: torch.nn.Module | None = None
        self._is_part = False  # the parameters are a var_list; the graph of a loss may have others
        self._wrapped: Any = None
        self._scheduler: ParamScheduler | None = None

    @property
    def wrapped(self) -> Any:
        """The :class:`DataParallelOptimizer`, or what :meth:`use` has put in its place.

        For clipping, checkpoints and whatever else it can do.

        Raises:
            RuntimeError: the parameters are not known yet.
        """
        return _known(self._wrapped)

    @property
    def scheduler(self) -> ParamScheduler:
        """What drives the options of :attr:`wrapped`; goes into checkpoints beside it.

        Raises:
            RuntimeError: the parameters are not known yet.
        """
        return _known(self._scheduler)

    @property
    def is_attached(self) -> bool:
        """True once the parameters are known."""
        return self._wrapped is not None

    def add_options(self, **options: Any) -> None:
        """Options beside those that the user chose; None for one that is left to it.

        Raises:
            ValueError: the user has chosen one of them.
        """
        given = {name: value for name, value in options.items() if value is not None}
        for name in given.keys() & self._options.keys():
            raise ValueError(
                f"{name} is given to this optimizer, and to what it is used by: leave it out of one of them"
            )
        self._options.update(given)

    def use(self, wrap: Wrap) -> None:
        """Let ``wrap``, given the torch optimizer and the options, make what :class:`DataParallelOptimizer` makes."""
        self._wrap = wrap

    def expect(self, model: torch.nn.Module) -> None:
        """At the first loss, take the parameters from this module."""
        self._expected = model

    def attach(self, parameters: Iterable[Any], **options: Any) -> None:
        """Make the optimizer for these parameters. Collective.

        Raises:
            ValueError: it has parameters already.
        """
        if self._wrapped is not None:
            raise ValueError("this optimizer has its parameters already; make another one for others")
        self._wrapped = self._wrap(self._make(list(parameters)), **{**options, **self._options})
        self._scheduler = ParamScheduler(self._wrapped, **self._schedules)

    def update(
        self,
        loss: torch.Tensor,
        var_list: Sequence[torch.Tensor] | None = None,
        grad_loss: torch.Tensor | None = None,
        step: Callable[[], Any] | None = None,
        clip: float | None = None,
    ) -> torch.Tensor:
        """Update the parameters by the gradients of ``loss`` alone, and count the step if it was taken. Collective.

        Args:
            loss: of this rank.
            var_list: update these alone.
            grad_loss: what the gradients of ``loss`` are multiplied by.
            step: makes the step, by ``wrapped.step()``, or leaves it out.
            clip: bound of the elements of this rank's gradients, before they are averaged.

        Returns:
            The loss, without its graph.

        Raises:
            ValueError: at the first loss, the ranks' parameters differ; or ``var_list`` has others than known, or is
                left out while the loss has others than were chosen at first.
        """
        if self._wrapped is None:
            self._start_from(loss, var_list, grad_loss)
        else:
            self._require_known(leaves_of(loss) if var_list is None and self._is_part else var_list)
            self.wrapped.zero_grad()
            with nullcontext() if clip is None else self.wrapped.no_sync():
                torch.autograd.backward(loss, grad_loss, inputs=var_list)
        if clip is not None:
            torch.nn.utils.clip_grad_value_([p for group in self.wrapped.param_groups for p in group["params"]], clip)
        taken: list[bool] = []
        handle = self.wrapped.register_step_post_hook(lambda *_: taken.append(True))
        try:
            (step or self.wrapped.step)()
        finally:
            handle.remove()
        if taken:
            self.scheduler.step()
        return loss.detach()

    def _start_from(
        self, loss: torch.Tensor, var_list: Sequence[torch.Tensor] | None, grad_loss: torch.Tensor | None
    ) -> None:
        """See [Note: Parameters from the loss]."""
        if self._expected is not None:
            parameters: list[torch.Tensor] = list(self._expected.parameters())
        else:
            self._is_part = var_list is not None
            parameters = leaves_of(loss) if var_list is None else list(var_list)
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(loss, grad_loss, inputs=var_list)
        before = [parameter.detach().clone() for parameter in parameters]
        self.attach(parameters, model=self._expected)
        changed = not all(map(torch.equal, before, (parameter.detach() for parameter in parameters)))
        comm = self._options.get("comm") or world()
        if any(comm.all_gather_object(changed)):
            self.wrapped.zero_grad()
            raise ValueError(
                "the ranks started with different parameters, so the first gradients are not of rank 0's; all have "
                "those of rank 0 now: compute the loss again. To begin equal, call heatopt.broadcast_parameters(model) "
                "before the first loss, or give the parameters to the optimizer (params=)"
            )

    def _require_known(self, var_list: Sequence[torch.Tensor] | None) -> None:
        known = {id(parameter) for group in self.wrapped.param_groups for parameter in group["params"]}
        if any(id(variable) not in known for variable in var_list or ()):
            raise ValueError(
                "var_list, or the loss if there is none, has a tensor that is not among the optimizer's parameters, "
                "which are those of the first call: give all of them to the optimizer (params=), or make another one "
                "for the others"
            )
