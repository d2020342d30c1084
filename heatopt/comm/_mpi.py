"""MPI through mpi4py. Importing this module starts MPI, so only :func:`heatopt.world` and users of MPI do it."""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

from heatopt._log import logger
from heatopt.comm._communicator import Communicator, Words
from heatopt.comm._cuda_aware import mpi_reads_cuda_memory
from heatopt.comm._exit import end_job_on_exception, write_last_words
from heatopt.comm._settings import default_timeout
from heatopt.comm._topology import Topology
from heatopt.comm._torch import TorchCommunicator, rendezvous_store
from heatopt.comm._watchdog import Bulletin, Snapshot
from heatopt.comm._work import COMPLETED, Request

__all__ = ["MPICommunicator"]

T = TypeVar("T")

# Dtypes that MPI sums right by itself. bfloat16 has no MPI type (a native sum is garbage without an error), float16 is
# several times slower than our own sum, and Open MPI's vector code saturates 8 and 16 bit integers instead of wrapping.
_NATIVE_SUM = (torch.float32, torch.float64, torch.int32, torch.int64)

# By size of an element: what is only moved.
_OPAQUE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# The launcher collects what ranks print, and loses what is on its way when a job is aborted.
_DELIVERY_SECONDS = 0.5


class _MPIRequest(Request):
    def __init__(self, request: MPI.Request, *buffers: torch.Tensor) -> None:
        self._request = request
        self._buffers: tuple[torch.Tensor, ...] | None = buffers  # mpi4py's requests hold no reference to them

    def done(self) -> bool:
        completed = bool(self._request.Test())
        if completed:
            self._buffers = None
        return completed

    def wait(self) -> None:
        self._request.Wait()
        self._buffers = None


