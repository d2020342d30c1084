"""torch.distributed's gloo and NCCL, as process groups of our own: the default group stays the user's."""

from __future__ import annotations

import itertools
import os
import pickle
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import numpy as np
import torch
import torch.distributed

from heatopt.comm._communicator import Communicator, Words
from heatopt.comm._exit import end_job_on_exception, tell_on_exit, write_last_words
from heatopt.comm._process import Process, numbering
from heatopt.comm._settings import default_timeout
from heatopt.comm._store import StoreBulletin, StoreHost, hosts_store
from heatopt.comm._topology import Topology
from heatopt.comm._work import Request

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["TorchCommunicator", "rendezvous_store"]

dist: Any = torch.distributed  # which does not export its C++ classes to type checkers

T = TypeVar("T")

# The watchdog gives up first, because it knows names; gloo's own time-out is a second line.
_GLOO_GRACE = 60.0
_YEAR = 365 * 86400.0
# Keys in a store must not repeat; all ranks make their communicators in the same order.
_worlds = itertools.count()


class _TorchRequest(Request):
    def __init__(self, work: Any, comm: TorchCommunicator, *buffers: torch.Tensor) -> None:
        self._work = work
        self._comm = comm
        self._buffers = buffers

    def done(self) -> bool:
        if not self._work.is_completed():
            return False
        self.wait()  # which is where a failure shows, and where NCCL orders the streams
        return True

    def wait(self) -> None:
        with self._comm._named_failures():
            self._work.wait()


