"""Handles of works in the background whose tensors are on a device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from heatopt.comm._work import Handle, Work

__all__ = ["HostWork", "StreamWork"]


class HostWork(Handle[None]):
    """A work on a copy in host memory, which whoever waits brings back, in the order of its own stream.

    Args:
        work: on ``host``.
        host: the copy.
        target: what gets the result.
    """

    def __init__(self, work: Work[None], host: torch.Tensor, target: torch.Tensor) -> None:
        self._work = work
        self._host: torch.Tensor | None = host
        self._target = target

    def done(self) -> bool:
        return self._work.done()

    def wait(self) -> None:
        self._work.wait()
        if self._host is not None:
            self._target.copy_(self._host)
            self._host = None


class StreamWork(Handle[None]):
    """A collective that the device carries by itself, on a stream of its own, beside what others of its streams do.

    All of its operations are enqueued at once, so their order is that of the launches, on all ranks.

    Args:
        flat: what is read and written.
        enqueue: starts the operations on the current stream.
    """

    def __init__(self, flat: torch.Tensor, enqueue: Callable[[], None]) -> None:
        self._stream = torch.cuda.Stream(flat.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(flat.device))
        flat.record_stream(self._stream)  # its memory is not used again before, whoever lets go of it
        with torch.cuda.stream(self._stream):
            enqueue()

    def done(self) -> bool:
        return self._stream.query()

    def wait(self) -> None:
        """Let the current stream wait; the process goes on."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
