"""How the ranks of a test session tell each other small things, apart from the traffic of the tests themselves."""

from __future__ import annotations

import os
import pickle
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tests.support.launch import Launch

if TYPE_CHECKING:
    from torch.distributed import Store

_CONNECT_SECONDS = 60.0
# Short at first, as ranks come close together; long later, as a late rank needs the core.
_FIRST_POLL_SECONDS = 0.00005
_POLL_SECONDS = 0.001


class MissingRanksError(Exception):
    """Some ranks did not come to the exchange in time.

    Args:
        arrived: What the other ranks sent, by rank.
        missing: The ranks that sent nothing.
    """

    def __init__(self, arrived: dict[int, Any], missing: list[int]) -> None:
        super().__init__(f"nothing came from rank {missing}")
        self.arrived = arrived
        self.missing = missing


class Exchange(ABC):
    """All ranks swap one object, in turn after turn; used by the main thread alone, except for ``abort``."""

    name: str

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def allgather(self, value: Any, timeout: float | None = None) -> list[Any]:
        """Give ``value`` to all ranks and return theirs, by rank; without ``timeout`` wait for ever.

        Raises:
            MissingRanksError: After ``timeout`` seconds a rank has not come.
        """
        arrived = {self.rank: value}
        self._post(value)
        started = time.monotonic()
        pause = _FIRST_POLL_SECONDS
        while True:
            for rank in range(self.size):
                if rank not in arrived:
                    self._take(rank, arrived)
            if len(arrived) == self.size:
                self._next_turn()
                return [arrived[rank] for rank in range(self.size)]
            if timeout is not None and time.monotonic() - started > timeout:
                raise MissingRanksError(arrived, [rank for rank in range(self.size) if rank not in arrived])
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS)

    def abort(self, code: int) -> None:
        """End all ranks, from any thread, whatever they do; this process ends at once."""
        os._exit(code)  # launchers end the whole job when a rank ends this way

    def close(self) -> None:  # noqa: B027 - most exchanges have nothing to close
        """Leave; the other ranks may still be reading what this one sent."""

    @abstractmethod
    def _post(self, value: Any) -> None:
        """Send ``value`` to all other ranks without waiting."""

    @abstractmethod
    def _take(self, rank: int, arrived: dict[int, Any]) -> None:
        """Put what ``rank`` sent this turn into ``arrived``, if it is there."""

    @abstractmethod
    def _next_turn(self) -> None:
        """All ranks have sent this turn's value."""


class SoloExchange(Exchange):
    """One process that no launcher started."""

    name = "one process"

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _post(self, value: Any) -> None:
        pass

    def _take(self, rank: int, arrived: dict[int, Any]) -> None:
        raise AssertionError("there is no other rank")

    def _next_turn(self) -> None:
        pass


class MPIExchange(Exchange):
    """Messages from rank to rank on a communicator of our own.

    No collective call: a rank learns which others are missing, and its message reaches those that are not.
    """

    def __init__(self, launch: Launch) -> None:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        if launch.size is not None and world.size != launch.size:
            raise RuntimeError(
                f"the launcher started {launch.size} ranks but mpi4py sees {world.size}: "
                "mpi4py uses another MPI library than the launcher's"
            )
        super().__init__(world.rank, world.size)
        self._world = world
        self._comm = world.Dup()
        self._sends: list[MPI.Request] = []
        self.name = MPI.Get_library_version().split(",")[0].splitlines()[0].strip()

    def _post(self, value: Any) -> None:
        # Requests hold their pickled message; they are complete once every rank took part in the turn.
        self._sends = [self._comm.isend(value, rank) for rank in range(self.size) if rank != self.rank]

    def _take(self, rank: int, arrived: dict[int, Any]) -> None:
        message = self._comm.improbe(source=rank)
        if message is not None:
            arrived[rank] = message.recv()

    def _next_turn(self) -> None:
        while not all([request.test()[0] for request in self._sends]):
            time.sleep(_FIRST_POLL_SECONDS)

    def abort(self, code: int) -> None:
        self._world.Abort(code)
        super().abort(code)


class StoreExchange(Exchange):
    """Keys in torchrun's own store, or in one that rank 0 offers; the default process group is left to the tests."""

    name = "torch.distributed"

    def __init__(self, launch: Launch) -> None:
        from torch.distributed import PrefixStore, TCPStore

        assert launch.size is not None
        super().__init__(launch.rank, launch.size)
        self._hosts_store = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        # multi_tenant: init_process_group may later ask for the same port in this process and gets the same store.
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=self._hosts_store,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Store = PrefixStore(f"heatopt-tests/{attempt}", store)
        self._turn = 0

    def _post(self, value: Any) -> None:
        self._store.set(f"{self._turn}/{self.rank}", pickle.dumps(value))

    def _take(self, rank: int, arrived: dict[int, Any]) -> None:
        key = f"{self._turn}/{rank}"
        if self._store.check([key]):
            arrived[rank] = pickle.loads(self._store.get(key))

    def _next_turn(self) -> None:
        # All ranks are in this turn, so all have read what was sent in the last one.
        if self._turn:
            self._store.delete_key(f"{self._turn - 1}/{self.rank}")
        self._turn += 1

    def close(self) -> None:
        self._store.set(f"left/{self.rank}", b"")
        if self._hosts_store:  # the store ends with this process
            left = [f"left/{rank}" for rank in range(self.size)]
            deadline = time.monotonic() + _CONNECT_SECONDS
            while not self._store.check(left) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)


def open_exchange(launch: Launch) -> Exchange:
    """Connect this process with the other ranks of its launch; collective.

    Raises:
        RuntimeError: The launcher's MPI is not the one mpi4py uses, or mpi4py is missing.
    """
    if launch.kind == "none":
        return SoloExchange()
    if launch.kind == "torch":
        return StoreExchange(launch)
    try:
        return MPIExchange(launch)
    except ImportError as error:
        raise RuntimeError(f"started by an MPI launcher, but mpi4py cannot be imported: {error}") from error
