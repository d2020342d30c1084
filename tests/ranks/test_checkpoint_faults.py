"""Whatever fails or dies while a checkpoint is written or lies on the disk: the old one, the new one, or an error."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch
from torch import nn

import heatopt
from heatopt.checkpoint import _claim, _files, _writing
from heatopt.comm import SingleCommunicator, ThreadWorld
from tests.ranks._training import adamw, assert_equal, batch, net, tensors_of, train, wrap
from tests.support.launch import LAUNCH
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

# A rank that has died cannot even report it: its thread ends with the exception that stands for its death.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
one_process = pytest.mark.skipif(LAUNCH.launched, reason="makes its own ranks")

CALLS = ("open", "write", "fsync", "close", "mkdir", "makedirs", "rename", "unlink", "rmdir", "listdir")


F = TypeVar("F", bound="FaultyOS")


class Died(BaseException):
    """The process ends here."""


class FaultyOS:
    """:mod:`os`, of which one call fails; or does nothing any more from there on, as for a process that is killed.

    Args:
        at: number of the call, from 0.
        dies: the process ends at that call; a write is half done.
    """

    def __init__(self, at: int, dies: bool) -> None:
        self._at = at
        self._dies = dies
        self._lock = threading.Lock()
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in CALLS:
            return function

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                number = len(self.calls)
                self.calls.append((name, arguments[0] if arguments else None))
            if number >= self._at if self._dies else number == self._at:
                if name == "write" and number == self._at:
                    function(arguments[0], arguments[1][: arguments[1].nbytes // 2])
                if name == "close":
                    function(*arguments)
                raise Died(name) if self._dies else OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **keywords)

        return call


class DeadRank(FaultyOS):
    """:mod:`os` of ranks of which one dies at a call: nothing that it does from there on has an effect."""

    def __init__(self, at: int) -> None:
        super().__init__(at, True)
        self.rank: int | None = None
        self._writers: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in CALLS:
            return function

        def call(*arguments: Any, **keywords: Any) -> Any:
            first = arguments[0]
            # What a rank opens or renames has its number; all else is rank 0's, which removes what others have written.
            found = None if name == "unlink" else re.search(r"(?:rank|report)-(\d{5})", str(first))
            with self._lock:
                rank = self._writers.get(first, 0) if isinstance(first, int) else int(found[1]) if found else 0
                if len(self.calls) == self._at:
                    self.rank = rank
                    if name == "write":
                        function(first, arguments[1][: arguments[1].nbytes // 2])
                self.calls.append((name, first))
            if rank == self.rank:
                raise Died(name)
            result = function(*arguments, **keywords)
            if name == "open":
                self._writers[result] = rank
            return result

        return call


@contextlib.contextmanager
def installed(faulty: F) -> Iterator[F]:
    """Let the writer use it."""
    modules: list[Any] = [_claim, _files, _writing]
    try:
        for module in modules:
            module.os = faulty
        yield faulty
    finally:
        for module in modules:
            module.os = os


def model_of(number: int) -> nn.Module:
    return net(torch.float32, seed=number)


def save(path: Path, size: int, number: int, background: bool = False) -> list[None]:
    def body(comm: Communicator) -> None:
        heatopt.save(path, model=model_of(number), extra=number, comm=comm, background=background).wait()

    return ThreadWorld(size, timeout=20.0).run(body)


def load(path: Path, size: int = 1) -> int:
    """The number that was saved; the model fits it."""

    def body(comm: Communicator) -> int:
        model = model_of(99)
        number = heatopt.load(path, model=model, comm=comm)
        assert_equal(model, model_of(number))
        return int(number)

    return ThreadWorld(size, timeout=20.0).run(body)[0]


@one_process
@pytest.mark.parametrize(
    ("size", "replaces", "dies", "background"),
    [
        pytest.param(size, replaces, dies, background, id=f"{size}-{replaces=}-{dies=}-{background=}")
        for size in (1, 2, 3)
        for replaces in (False, True)
        for dies in (False, True)
        for background in (False, True)
        # With several ranks those in the background would wait for the dead until their time is over.
        if not (dies and background and size > 1)
    ],
)
def test_every_call_of_the_writer(
    size: int, replaces: bool, dies: bool, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its calls in turn one fails, or all ranks die."""
    monkeypatch.setattr("heatopt.checkpoint._writing._POLL_SECONDS", 0.001)
    path = tmp_path / "checkpoint"
    if replaces:
        save(path, 2, 1)
    with installed(FaultyOS(10**9, False)) as counting:
        save(path, size, 2, background)
    total = len(counting.calls)
    assert total >= 13 * size
    outcomes = set()
    for at in range(total):
        shutil.rmtree(path)
        if replaces:
            save(path, 2, 1)
        raised = None
        with installed(FaultyOS(at, dies)):
            try:
                save(path, size, 2, background)
            except BaseException as error:
                raised = error
        assert raised is None or dies or isinstance(raised, heatopt.CheckpointError), raised
        if replaces or path.exists():
            found = load(path, size)
        else:
            with pytest.raises(heatopt.NoCheckpointError, match="there is no checkpoint"):
                load(path, size)
            found = 1
        outcomes.add(found)
        if not dies:
            assert found == (2 if raised is None else 1)
        save(path, 1, 3)
        assert load(path) == 3
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
    assert outcomes == {1, 2} or not replaces


