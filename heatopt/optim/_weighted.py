"""What users say about the numbers of samples behind their gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager

from heatopt.optim._wrapper import OptimizerWrapper
from heatopt.sync import Gradients, check_weight

__all__ = ["WeightedSamples"]


class WeightedSamples(OptimizerWrapper):
    """A wrapper whose gradients may have weights."""

    _gradients: Gradients

    def weight(self, samples: float) -> AbstractContextManager[None]:
        r"""Context for one micro-batch of ``samples`` samples (or tokens): gradients become means over all samples.

        .. math:: g = \frac{\sum_{r,k} n_{r,k} \, g_{r,k}}{\sum_{r,k} n_{r,k}}

        over the ranks :math:`r` and the contexts :math:`k` that each has entered since the gradients were cleared, by
        :meth:`zero_grad` or an update; :math:`n` is ``samples`` and :math:`g_{r,k}` what ``backward()`` inside
        delivered, of a loss that is the mean over these samples. So ranks with unequal batches, accumulated or not,
        equal one process with all samples; do not divide the loss by the number of micro-batches. A rank with 0 samples
        contributes zeros, whatever its gradients are, and may leave ``backward()`` and the context out. If nobody has
        samples the gradients are zeros where ``backward()`` was called. Equal weights, one context each, give the plain
        mean, bit for bit. With ``step(closure)`` the loss is weighted alike.

        Args:
            samples: a finite number, at least 0.

        Raises:
            TypeError: not a number.
            ValueError: negative or not finite.
            HeatoptError: contexts are nested, or a ``backward()`` outside follows before the gradients are cleared.
            RankMismatchError: from ``backward()``, on all ranks: some call it inside of a context, others outside.

        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
            >>> batch = torch.ones(5, 4)
            >>> with optimizer.weight(len(batch)):
            ...     model(batch).mean().backward()
        """
        return self._gradients.weight(check_weight(samples))