class _MPIBulletin(Bulletin):
    """Small messages on a communicator that only the watchdog's thread uses.

    It is never freed: ranks end their watch when they like, and what is still on its way to one that has ended must not
    meet a later communicator that got the number of this one.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._sends: list[MPI.Request] = []

    def post(self, snapshot: Snapshot) -> None:
        message = pickle.dumps(snapshot)
        for rank in range(self._comm.size):
            if rank != self._comm.rank:
                self._sends.append(self._comm.isend(message, dest=rank))

    def poll(self) -> list[Snapshot]:
        self._sends = [request for request in self._sends if not request.Test()]
        received: list[Snapshot] = []
        while self._comm.iprobe():
            received.append(pickle.loads(self._comm.recv()))
        return received

    def close(self) -> None:
        deadline = time.monotonic() + 1.0
        while self._sends and time.monotonic() < deadline:
            self._sends = [request for request in self._sends if not request.Test()]


class MPICommunicator(Communicator):
    """Ranks of an MPI communicator.

    Args:
        comm: an mpi4py intracommunicator; duplicated, so that traffic of the user's never meets heatopt's. Collective.
        timeout: seconds; default ``HEATOPT_TIMEOUT`` or 600.

    CUDA tensors travel through NCCL where each rank of a node has a GPU of its own, else through MPI: from device
    memory if a real transfer showed that this MPI can read it, else through host memory.
    """

    can_share_memory = True

    def __init__(self, comm: MPI.Intracomm | None = None, timeout: float | None = None) -> None:
        base = MPI.COMM_WORLD if comm is None else comm
        neighbours = base.Split_type(MPI.COMM_TYPE_SHARED)
        lowest = neighbours.bcast(base.rank)
        neighbours.Free()
        topology = Topology.agree(base.allgather, lowest)
        super().__init__(base.rank, topology, default_timeout() if timeout is None else timeout)
        self._open(base)
        if self.size > 1:
            end_job_on_exception(self.rank, _end_job)
            if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
                self._watch(_MPIBulletin(base.Dup()), _end_job)
            else:
                logger.warning("MPI was started without thread support, so a rank that never comes is not noticed")

    def _open(self, base: MPI.Intracomm) -> None:
        # Two lanes, because first and later stages of a collective need an order of their own.
        self._lanes = (base.Dup(), base.Dup())
        self._nccl: Communicator | None = None
        self._nccl_decided = False
        self.can_use_threads = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._queue.needs_calls = self.num_nodes > 1 and self.can_use_threads

    def abort(self, message: str, code: int = 1) -> NoReturn:
        _end_job(message, code)

    def close(self) -> None:
        super().close()
        for lane in self._lanes:
            if lane != MPI.COMM_NULL:
                lane.Free()

    def _to_wire(self, flat: torch.Tensor) -> torch.Tensor:
        if flat.device.type == "cpu" or self._nccl_of(flat) is not None or mpi_reads_cuda_memory():
            return flat
        return flat.to("cpu")

    def _is_on_device(self, flat: torch.Tensor) -> bool:
        return self._nccl_of(flat) is not None

    def _nccl_of(self, tensor: torch.Tensor) -> Communicator | None:
        """What carries a tensor on the device, if it is not MPI. Collective at the first CUDA tensor."""
        if tensor.device.type == "cuda" and not self._nccl_decided:
            self._nccl_decided = True
            own = (self.node_index, str(torch.cuda.get_device_properties(tensor.device).uuid), dist.is_nccl_available())
            gpus = self.exchange_objects(own, "choice of NCCL")
            # NCCL refuses two ranks on one GPU.
            if all(gpu[2] for gpu in gpus) and len(set(gpus)) == self.size > 1:
                self._nccl = TorchCommunicator.beside(self, rendezvous_store(self))
        return self._nccl if tensor.device.type == "cuda" else None

    def _has_native_sum(self, dtype: torch.dtype) -> bool:
        return self.size <= 2 and dtype in _NATIVE_SUM

    def _native_sum(self, flat: torch.Tensor, blocking: bool) -> Request:
        if (nccl := self._nccl_of(flat)) is not None:
            return nccl._native_sum(flat, blocking)
        buffer = _buffer(flat)
        if blocking:
            self._lanes[0].Allreduce(MPI.IN_PLACE, buffer, op=MPI.SUM)
            return COMPLETED
        return _MPIRequest(self._lanes[0].Iallreduce(MPI.IN_PLACE, buffer, op=MPI.SUM), flat)

    def _all_to_all(self, send: torch.Tensor, receive: torch.Tensor, lane: int, blocking: bool) -> Request:
        if (nccl := self._nccl_of(send)) is not None:
            return nccl._all_to_all(send, receive, lane, blocking)
        buffers = _bytes(send), _bytes(receive)
        if blocking:
            self._lanes[lane].Alltoall(*buffers)
            return COMPLETED
        return _MPIRequest(self._lanes[lane].Ialltoall(*buffers), send, receive)

    def _all_to_all_parts(
        self, send: torch.Tensor, receive: torch.Tensor, lengths: Sequence[int], blocking: bool
    ) -> Request:
        if (nccl := self._nccl_of(send)) is not None:
            return nccl._all_to_all_parts(send, receive, lengths, blocking)
        # Counted in elements: MPI's counts have 32 bits.
        opaque = _OPAQUE[send.element_size()]
        buffers = (
            [_buffer(send.reshape(-1).view(opaque)), list(lengths)],
            [_buffer(receive.reshape(-1).view(opaque)), [lengths[self.rank]] * self.size],
        )
        if blocking:
            self._lanes[0].Alltoallv(*buffers)
            return COMPLETED
        return _MPIRequest(self._lanes[0].Ialltoallv(*buffers), send, receive)

    def _all_gather(self, send: torch.Tensor, receive: torch.Tensor, lane: int, blocking: bool) -> Request:
        if (nccl := self._nccl_of(send)) is not None:
            return nccl._all_gather(send, receive, lane, blocking)
        buffers = _bytes(send), _bytes(receive)
        if blocking:
            self._lanes[lane].Allgather(*buffers)
            return COMPLETED
        return _MPIRequest(self._lanes[lane].Iallgather(*buffers), send, receive)

    def _broadcast(self, flat: torch.Tensor, root: int, blocking: bool) -> Request:
        if (nccl := self._nccl_of(flat)) is not None:
            return nccl._broadcast(flat, root, blocking)
        if blocking:
            self._lanes[0].Bcast(_bytes(flat), root=root)
            return COMPLETED
        return _MPIRequest(self._lanes[0].Ibcast(_bytes(flat), root=root), flat)

    def _exchange_words(self, words: Words) -> Words:
        received = np.empty((self.size, words.size), dtype=np.int64)
        self._lanes[0].Allgather(words, received)
        return received

    def _exchange_objects(self, obj: T) -> list[T]:
        return self._lanes[0].allgather(obj)

    def _open_group(
        self, color: int, rank: int, *, name: str, topology: Topology, members: tuple[int, ...]
    ) -> Communicator:
        base: Any = self._lanes[0].Split(color, rank)
        group = MPICommunicator.__new__(MPICommunicator)
        Communicator.__init__(group, rank, topology, self.timeout, name=name, members=members, watchdog=self._watchdog)
        group._open(base)
        base.Free()
        return group


def _end_job(message: str, code: int = 1) -> NoReturn:
    write_last_words(message)
    time.sleep(_DELIVERY_SECONDS)
    MPI.COMM_WORLD.Abort(code)
    raise SystemExit(code)


def _buffer(flat: torch.Tensor) -> Any:
    # Through NumPy a call costs 2.5 us, through DLPack 14 us; device memory only has the latter.
    return flat.numpy() if flat.device.type == "cpu" else flat


def _bytes(flat: torch.Tensor) -> Any:
    return _buffer(flat.reshape(-1).view(torch.uint8))
