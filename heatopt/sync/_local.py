"""What an optimizer needs of its parameters' gradients, and the case of one process, where nothing is to be done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from heatopt.sync._header import Call, Row
from heatopt.sync._weights import SampleWeights

__all__ = ["Gradients", "LocalGradients"]


class Gradients(ABC):
    """What an optimizer needs of the gradients of its parameters."""

    loads: int
    """Number of state dicts loaded since the ranks' states were last made equal; must agree at each update."""
    weights: SampleWeights
    """How much this rank's gradients count."""

    @abstractmethod
    def attach(self) -> None:
        """Meet the other ranks' instances, once. Collective."""

    @abstractmethod
    def settle(self, call: Call, payload: float = 0.0) -> list[Row]:
        """Return when all ranks are in ``call`` and all gradients are averages.

        Returns:
            What all ranks announced; nothing if there is nobody to ask.
        """

    @abstractmethod
    def settle_by_hand(self, weight: float) -> None:
        """Settle before ``step()`` gradients that were set by hand, and count as ``weight`` samples of this rank.

        Raises:
            HeatoptError: they have a weight already.
            ValueError: on all ranks, if all gradients are averages already.
        """

    @abstractmethod
    def weight(self, samples: float) -> AbstractContextManager[None]:
        """What backward calls inside deliver are gradients of the mean over so many samples."""

    @abstractmethod
    def consume(self) -> None:
        """An update has used the gradients: what is written into them from now on is new."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """How gradients travel."""

    @abstractmethod
    def extend(self) -> None:
        """Parameters were added to the groups. Collective."""

    @abstractmethod
    def join(self) -> AbstractContextManager[None]:
        """The context of a loop that may end earlier on some ranks; ends with :meth:`serve_joined`."""

    @abstractmethod
    def serve_joined(self) -> int:
        """Take part without data until all ranks do; return the lowest rank that trained last."""

    @abstractmethod
    def clear(self, set_to_none: bool) -> None:
        """The parameters' gradients are about to be cleared: clear what else there is of them. Local."""

    @abstractmethod
    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients of backward calls inside stay local."""


class LocalGradients(Gradients):
    """One process: its gradients are the averages.

    Args:
        groups: returns the optimizer's param_groups.
    """

    def __init__(self, groups: Callable[[], list[dict[str, Any]]]) -> None:
        self.loads = 0
        self.weights = SampleWeights(groups)

    def attach(self) -> None:
        pass

    def settle(self, call: Call, payload: float = 0.0) -> list[Row]:
        return []

    def settle_by_hand(self, weight: float) -> None:
        self.weights.require_none()
        if not weight:
            self.weights.zero_gradients()

    @contextmanager
    def weight(self, samples: float) -> Iterator[None]:
        self.weights.forget_cleared()
        with self.weights.context(samples):
            yield

    def consume(self) -> None:
        self.weights.consume()

    def report(self) -> dict[str, Any]:
        return {}

    def extend(self) -> None:
        pass

    def join(self) -> AbstractContextManager[None]:
        return nullcontext()

    def serve_joined(self) -> int:
        return 0

    def clear(self, set_to_none: bool) -> None:
        self.weights.clear()

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()
