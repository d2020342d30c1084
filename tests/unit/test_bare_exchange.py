"""``scripts/_bare_exchange.py`` moves as many bytes as the sum that it stands for."""

from __future__ import annotations

import socket
import sys

import pytest

from heatopt.comm import Communicator, ThreadWorld
from tests.support.launch import LAUNCH, REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from _bare_exchange import BareExchange

pytestmark = pytest.mark.skipif(LAUNCH.launched, reason="one process")


@pytest.mark.parametrize(("size", "per_node", "share"), [(2, 1, 3_000_001), (3, 1, 4_000_001), (4, 2, 1_500_000)])
def test_all_bytes_arrive(monkeypatch: pytest.MonkeyPatch, size: int, per_node: int, share: int) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")

    def body(comm: Communicator) -> tuple[int, bytes]:
        exchange = BareExchange(comm, 3_000_001)
        exchange._out[:] = bytes([comm.rank + 1]) * len(exchange._out)
        for _ in range(2):
            exchange._in[:] = bytes(len(exchange._in))
            exchange.start()
            exchange.finish()
            assert len(set(exchange._in.tobytes())) == 1
        exchange.close()
        return len(exchange._in), exchange._in[-1:].tobytes()

    # Rank r receives from the rank of the same number on the node before its own.
    expected = [(share, bytes([(rank - per_node) % size + 1])) for rank in range(size)]
    assert ThreadWorld(size, ranks_per_node=per_node, timeout=20).run(body) == expected