class TorchCommunicator(Communicator):
    """Ranks that share a :class:`torch.distributed.Store`: gloo for CPU tensors, NCCL for CUDA tensors.

    CUDA tensors travel through host memory and gloo where NCCL cannot be used.

    Args:
        store: key-value store that all ranks reach; default: that of the initialised default process group.
        rank: this process's number; default: that of the default process group.
        size: number of processes; default: that of the default process group.
        timeout: seconds; default ``HEATOPT_TIMEOUT`` or 600.
        nccl: use NCCL for CUDA tensors; default: if the default group does, or a GPU is there for each rank of a node.

    Raises:
        ValueError: neither a store nor an initialised default process group.
    """

    can_share_memory = True
    can_use_threads = True

    def __init__(
        self,
        store: Store | None = None,
        rank: int | None = None,
        size: int | None = None,
        *,
        timeout: float | None = None,
        nccl: bool | None = None,
    ) -> None:
        if store is None:
            if not dist.is_initialized():
                raise ValueError(
                    "TorchCommunicator needs a store with rank and size, or an initialised default process group"
                )
            store, rank, size = (
                dist.distributed_c10d._get_default_store(),
                dist.get_rank(),
                dist.get_world_size(),
            )
            nccl = "nccl" in dist.get_backend() if nccl is None else nccl
        if rank is None or size is None:
            raise ValueError("TorchCommunicator needs rank and size with a store")
        timeout = default_timeout() if timeout is None else timeout
        self._nccl_wanted = nccl
        super().__init__(rank, Topology((0,) * size), timeout, name=f"world{next(_worlds)}")
        self._open(store)
        self._topology = Topology.agree(self._exchange_objects, socket.gethostname())
        if size > 1:
            # A connection of the watchdog's own: the main thread may block in the store.
            own = store.clone() if hasattr(store, "clone") else store
            self._keep_store()
            self._watch(StoreBulletin(own, self._name, rank), _end_job)
            end_job_on_exception(rank, _end_job)

    @classmethod
    def beside(cls, other: Communicator, store: Store) -> TorchCommunicator:
        """NCCL for the CUDA tensors of another communicator, which watches over the waits itself."""
        comm = cls.__new__(cls)
        Communicator.__init__(comm, other.rank, other._topology, other.timeout, name=f"beside {other._name}")
        comm._nccl_wanted = True
        comm._open(store)
        comm._nccl()
        return comm

    def _open(self, store: Store) -> None:
        self._store: Any = store
        self._nccl_lanes: tuple[Any, Any] | None = None
        limit = timedelta(seconds=min(self.timeout + _GLOO_GRACE, _YEAR))
        self._lanes: tuple[Any, ...] = tuple(
            dist.ProcessGroupGloo(dist.PrefixStore(f"heatopt/{self._name}/{lane}", store), self.rank, self.size, limit)
            for lane in (0, 1)
        )

    def _keep_store(self) -> None:
        """Let the store's host end last. Collective; before the watch begins, which is to end first."""
        places = self._exchange_objects((numbering(), os.getpid()))
        if not hosts_store(self.rank):
            return
        here, _ = places[self.rank]
        visible = enumerate(places) if here is not None else ()
        neighbours = {rank: Process(number) for rank, (where, number) in visible if where == here}
        tell_on_exit(StoreHost(self._store, self._name, self.size, neighbours, timeout=self.timeout).outlast)

    def abort(self, message: str, code: int = 1) -> NoReturn:
        _end_job(message, code)

    def close(self) -> None:
        super().close()
        # Their connections and threads go with them, and the connection to the store if nobody else has it.
        self._lanes = ()
        self._store = None

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Turn gloo's RuntimeError about a socket into one about a rank."""
        try:
            yield
        except RuntimeError as error:
            raise self.failure(str(error)) from error

    def _to_wire(self, flat: torch.Tensor) -> torch.Tensor:
        if flat.device.type == "cpu" or self._nccl():
            return flat
        return flat.to("cpu")

    def _is_on_device(self, flat: torch.Tensor) -> bool:
        return self._nccl()

    def _has_native_sum(self, dtype: torch.dtype) -> bool:
        return self.size <= 2 and dtype in (torch.float32, torch.float64, torch.int32, torch.int64)

    def _native_sum(self, flat: torch.Tensor, blocking: bool) -> Request:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM
        return self._start(self._lane(0, flat), "allreduce", [flat], options)

    def _all_to_all(self, send: torch.Tensor, receive: torch.Tensor, lane: int, blocking: bool) -> Request:
        return self._start(self._lane(lane, send), "alltoall_base", _bytes(receive), _bytes(send), [], [])

    def _all_to_all_parts(
        self, send: torch.Tensor, receive: torch.Tensor, lengths: Sequence[int], blocking: bool
    ) -> Request:
        sent = [length * send.element_size() for length in lengths]
        received = [sent[self.rank]] * self.size
        return self._start(self._lane(0, send), "alltoall_base", _bytes(receive), _bytes(send), received, sent)

    def _all_gather(self, send: torch.Tensor, receive: torch.Tensor, lane: int, blocking: bool) -> Request:
        return self._start(self._lane(lane, send), "_allgather_base", _bytes(receive), _bytes(send))

    def _broadcast(self, flat: torch.Tensor, root: int, blocking: bool) -> Request:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        return self._start(self._lane(0, flat), "broadcast", [_bytes(flat)], options)

    def _start(self, group: Any, name: str, *arguments: Any) -> Request:
        with self._named_failures():
            work = getattr(group, name)(*arguments)
        return _TorchRequest(work, self, *(a for a in arguments if isinstance(a, torch.Tensor)))

    def _exchange_words(self, words: Words) -> Words:
        received = np.empty((self.size, words.size), dtype=np.int64)
        self._all_gather(torch.from_numpy(words), torch.from_numpy(received), 0, True).wait()
        return received

    def _exchange_objects(self, obj: T) -> list[T]:
        data = np.frombuffer(pickle.dumps(obj), dtype=np.uint8)
        lengths = self._exchange_words(np.array([data.size], dtype=np.int64))[:, 0]
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8, device="cpu")
        padded[: data.size] = torch.from_numpy(data.copy())
        received = padded.new_empty((self.size, padded.numel()))
        self._all_gather(padded, received, 0, True).wait()
        return [pickle.loads(row[:length].numpy().tobytes()) for row, length in zip(received, lengths, strict=True)]

    def _lane(self, lane: int, tensor: torch.Tensor) -> Any:
        if tensor.device.type == "cpu":
            return self._lanes[lane]
        assert self._nccl_lanes is not None
        return self._nccl_lanes[lane]

    def _nccl(self) -> bool:
        """Open NCCL's lanes at the first CUDA tensor; False where NCCL cannot work. Collective at the first call."""
        if self._nccl_wanted is None:
            # NCCL refuses two ranks on one GPU.
            enough = dist.is_nccl_available() and torch.cuda.device_count() >= self.node_size
            self._nccl_wanted = all(self.exchange_objects(enough, "choice of NCCL"))
        if self._nccl_wanted and self._nccl_lanes is None:
            self._nccl_lanes = tuple(
                dist.ProcessGroupNCCL(
                    dist.PrefixStore(f"heatopt/nccl/{self._name}/{lane}", self._store),
                    self.rank,
                    self.size,
                    dist.ProcessGroupNCCL.Options(),
                )
                for lane in (0, 1)
            )
        return self._nccl_wanted

    def _open_group(
        self, color: int, rank: int, *, name: str, topology: Topology, members: tuple[int, ...]
    ) -> Communicator:
        group = TorchCommunicator.__new__(TorchCommunicator)
        Communicator.__init__(group, rank, topology, self.timeout, name=name, members=members, watchdog=self._watchdog)
        group._nccl_wanted = self._nccl_wanted
        group._open(self._store)
        return group


def _end_job(message: str, code: int = 1) -> NoReturn:
    write_last_words(message)
    os._exit(code)  # the launcher (torchrun) ends the other processes


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def rendezvous_store(comm: Communicator) -> Store:
    """Make a store that all ranks of ``comm`` (MPI, say) reach, hosted by its rank 0; no environment variable needed.

    ``TorchCommunicator(rendezvous_store(comm), comm.rank, comm.size)`` gives NCCL and gloo under mpirun, and
    ``torch.distributed.init_process_group(store=..., rank=..., world_size=...)`` takes it as well. Collective.
    """
    limit = timedelta(seconds=min(comm.timeout, _YEAR))
    host = _reachable_host(comm)
    master = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit) if comm.rank == 0 else None
    address = comm.broadcast_object((host, master.port) if master else None)
    if master is not None:
        return cast("Store", master)
    assert address is not None
    return cast("Store", dist.TCPStore(address[0], address[1], is_master=False, wait_for_workers=False, timeout=limit))


def _reachable_host(comm: Communicator) -> str:
    """Name under which other ranks reach this process's host."""
    return "127.0.0.1" if comm.node_size == comm.size else socket.getfqdn()
