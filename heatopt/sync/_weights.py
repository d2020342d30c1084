"""How much each rank's gradients count: means over samples where ranks have unequal numbers of them.

[Note: Weights]
A rank's gradients have a weight: the samples, or tokens, that they are means of. Since they were cleared,

    p.grad = sum_k n_k g_k / sum_k n_k,        weight = sum_k n_k,

over the rank's micro-batches k, which are the contexts that it has entered: what was there shrinks when a context is
entered, and what backward delivers inside is scaled before it is added. A reduction replaces ``p.grad`` by the mean
weighted by the ranks' weights, and leaves the weights alone, so it may be repeated like a plain one: the mean over all
samples of all ranks stays what it is. Clearing the gradients, or an update, ends the sum.

The weights travel in headers (see [Note: Headers]), in double precision, so every rank knows all of them before it
launches a bucket: no message more, none longer, than without weights, and no count that a bucket of a half type would
round. Only where other ranks' headers are of another optimizer does a reduction take one more exchange, of the weights.

Each rank multiplies its part of the bucket by its weight over the largest one, at most 1, and the sum is divided by the
sum of these. So nothing overflows that did not without weights, and ranks of equal weight multiply by 1: their mean is
the plain one, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch

from heatopt.errors import HeatoptError, RankMismatchError
from heatopt.sync._graphs import never_compiled

__all__ = ["NO_WEIGHT", "Mean", "SampleWeights", "check_weight", "mean_of"]

NO_WEIGHT = -1.0
"""In place of a weight: the rank has delivered nothing."""
_PLAIN = math.nan  # in place of a weight: the rank has delivered gradients without one


class Mean(NamedTuple):
    """How gradients of all ranks become their mean: the sum of ``shares[r] * g_r``, over ``divisor``."""

    divisor: float
    shares: tuple[float, ...]
    """By rank; 0 for a rank whose values, whatever they are, do not count."""
    total: float = 0.0
    """Sum of the weights; 0 if there are none."""


def mean_of(weights: Sequence[float | None]) -> Mean:
    """The mean over ranks of these weights; None stands for a rank that is in ``join()``.

    Without any weight, or if all are 0, each rank counts alike.

    Raises:
        RankMismatchError: some ranks have given weights, others have gradients without.
    """
    given = {rank: weight for rank, weight in enumerate(weights) if weight is not None and weight >= 0}
    if given:
        for rank, weight in enumerate(weights):
            if weight is not None and math.isnan(weight):
                raise RankMismatchError(
                    f"rank {next(iter(given))} gave its gradients a weight, rank {rank} called backward() without; use "
                    "`with optimizer.weight(n):` on all ranks or on none (n = 0 on a rank that has no samples)"
                )
    largest = max(given.values(), default=0.0)
    if not largest:
        return Mean(sum(weight is not None for weight in weights), (1.0,) * len(weights))
    shares = tuple(given.get(rank, 0.0) / largest for rank in range(len(weights)))
    return Mean(math.fsum(shares), shares, math.fsum(given.values()))


def check_weight(weight: object) -> float:
    """Return a user's weight.

    Raises:
        TypeError: not a number.
        ValueError: negative or not finite.
    """
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(f"weight must be a number of samples or tokens, at least 0, got {weight!r}")
    number = float(weight)
    if not 0 <= number < math.inf:
        raise ValueError(f"weight must be a finite number of samples or tokens, at least 0, got {weight!r}")
    return number


class SampleWeights:
    """The weight of one rank's gradients; see [Note: Weights].

    Args:
        groups: returns the optimizer's param_groups.
    """

    def __init__(self, groups: Callable[[], list[dict[str, Any]]]) -> None:
        self._groups = groups
        self._open: float | None = None  # weight of the context that has been entered
        self.spent = NO_WEIGHT
        """Weight of the gradients that the last update has used; or that they had none."""
        self.by_hand = False
        """True while the weight is one that step() was given, which all ranks must do or none."""
        self.reset()

    def consume(self) -> None:
        """An update has used the gradients."""
        none = 0.0 if self._total > 0 else NO_WEIGHT  # others have had samples, this rank has not
        self.spent = none if self._weight is None else self._weight
        self.reset()

    def reset(self) -> None:
        """What comes starts a new sum."""
        self._weight: float | None = None  # None until a context is entered
        self._reduced_weight = 0.0  # what it was at the last reduction
        self._total = 0.0  # of all ranks, at the last reduction
        self._plain = False  # there are gradients without a weight which no reduction has seen
        self._has_gradients = False  # there were some when a context or a reduction ended
        self._arriving = 1.0 if self._open is None or self._open else 0.0  # factor of what backward delivers

    def clear(self) -> None:
        """The gradients have been cleared; inside of a context its samples are those that come."""
        self.reset()
        self._weight = self._open

    @property
    def word(self) -> float:
        """What this rank tells the others: its weight, or why it has none."""
        if self._weight is not None:
            return self._weight
        return _PLAIN if self._plain else NO_WEIGHT

    @property
    def in_use(self) -> bool:
        """True if gradients, here or on other ranks, have weights."""
        return self._weight is not None or self._total > 0

    @property
    def reduced_share(self) -> float:
        """Which part of this rank's weight the last reduction has seen; 1 without weights."""
        return self._reduced_weight / self._weight if self._total and self._weight else 1.0

    def require_none(self) -> None:
        """Raise HeatoptError if gradients have weights."""
        if self.in_use:
            raise HeatoptError(
                "step(weight=n) is for gradients that were set by hand, but these have a weight already, by `with "
                "optimizer.weight(n):`; call step() without one"
            )

    def note_backward(self) -> None:
        """A backward pass has begun.

        Raises:
            HeatoptError: it is outside of any context, but gradients with weights are there.
        """
        if self._open is not None:
            if self._weight is None:  # an update inside of the context has used what was there
                self._weight = self._open
            return
        if self.in_use:
            raise HeatoptError(
                "backward() without a weight, on top of gradients that have one; put it into `with "
                "optimizer.weight(n):`, or clear those by optimizer.zero_grad() first"
            )
        self._plain = True

    def note_reduction(self, total: float) -> None:
        """A reduction has brought all gradients to the mean over samples of weight ``total``."""
        self._plain = False
        self._total = total
        self._reduced_weight = self._weight or 0.0
        self._has_gradients = total > 0 and self._any_gradient()

    def forget_cleared(self) -> None:
        """Notice that gradients which were there are not: the module, or the user, has cleared them."""
        if self._has_gradients and not self._any_gradient():
            self.reset()

    @contextmanager
    def context(self, weight: float) -> Iterator[bool]:
        """One micro-batch of ``weight`` samples; gives True if gradients that were there have been scaled."""
        if self._open is not None:
            raise HeatoptError("weight() contexts of one optimizer cannot be nested; leave the outer one first")
        before = self._weight or 0.0
        after = self._weight = before + weight
        kept = before / after if after and (before or self._total) else 1.0
        if kept != 1.0:
            self._scale_gradients(kept)
        self._plain = False
        self._open = weight
        self._arriving = weight / after if weight else 0.0
        try:
            with self._scaling_arrivals():
                yield kept != 1.0
        finally:
            self._open = None
            self._has_gradients = self._any_gradient()

    @contextmanager
    def given_by_hand(self) -> Iterator[None]:
        """The weight is that of gradients which were set by hand; it ends with their reduction."""
        self.by_hand = True
        if not self._weight:
            self.zero_gradients()
        try:
            yield
        finally:
            self.by_hand = False
            self.reset()

    def zero_gradients(self) -> None:
        """Let the gradients be zeros, whatever they are: they are those of no sample."""
        self._scale_gradients(0.0)

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (parameter for group in self._groups() for parameter in group["params"])

    def _any_gradient(self) -> bool:
        return any(parameter.grad is not None for parameter in self._parameters())

    @torch.no_grad()
    def _scale_gradients(self, factor: float) -> None:
        for parameter in self._parameters():
            if parameter.grad is not None:  # sparse ones included, of which a detached copy would not be the same
                if factor:
                    parameter.grad.mul_(factor)
                else:
                    parameter.grad.zero_()

    @contextmanager
    def _scaling_arrivals(self) -> Iterator[None]:
        """Scale what backward adds to ``p.grad``, and nothing else: results of ``autograd.grad`` stay what they are."""
        if self._arriving == 1.0:
            yield
            return

        @never_compiled
        def scale(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
            factor = self._arriving  # 0: the mean over no samples may be no number
            return tuple(g if g is None else g * factor if factor else torch.zeros_like(g) for g in gradients)

        # The nodes that accumulate. They and their hooks live while somebody has them: this list, until the end.
        nodes: list[Any] = [
            torch.autograd.graph.get_gradient_edge(parameter).node
            for parameter in self._parameters()
            if parameter.requires_grad
        ]
        handles = [node.register_prehook(scale) for node in nodes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
