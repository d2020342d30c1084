"""Global batches that are the same for every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class GlobalBatches:
    """Cuts a seeded permutation of the samples into global batches, each of them into one slice per rank.

    Batch ``k`` of epoch ``e`` holds the same samples in the same order for every number of ranks; a rank
    takes its contiguous slice. What is left at the end of an epoch is too short for a batch and is left out;
    the next permutation leaves out others.

    Args:
        samples: number of training samples.
        batch_size: samples in a batch of all ranks together.
        rank: the rank whose slices these are.
        size: number of ranks.
        seed: seed of the permutations.

    Raises:
        ValueError: the batch cannot be divided by the ranks, or is larger than the data.
    """

    def __init__(self, samples: int, batch_size: int, *, rank: int, size: int, seed: int) -> None:
        if batch_size % size:
            raise ValueError(f"a batch of {batch_size} cannot be divided by {size} ranks")
        if batch_size > samples:
            raise ValueError(f"a batch of {batch_size} is larger than the {samples} training samples")
        self.samples = samples
        self.batch_size = batch_size
        self.rank = rank
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.samples // self.batch_size

    def epoch(self, epoch: int) -> Iterator[torch.Tensor]:
        """The indices of this rank's samples, batch by batch."""
        # The generator starts anew for each epoch, so that an epoch does not depend on those before it.
        generator = torch.Generator().manual_seed(self.seed)
        generator.manual_seed(int(torch.randint(2**62, (epoch + 1,), generator=generator)[-1]))
        order = torch.randperm(self.samples, generator=generator)
        local = self.batch_size // self.size
        for batch in range(len(self)):
            start = batch * self.batch_size + self.rank * local
            yield order[start : start + local]