@one_process
@pytest.mark.parametrize("background", [False, True])
def test_one_rank_dies_at_every_call(background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever dies, and when: the others hear of it, and there is a checkpoint."""
    monkeypatch.setattr("heatopt.checkpoint._writing._POLL_SECONDS", 0.001)
    path = tmp_path / "checkpoint"

    def body(comm: Communicator) -> None:
        handle = heatopt.save(path, model=model_of(2), extra=2, comm=comm, background=background)
        while handle._thread is not None and handle._thread.is_alive() and faulty.rank is None:
            time.sleep(0.001)
        if faulty.rank == comm.rank:  # with its thread, the process
            atexit.unregister(handle._end_with_program)
            raise Died
        handle.wait()

    dead, outcomes = set(), set()
    for at in range(10**9):
        shutil.rmtree(path, ignore_errors=True)
        save(path, 2, 1)
        raised: BaseException | None = None
        with installed(DeadRank(at)) as faulty:
            try:
                ThreadWorld(3, timeout=20.0).run(body)
            except (Died, heatopt.RankFailedError) as error:
                raised = error
            for thread in threading.enumerate():
                if thread.name == "heatopt-save":
                    thread.join()  # another job would wait until this one has ended
        if faulty.rank is None:
            break
        assert raised is not None
        dead.add(faulty.rank)
        outcomes.add(load(path))
        save(path, 1, 3)
        assert load(path) == 3
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
    assert at >= 30
    assert dead == {0, 1, 2}
    assert outcomes == {1, 2}


@one_process
@pytest.mark.parametrize("size", [1, 3])
def test_all_is_on_the_disk_before_it_has_its_name(size: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    save(path, size, 1)
    with installed(FaultyOS(10**9, False)) as counting:
        save(path, size, 2)
    names = [name for name, _ in counting.calls]
    first = names.index("rename")
    # The ranks' files, the manifest and the directory; after the renames the directory that has the names.
    assert names[:first].count("fsync") == size + 2
    assert names[first:][:5] == ["rename", "rename", "open", "fsync", "close"]
    opened = [str(argument) for name, argument in counting.calls[:first] if name == "open"]
    assert opened.pop(0) == f"{path}.lock-heatopt"
    assert all(".tmp-" in argument for argument in opened)


def test_error_of_one_rank_is_raised_on_all(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        heatopt.save(path, extra=1, comm=comm)
        last = f"rank-{comm.size - 1:05d}"
        full: set[int] = set()

        class Full:
            def __getattr__(self, name: str) -> Any:
                return getattr(os, name)

            def open(self, path: str, flags: int, mode: int = 0o777) -> int:
                descriptor = os.open(path, flags, mode)
                if last in path:
                    full.add(descriptor)
                return descriptor

            def write(self, descriptor: int, data: Any) -> int:
                if descriptor in full:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return os.write(descriptor, data)

            def close(self, descriptor: int) -> None:
                full.discard(descriptor)
                os.close(descriptor)

        comm.barrier()
        monkeypatch.setattr(_files, "os", Full())
        comm.barrier()
        with pytest.raises(heatopt.CheckpointError, match=rf"rank {comm.size - 1}: OSError: .*No space left.*/{last}"):
            heatopt.save(path, extra=2, comm=comm)
        heatopt.save(path, extra=2, comm=comm, background=True)
        with pytest.raises(heatopt.CheckpointError, match=rf"rank {comm.size - 1}: OSError: .*No space left.*/{last}"):
            heatopt.save(path, extra=3, comm=comm)
        comm.barrier()
        monkeypatch.undo()
        comm.barrier()
        assert heatopt.load(path, comm=comm) == 1
        heatopt.save(path, extra=4, comm=comm)
        assert heatopt.load(path, comm=comm) == 4
        comm.barrier()
        assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint"]

    ranks(body)


@one_process
def test_new_folders_are_on_the_disk(tmp_path: Path) -> None:
    with installed(FaultyOS(10**9, False)) as counting:
        save(tmp_path / "new" / "newer" / "checkpoint", 1, 1)
    made = counting.calls[:8]
    assert [name for name, _ in made] == ["mkdir", "open", "fsync", "close"] * 2
    folders = [str(argument) for name, argument in made if name in ("mkdir", "open")]
    assert folders == [str(tmp_path / end) for end in ("new", "", "new/newer", "new")]


def test_two_saves_at_a_time(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two communicators, and with several processes of two of them: the second is refused, the first goes on."""
    go_on = threading.Event()
    publish = _writing.publish

    def publish_late(temporary: str, path: str) -> None:
        assert path.endswith("other") or go_on.wait(20)
        publish(temporary, path)

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        comm.barrier()
        monkeypatch.setattr(_writing, "publish", publish_late)
        handle = heatopt.save(path, extra=1, comm=comm, background=True)
        alone = SingleCommunicator()
        if comm.rank == comm.size - 1:
            with pytest.raises(heatopt.CheckpointError, match=f"another save is writing {path}"):
                heatopt.save(path, extra=2, comm=alone)
            heatopt.save(path.with_name("other"), comm=alone)
            assert len(list(path.parent.glob("checkpoint.*"))) == 2
        comm.barrier()
        go_on.set()
        handle.wait()
        assert heatopt.load(path, comm=comm) == 1
        comm.barrier()
        if comm.rank == comm.size - 1:
            heatopt.save(path, extra=3, comm=alone)
            assert sorted(entry.name for entry in path.parent.iterdir()) == ["checkpoint", "other"]
        comm.barrier()
        assert heatopt.load(path, comm=comm) == 3

    ranks(body)


@one_process
def test_a_lock_of_the_dead_is_taken_over(tmp_path: Path) -> None:
    """Also where a process that was forked by them still has the file open."""
    path = tmp_path / "checkpoint"
    Path(f"{path}.lock-heatopt").touch()
    claim = _claim.Claim(str(path))
    forked = os.dup(claim._descriptor or 0)
    with pytest.raises(heatopt.CheckpointError, match="another save is writing"):
        save(path, 2, 1)
    claim.release()
    claim.release()
    save(path, 2, 2)
    os.close(forked)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("_writing.Writer.copy_to_host", "rank {}: MemoryError: too little"),
        ("_load.restore_generators", "the random generators refuse .* MemoryError: too little"),
    ],
)
def test_failure_of_one_rank(
    ranks: Ranks, what: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ranks do not meet anyway."""
    failing: list[object] = []

    def fail(*_: object) -> None:
        if threading.get_ident() in failing:
            raise MemoryError("too little")

    monkeypatch.setattr(f"heatopt.checkpoint.{what}", fail)

    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        heatopt.save(path, extra=1, comm=comm)
        if comm.rank == comm.size - 1:
            failing.append(threading.get_ident())
        act = partial(heatopt.load if "_load" in what else partial(heatopt.save, background=True), path, comm=comm)
        with pytest.raises(heatopt.CheckpointError, match=match.format(comm.size - 1)):
            act()
        comm.barrier()
        assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint"]

    ranks(body)


def test_killed_between_the_renames(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    save(path, 1, 1)
    path.rename(tmp_path / "checkpoint.old-0123abcd")
    assert load(path) == 1
    path.mkdir()  # as a script does before it starts the job again
    assert load(path) == 1
    (tmp_path / "checkpoint.tmp-0123abcd").mkdir()
    (tmp_path / "checkpoint.tmp-of-mine").mkdir()
    assert load(path) == 1
    save(path, 1, 2)
    assert load(path) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "checkpoint.tmp-of-mine"]


def test_a_save_that_fails_in_a_new_empty_folder(tmp_path: Path) -> None:
    """After another was killed between the renames."""
    path = tmp_path / "checkpoint"
    save(path, 1, 1)
    path.rename(tmp_path / "checkpoint.old-0123abcd")
    path.mkdir()
    with installed(FaultyOS(8, False)) as faulty, pytest.raises(heatopt.CheckpointError):
        save(path, 1, 2)
    assert "mkdir" in [name for name, _ in faulty.calls]
    assert load(path) == 1


def test_the_newest_of_replaced_checkpoints(tmp_path: Path) -> None:
    """Others are left where a save could not remove them."""
    path = tmp_path / "checkpoint"
    for number, name in enumerate(["b", "c", "a"]):
        save(path, 1, number)
        os.utime(path / "manifest.json", (number, number))
        path.rename(tmp_path / f"checkpoint.old-{name * 8}")
    assert load(path) == 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_checkpoint_is_not_replaced(ranks: Ranks, kind: str, tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        path = comm.broadcast_object(tmp_path) / "checkpoint"
        if comm.rank == 0:
            if kind == "folder":
                path.mkdir()
            (path / "thesis.tex" if kind == "folder" else path).write_text("years of work")
        comm.barrier()
        with pytest.raises(heatopt.CheckpointError, match="is a file" if kind == "file" else "with other files than"):
            heatopt.save(path, comm=comm)
        with pytest.raises(
            heatopt.CheckpointError, match="is a file" if kind == "file" else "manifest.json is missing"
        ):
            heatopt.load(path, comm=comm)
        assert (path / "thesis.tex" if kind == "folder" else path).read_text() == "years of work"

    ranks(body)


def test_an_empty_folder_a_link_and_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    save(path, 2, 1)
    link = tmp_path / "latest"
    link.symlink_to(path)
    save(link, 2, 2)
    assert link.is_symlink()
    assert load(path) == load(link) == 2
    shutil.copytree(path, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(path)
    assert load(tmp_path / "elsewhere" / "copy", 3) == 2
    save(tmp_path / "new" / "folders" / "checkpoint", 2, 4)


# Damage


def damaged(comm: Communicator, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    """All ranks get the error, and nothing is loaded."""
    path = comm.broadcast_object(tmp_path) / "checkpoint"
    model = net()
    optimizer = wrap(comm, adamw, model)
    train(optimizer, model, [batch(0, comm.rank)])
    heatopt.save(path, model=model, optimizer=optimizer, extra=[1.5])
    comm.barrier()
    if comm.rank == 0:
        damage(path)
    comm.barrier()
    other = net(seed=1)
    again = wrap(comm, adamw, other)
    before = [tensor.clone() for tensor in tensors_of([other, again])]
    with pytest.raises(heatopt.CheckpointError, match=message) as caught:
        heatopt.load(path, model=other, optimizer=again)
    texts = comm.all_gather_object(str(caught.value))
    assert texts == [texts[0]] * comm.size
    assert_equal([other, again], before)


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 16
    path.write_bytes(data)


FIRST = "rank-00000.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit of a tensor": (lambda p: flip(p / FIRST, -20), rf"{FIRST} is damaged: elements \d+ to \d+ of"),
    "bit of a header": (lambda p: flip(p / FIRST, 30), rf"{FIRST} is damaged: its header"),
    "length of a header": (lambda p: flip(p / FIRST, 6), rf"{FIRST} is damaged: its header"),
    "truncated": (lambda p: os.truncate(p / FIRST, 1000), rf"{FIRST} has 1000 bytes instead of \d+"),
    "empty": (lambda p: os.truncate(p / FIRST, 0), rf"{FIRST} has 0 bytes"),
    "longer": (
        lambda p: (p / FIRST).write_bytes((p / FIRST).read_bytes() + b"1"),
        rf"{FIRST} has \d+ bytes instead of",
    ),
    "missing": (lambda p: (p / FIRST).unlink(), rf"{FIRST} is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing"),
    "bit of the manifest": (lambda p: flip(p / "manifest.json", -50), r"manifest\.json is damaged"),
    "not UTF-8": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), r"manifest\.json cannot be read"),
    "truncated manifest": (lambda p: os.truncate(p / "manifest.json", 500), r"manifest\.json is damaged"),
    "empty manifest": (lambda p: os.truncate(p / "manifest.json", 0), r"manifest\.json is damaged"),
    "foreign manifest": (
        lambda p: (p / "manifest.json").write_text('{"name": "app"}'),
        "not the manifest of a heatopt",
    ),
    "list": (lambda p: (p / "manifest.json").write_text("[]"), "not the manifest of a heatopt"),
    "newer": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace('n": 1,', 'n": 2,', 1)),
        "has format version 2",
    ),
    "nothing": (shutil.rmtree, "there is no checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(ranks: Ranks, name: str, tmp_path: Path) -> None:
    ranks(lambda comm: damaged(comm, tmp_path, *DAMAGES[name]))


@one_process
@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_bit(size: int, tmp_path: Path) -> None:
    """Wherever a byte has changed, it is noticed."""
    path = tmp_path / "checkpoint"
    save(path, 2, 1)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for where in range(0, len(good), max(len(good) // 53, 1)):
            flip(file, where)
            with pytest.raises(heatopt.CheckpointError, match=file.name):
                load(path, size)
            file.write_bytes(good)
    assert load(path) == 1


@one_process
def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    """Damage in the optimizer's state does not matter to whoever loads the model alone."""
    path = tmp_path / "checkpoint"
    model = net(torch.float32)
    optimizer = adamw(model)
    train(optimizer, model, [batch(0, 0, dtype=torch.float32)])
    heatopt.save(path, model=model, optimizer=optimizer)
    data = bytearray((path / FIRST).read_bytes())
    moment = next(iter(optimizer.state.values()))["exp_avg"].numpy().tobytes()
    data[data.index(moment)] ^= 1
    (path / FIRST).write_bytes(data)
    again = net(torch.float32, seed=1)
    heatopt.load(path, model=again)
    assert_equal(again, model)
    with pytest.raises(heatopt.CheckpointError, match="optimizer/state/0/exp_avg"):
        heatopt.load(path, model=again, optimizer=adamw(again))
