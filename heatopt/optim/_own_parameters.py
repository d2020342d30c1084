"""How users write into parameters that the ranks of a node may have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from heatopt.optim._weighted import WeightedSamples
from heatopt.sharding import ParameterMemory
from heatopt.sync import Call

__all__ = ["WritableParameters"]


class WritableParameters(WeightedSamples):
    """A wrapper whose parameters may be those of all ranks of the node."""

    _memory: ParameterMemory

    @contextmanager
    def own_parameters(self) -> Iterator[None]:
        """Context in which each rank's parameters are its own, to be written into. Collective at its end.

        With ``parameters_per_node="shared"`` each rank gets memory for all of them; at the end all ranks share those of
        rank 0 again. Whatever is done to them inside (``load_state_dict``, ``clamp_``, an exchange with averages) is to
        be done on all ranks, as without sharing, where this does nothing. No ``step()`` inside.

        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
            >>> with optimizer.own_parameters(), torch.no_grad():
            ...     _ = model.weight.clamp_(-1, 1)
        """
        with self._memory.apart():
            yield
        if self._memory.is_shared:
            self._gradients.settle(Call.STATE)
            self._memory.hold(self._parameters())
