"""A sampler that knows where it is in an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler

from heatopt.comm import Communicator, world

__all__ = ["ResumableSampler"]


class ResumableSampler(Sampler[int]):
    """Gives each rank its share of a data set; goes on in the middle of an epoch, at any number of ranks.

    In each epoch the ranks together draw every sample once, in an order that depends on ``seed`` and the epoch alone:
    rank r draws the r-th sample of the order, the (r + P)-th, and so on. Unlike torch's ``DistributedSampler`` it
    repeats no sample to make the shares equal: without ``drop_last`` some ranks may draw one more than others, so use
    :meth:`DataParallelOptimizer.join`.

    Its state is where the ranks are in the epoch, as far as they draw equally many samples per step; it is the same on
    all ranks whenever they have done the same number of steps. Samples count once they are drawn. A ``DataLoader``
    without workers draws a batch when it is asked for it; one with workers draws ahead: then tell the number of samples
    that this rank has trained on, by :meth:`set_drawn`, before the state is saved.

    Args:
        dataset_or_length: a data set with a length, or the length.
        shuffle: draw in a random order, another one in each epoch.
        seed: of that order; the same on all ranks.
        drop_last: leave out the last samples, fewer than there are ranks, so that all ranks draw equally many.
        comm: the ranks; default :func:`heatopt.world`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a negative length or seed.

    Example:
        >>> sampler = ResumableSampler(len(dataset), seed=1)
        >>> for epoch in range(sampler.epoch, 10):
        ...     sampler.set_epoch(epoch)
        ...     for batch in torch.utils.data.DataLoader(dataset, batch_size=32, sampler=sampler):
        ...         ...
    """

    def __init__(
        self,
        dataset_or_length: Sized | int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        comm: Communicator | None = None,
    ) -> None:
        if isinstance(dataset_or_length, bool) or not isinstance(dataset_or_length, (int, Sized)):
            raise TypeError(f"dataset_or_length must have a length or be one, got {dataset_or_length!r}")
        for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        if comm is not None and not isinstance(comm, Communicator):
            raise TypeError(f"comm must be a heatopt.comm.Communicator or None, got {type(comm).__name__}")
        self._length = dataset_or_length if isinstance(dataset_or_length, int) else len(dataset_or_length)
        _check_count("dataset_or_length", self._length)
        _check_count("seed", seed)
        self._shuffle = shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._comm = world() if comm is None else comm
        self._epoch = 0
        self._start = 0  # where in the order of the epoch this pass began
        self._drawn = 0  # by this rank, since then
        self._finished = False
        self._resumes = True  # the next pass begins at `_start`, not at the beginning
        self._pass: object = None  # whose samples count; None: no pass has begun since then

    @property
    def epoch(self) -> int:
        """Number of the epoch."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; the one that is going on goes on."""
        _check_count("epoch", epoch)
        if epoch != self._epoch:
            self._begin(epoch, 0)

    def set_drawn(self, samples: int) -> None:
        """Tell how many samples this rank has used of those it has drawn since the last ``iter()``."""
        _check_count("samples", samples)
        if samples > len(self):
            raise ValueError(f"samples must be at most {len(self)}, which this rank draws in all, got {samples}")
        self._drawn = samples
        self._finished = False

    def _begin(self, epoch: int, start: int) -> None:
        self._epoch = epoch
        self._start = start
        self._drawn = 0
        self._finished = False
        self._resumes = True
        self._pass = None

    def _share(self, rank: int) -> int:
        """How many samples ``rank`` draws from ``_start`` on."""
        rest = self._length - self._start
        extra = 0 if self._drop_last else int(rank < rest % self._comm.size)
        return rest // self._comm.size + extra

    def __len__(self) -> int:
        """Number of samples that this rank draws in this pass."""
        return self._share(self._comm.rank)

    def __iter__(self) -> Iterator[int]:
        if not self._resumes:
            self._begin(self._epoch, 0)
        self._resumes = False
        self._drawn = 0
        # A pass that is dropped half-way does not count any more.
        self._pass = current = object()
        own = self._order()[self._start + self._comm.rank :: self._comm.size][: len(self)]
        for drawn, index in enumerate(own, 1):
            if self._pass is current:
                self._drawn = drawn
            yield index
        if self._pass is current:
            self._finished = True

    def _order(self) -> list[int] | range:
        if not self._shuffle:
            return range(self._length)
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order: list[int] = torch.randperm(self._length, generator=generator, device="cpu").tolist()
        return order

    @property
    def position(self) -> int:
        """How many samples of this epoch all ranks together have drawn, if each has done as many steps as this one."""
        longest = self._share(0)
        if self._finished or (self._drawn == longest == len(self)):
            return self._length
        return min(self._start + self._drawn * self._comm.size, self._length)

    def state_dict(self) -> dict[str, Any]:
        """Where the ranks are. Local."""
        return {
            "epoch": self._epoch,
            "position": self.position,
            "length": self._length,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called, at any number of ranks. Local; do so on all ranks.

        Raises:
            ValueError: it is the state of another data set, seed or order.
        """
        own = self.state_dict()
        if state_dict.keys() != own.keys():
            raise ValueError(f"the state must have the keys {sorted(own)}, got {sorted(state_dict)}")
        for name in ("length", "seed", "shuffle"):
            if state_dict[name] != own[name]:
                raise ValueError(f"the state has {name}={state_dict[name]}, this sampler has {name}={own[name]}")
        _check_count("epoch", state_dict["epoch"])
        _check_count("position", state_dict["position"])
        self._begin(state_dict["epoch"], min(state_dict["position"], self._length))


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer >= 0, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
