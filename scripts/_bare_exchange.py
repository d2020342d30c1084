"""What moving bytes between nodes costs at the least: plain TCP, a thread for each direction, no MPI and no sums."""

from __future__ import annotations

import socket
import struct
from concurrent.futures import Future, ThreadPoolExecutor

from heatopt.comm import Communicator

__all__ = ["BareExchange"]

# What a call of the operating system moves: threads meet Python's lock once for so many bytes.
_PIECE_BYTES = 2**20


class BareExchange:
    """Each node sends what a ring of the nodes sends to sum gradients, and receives as much.

    All of it may leave at once, which no synchronisation of gradients can do: none hides its communication better
    behind the same computation. Ranks of a node move equal shares.

    Args:
        comm: all ranks; as many on each node.
        nbytes: of the gradients.
    """

    def __init__(self, comm: Communicator, nbytes: int) -> None:
        nodes = comm.nodes()
        n = len(nodes)
        share = 2 * (n - 1) * nbytes // (n * comm.node_size)
        self._out, self._in = memoryview(bytearray(share)), memoryview(bytearray(share))
        following = nodes[(comm.node_index + 1) % n][comm.node_rank]
        with socket.create_server(("", 0)) as server:
            address = socket.gethostbyname(socket.gethostname()), server.getsockname()[1]
            addresses = comm.all_gather_object(address)
            self._to = socket.create_connection(addresses[following], comm.timeout)
            server.settimeout(comm.timeout)
            self._from, _ = server.accept()
        for end in (self._to, self._from):
            # Not Python's time-out, with which it asks the system before each call, and gets less from each.
            end.settimeout(None)
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(comm.timeout), 0))
        self._threads = ThreadPoolExecutor(2, "bare-exchange")
        self._running: list[Future[None]] = []

    def start(self) -> None:
        """Let the bytes go."""
        self._running = [self._threads.submit(self._send), self._threads.submit(self._receive)]

    def finish(self) -> None:
        """Wait until all have been sent, and as many have come."""
        for direction in self._running:
            direction.result()

    def close(self) -> None:
        """End the threads and the connections."""
        self._threads.shutdown()
        self._to.close()
        self._from.close()

    def _send(self) -> None:
        for first in range(0, len(self._out), _PIECE_BYTES):
            self._to.sendall(self._out[first : first + _PIECE_BYTES])

    def _receive(self) -> None:
        first = 0
        while first < len(self._in):
            room = self._in[first : first + _PIECE_BYTES]
            count = self._from.recv_into(room, len(room), socket.MSG_WAITALL)
            if not count:
                raise ConnectionError("the other node has left")
            first += count
