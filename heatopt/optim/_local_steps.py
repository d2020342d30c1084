"""The steps of local-update methods, and how many samples are behind each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from heatopt.comm import Communicator
from heatopt.local import PLAIN, LocalSettings
from heatopt.optim._closures import Closure
from heatopt.optim._data_parallel import DataParallelOptimizer
from heatopt.optim._weighted import WeightedSamples
from heatopt.sync import NO_WEIGHT, Gradients, LocalGradients, check_weight

__all__ = ["LocalSteps", "Place"]


class Place:
    """Where an optimizer is: the communicators, and the model.

    Args:
        comm: all ranks.
        model: gives names and buffers; may be None.
        within: the ranks of this rank's replica, or None.
        nested: groups within which parameters are averaged more often.
    """

    def __init__(
        self,
        comm: Communicator,
        model: torch.nn.Module | None,
        within: Communicator | None = None,
        nested: Sequence[Communicator] = (),
    ) -> None:
        self.comm = comm
        self.model = model
        self.within = within
        self.nested = tuple(nested)


class LocalSteps(WeightedSamples):
    """A wrapper whose updates are made by the wrapped optimizer, or by one that averages gradients within a group."""

    _place: Place
    _settings: LocalSettings
    _stepper: torch.optim.Optimizer
    """Who makes the next update."""
    _own_gradients: LocalGradients
    """Where the wrapped optimizer makes it."""
    _gradients: Gradients
    """Those, or the group's."""
    _given: float | None = None
    """The weight of the step that is being made."""

    def step(self, closure: Closure | None = None, *, weight: float | None = None) -> Any:
        """Update the parameters, and average as the method says. Collective.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()`` and returns the loss. Hooks see it as
                it is given.
            weight: the number of samples or tokens, at least 0, behind gradients that were set by hand, or that no
                rank has averaged yet. For what ``backward()`` averages, and in closures, there is :meth:`weight`.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            RankMismatchError: other ranks are in another call, or have made other numbers of updates; or some updates
                have had a weight and others not.
            TypeError: the weight is not a number.
            ValueError: it is negative or not finite, it is given with a closure, all gradients are averages already, or
                the method knows no weights, as for :meth:`weight`.
            HeatoptError: the gradients have a weight by :meth:`weight` already.
        """
        if weight is None:
            return super().step(closure)
        if closure is not None:
            raise ValueError("step(closure, weight=n): use `with optimizer.weight(n):` inside the closure")
        self._refuse_weights()
        self._given = check_weight(weight)
        try:
            return super().step()
        finally:
            self._given = None

    step.hooked = True  # type: ignore[attr-defined]  # as in the base class

    def weight(self, samples: float) -> AbstractContextManager[None]:
        r"""Context for one micro-batch of ``samples`` samples (or tokens), at least 0.

        Gradients become means over all samples of this rank; where a group averages them, of the group. Parameters
        become means weighted by samples, as in federated averaging (McMahan et al., arXiv 1602.05629):

        .. math:: \bar x = \sum_r \frac{n_r}{n} x_r

        with :math:`n_r` those behind the updates that rank r has made since what is averaged was averaged before, and
        n their sum. A rank with 0 samples takes what the others have. If nobody has samples, ranks count alike. Moments
        and buffers are averaged over all ranks alike.

        To be given for all updates of all ranks or for none. Without a gradient an update needs none.

        Raises:
            TypeError: not a number.
            ValueError: negative or not finite; ``error_feedback``, ``nested`` groups, or DASO with ``merge="daso"``.
            HeatoptError: contexts are nested.
            RankMismatchError: from the next average, on all ranks: some updates have had a weight and others not.

        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = heatopt.LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), sync_every=8)
            >>> batch = torch.ones(5, 4)
            >>> with optimizer.weight(len(batch)):
            ...     model(batch).mean().backward()
            >>> optimizer.step()
        """
        self._refuse_weights()
        return super().weight(samples)

    def _refuse_weights(self) -> None:
        reasons = {
            "error_feedback=True: what a rank has kept back is of samples of other averages": (
                self._settings.error_feedback
            ),
            "nested groups: they do not know the samples of each other": bool(self._place.nested),
            'merge="daso": the published formula counts nodes alike; use merge="delta"': self._settings.merge == "daso",
        }
        for reason, found in reasons.items():
            if found:
                raise ValueError(f"{type(self).__name__} takes no weights of samples with {reason}")

    def _step_weighted(self, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(self._stepper, DataParallelOptimizer):
            return self._stepper.step(*arguments, weight=self._given, **keywords)
        if self._given is not None:
            self._gradients.settle_by_hand(self._given)
        result = self._stepper.step(*arguments, **keywords)
        self._gradients.consume()
        return result

    def _samples_used(self) -> float:
        """How many samples the update that has just been made had, as the engine counts them."""
        spent = self._gradients.weights.spent if self._given is None else self._given
        if spent != NO_WEIGHT:
            return spent
        alone = not isinstance(self._stepper, DataParallelOptimizer)
        without = alone and all(p.grad is None for group in self.param_groups for p in group["params"])
        return NO_WEIGHT if without else PLAIN
