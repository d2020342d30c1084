"""Writing, at once or in a thread. The thread never talks to other ranks; their reports are files."""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict

from heatopt._log import logger
from heatopt.checkpoint._agreement import raise_together
from heatopt.checkpoint._claim import Claim
from heatopt.checkpoint._files import MANIFEST, discard, publish, read_text, write_file
from heatopt.checkpoint._manifest import FileEntry, Manifest, render
from heatopt.checkpoint._pieces import Content
from heatopt.checkpoint._rank_file import Written, file_name, write_pieces
from heatopt.comm import Communicator
from heatopt.errors import CheckpointError, CollectiveTimeoutError, RankFailedError
from heatopt.sync import Call, meet_for

__all__ = ["SaveHandle", "Writer", "finish_pending"]

_pending: weakref.WeakKeyDictionary[Communicator, SaveHandle] = weakref.WeakKeyDictionary()

_POLL_SECONDS = 0.02
# How long a rank waits for the others once its own program has ended.
_GRACE_SECONDS = 60.0


class Writer:
    """One rank's part of a save.

    Args:
        rank: this rank.
        size: number of ranks.
        temporary: the directory to write to.
        target: the name that it gets.
        manifest: what is in it; its files and pieces are filled in when they are known.
        contents: this rank's pieces of tensors.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        temporary: str,
        target: str,
        manifest: Manifest,
        contents: list[Content],
    ) -> None:
        self.rank = rank
        self.size = size
        self._temporary = temporary
        self._target = target
        self._manifest = manifest
        self._contents = contents

    def copy_to_host(self) -> None:
        """Become independent of the memory that training changes."""
        self._contents = [content.on_host() for content in self._contents]

    def write(self) -> Written:
        """Write this rank's file."""
        written = write_pieces(os.path.join(self._temporary, file_name(self.rank)), self._contents)
        self._contents = []
        return written

    def publish(self, reports: Sequence[Written]) -> None:
        """Write the manifest and give the checkpoint its name. On rank 0, when all ranks have written."""
        manifest = self._manifest
        manifest.files = [FileEntry(file_name(rank), report.size, report.header) for rank, report in enumerate(reports)]
        for rank, report in enumerate(reports):
            for key, digest in report.hashes.items():
                name, _, start = key.rpartition(":")
                manifest.tensors[name].pieces.append((rank, int(start), 0, digest))
        self._set_ends()
        write_file(os.path.join(self._temporary, MANIFEST), [render(manifest).encode()])
        publish(self._temporary, self._target)

    def _set_ends(self) -> None:
        """A piece ends where the next one begins."""
        for entry in self._manifest.tensors.values():
            entry.pieces.sort(key=lambda piece: piece[1])
            if entry.pieces:
                starts = [piece[1] for piece in entry.pieces] + [entry.count()]
                entry.pieces = [
                    (file, start, stop, digest)
                    for (file, start, _, digest), stop in zip(entry.pieces, starts[1:], strict=True)
                ]

    # In the background ranks meet through files

    def report(self, written: Written) -> None:
        """Tell rank 0 that this rank's file is complete."""
        self._tell(asdict(written))

    def report_failure(self, error: Exception) -> None:
        """Tell the others (rank 0 them, they rank 0) that the checkpoint never will be complete, if there is a way."""
        try:
            self._tell({"error": f"{type(error).__name__}: {error}"})
        except OSError as failure:
            logger.error("rank %d cannot tell other ranks that it failed: %s", self.rank, failure)

    def _tell(self, content: dict[str, object]) -> None:
        path = self._report_path(self.rank)
        write_file(path + ".part", [json.dumps(content).encode()])
        os.rename(path + ".part", path)

    def collect(self, timeout: float, cancelled: threading.Event) -> list[Written]:
        """Wait for the reports of the other ranks.

        Raises:
            CheckpointError: one of them failed, or has not reported in time.
        """
        deadline = time.monotonic() + timeout
        ending = False
        reports = []
        for rank in range(1, self.size):
            path = self._report_path(rank)
            while not os.path.exists(path):
                if not ending and not threading.main_thread().is_alive():
                    ending = True
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                if cancelled.is_set() or time.monotonic() > deadline:
                    raise CheckpointError(f"rank {rank} has not written its part of the checkpoint {self._target}")
                time.sleep(_POLL_SECONDS)
            content = json.loads(read_text(path))
            if "error" in content:
                raise CheckpointError(f"rank {rank}: {content['error']}")
            reports.append(Written(**content))
        for rank in range(1, self.size):
            os.unlink(self._report_path(rank))
        return reports

    def wait_for_rank_0(self) -> str | None:
        """Once the program has ended: return when rank 0 has published, or say why it did not."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while os.path.isdir(self._temporary):
            if os.path.exists(self._report_path(0)):
                return str(json.loads(read_text(self._report_path(0)))["error"])
            if time.monotonic() > deadline:
                return f"rank 0 has not completed the checkpoint {self._target}"
            time.sleep(_POLL_SECONDS)
        return None

    def _report_path(self, rank: int) -> str:
        return os.path.join(self._temporary, f"report-{rank:05d}.json")

    def discard(self) -> None:
        """Remove what was written."""
        if os.path.isdir(self._temporary):
            discard(self._temporary)


class SaveHandle:
    """A save that may still be writing.

    Args:
        comm: the ranks.
        writer: this rank's part.
        claim: rank 0's to the path; released when nothing is going to be written any more.
        background: write in a thread.

    Raises:
        CheckpointError: on all ranks, if one of them cannot copy its part to host memory.
    """

    def __init__(self, comm: Communicator, writer: Writer, claim: Claim | None, background: bool) -> None:
        self._comm = comm
        self._writer = writer
        self._claim = claim
        self._finished = False
        self._error: Exception | None = None
        self._write_error: Exception | None = None
        self._written = threading.Event()
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None
        if background:
            self._copy_to_host()
            # Not a daemon: a program that ends completes its checkpoint first.
            self._thread = threading.Thread(target=self._work, name="heatopt-save")
            self._process = os.getpid()
            _pending[comm] = self
            self._thread.start()
            atexit.register(self._end_with_program)

    def wait(self) -> None:
        """Return once the checkpoint is in place. Collective; again, it does nothing.

        Raises:
            CheckpointError: on all ranks, if one of them could not write; whatever was at the path is still there.
            RankMismatchError: on all ranks, if some are in another call of an optimizer; the save goes on.
        """
        if self._finished:
            return
        if self._thread is not None:
            meet_for(self._comm, Call.END_SAVE)
        self._finished = True
        atexit.unregister(self._end_with_program)
        if _pending.get(self._comm) is self:
            del _pending[self._comm]
        try:
            if self._thread is None:
                self._write_now()
            else:
                self._written.wait()
                self._agree(self._write_error)
                self._thread.join()
                self._agree(self._error)
        except Exception as error:
            self._cancelled.set()
            if isinstance(error, (RankFailedError, CollectiveTimeoutError)):
                raise  # the others cannot be asked whether they have stopped; the next save clears up
            if self._thread is not None:
                self._thread.join()
            self._comm.exchange_objects(None, "save(): all have stopped writing")
            if self._comm.rank == 0:
                self._writer.discard()
            raise
        finally:
            if self._thread is None:
                self._release()

    def _copy_to_host(self) -> None:
        error = None
        try:
            self._writer.copy_to_host()
        except Exception as caught:  # too little memory
            error = caught
        try:
            raise_together(self._comm, error, "save(): copy to host memory")
        except BaseException:
            if self._comm.rank == 0:
                self._writer.discard()
            self._release()
            raise

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()

    def _agree(self, error: Exception | None) -> None:
        raise_together(self._comm, error, "save(): comparison of what was written")

    def _write_now(self) -> None:
        report, error = None, None
        try:
            report = self._writer.write()
        except Exception as caught:
            error = caught
        self._agree(error)
        reports = self._comm.exchange_objects(report, "save(): hashes of the files")
        if self._comm.rank == 0:
            try:
                self._writer.publish([found for found in reports if found is not None])
            except Exception as caught:
                error = caught
        self._agree(error)

    def _write_and_report(self) -> Written:
        try:
            report = self._writer.write()
            if self._comm.rank != 0:
                self._writer.report(report)
        except Exception as error:
            self._write_error = error
            if self._comm.rank != 0:
                self._writer.report_failure(error)
            raise
        finally:
            self._written.set()
        return report

    def _work(self) -> None:
        """What the thread does."""
        try:
            report = self._write_and_report()
            if self._comm.rank == 0:
                others = self._writer.collect(self._comm.timeout, self._cancelled)
                self._writer.publish([report, *others])
        except BaseException as error:  # nobody else would hear of it
            logger.error("rank %d: the save in the background failed: %s", self._comm.rank, error)
            self._error = error if isinstance(error, Exception) else CheckpointError(f"the thread ended: {error!r}")
            if self._comm.rank == 0:
                self._writer.report_failure(self._error)
        finally:
            self._release()

    def _end_with_program(self) -> None:
        """At exit, after the thread: an error that nobody has waited for ends the job, as any other error does."""
        if os.getpid() != self._process:
            return  # a forked child is no rank
        failure = None if self._error is None else f"{type(self._error).__name__}: {self._error}"
        if failure is None and self._comm.rank != 0:
            failure = self._writer.wait_for_rank_0()
        if failure is None:
            return
        try:
            self._comm.abort(f"rank {self._comm.rank}: CheckpointError: the save in the background failed: {failure}")
        except SystemExit as end:
            os._exit(int(str(end)))  # at exit an exception has no effect any more


def finish_pending(comm: Communicator) -> None:
    """Wait for the save that is still going on, if there is one. Collective.

    Raises:
        CheckpointError: it failed.
    """
    handle = _pending.get(comm)
    if handle is not None:
        handle.wait()
