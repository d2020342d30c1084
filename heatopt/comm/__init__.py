"""Who talks to whom: communicators of one process, of MPI, of torch.distributed and of threads.

Only this package imports mpi4py and torch.distributed, and each only when a communicator of that kind is made.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from heatopt.comm._communicator import Communicator, NodeGroups
from heatopt.comm._launch import detect_launch, world
from heatopt.comm._node_reduction import BucketMemory, ReduceOptions
from heatopt.comm._settings import check_timeout
from heatopt.comm._shared_memory import SharedBlock
from heatopt.comm._simulated import Passage, SimulatedCommunicator, SimulatedWorld
from heatopt.comm._single import SingleCommunicator
from heatopt.comm._threads import ThreadCommunicator, ThreadWorld
from heatopt.comm._topology import Topology
from heatopt.comm._virtual_network import VirtualNetwork
from heatopt.comm._work import Handle, Work

if TYPE_CHECKING:
    from heatopt.comm._mpi import MPICommunicator
    from heatopt.comm._torch import TorchCommunicator, rendezvous_store

__all__ = [
    "BucketMemory",
    "Communicator",
    "Handle",
    "MPICommunicator",
    "NodeGroups",
    "Passage",
    "ReduceOptions",
    "SharedBlock",
    "SimulatedCommunicator",
    "SimulatedWorld",
    "SingleCommunicator",
    "ThreadCommunicator",
    "ThreadWorld",
    "Topology",
    "TorchCommunicator",
    "VirtualNetwork",
    "Work",
    "check_timeout",
    "detect_launch",
    "rendezvous_store",
    "world",
]

# Importing mpi4py.MPI starts MPI, so these modules are loaded at the first use of their names.
_ON_DEMAND = {
    "MPICommunicator": "heatopt.comm._mpi",
    "TorchCommunicator": "heatopt.comm._torch",
    "rendezvous_store": "heatopt.comm._torch",
}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
