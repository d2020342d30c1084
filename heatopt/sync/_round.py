"""One reduction of an optimizer's gradients, in which all ranks take part."""

from __future__ import annotations

from heatopt.buckets import Bucket, GradientBucket, ScatteredBucket
from heatopt.comm import Communicator, ReduceOptions, Work
from heatopt.sync._compressed import CompressedReduction
from heatopt.sync._header import SPARSE, bucket_bit
from heatopt.sync._plan import GradientPlan
from heatopt.sync._settings import SyncSettings
from heatopt.sync._sparse import average_sparse
from heatopt.sync._weights import Mean

__all__ = ["Round"]


class Round:
    """Launches buckets, waits for them, and makes the results the gradients.

    Args:
        plan: the buckets.
        settings: what the user chose.
        channel: the ranks.
        blocking: reduce buckets of CPU tensors before backward goes on.
        mean: how much each of them counts.
        contributes: False if this rank has none, and takes part with zeros.
    """

    def __init__(
        self,
        plan: GradientPlan,
        settings: SyncSettings,
        channel: Communicator,
        *,
        blocking: bool,
        mean: Mean,
        contributes: bool,
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._channel = channel
        self._blocking_on_cpu = blocking
        self.mean = mean
        self._share = mean.shares[channel.rank]
        self._contributes = contributes
        self._works: dict[int, Work[None] | CompressedReduction] = {}  # by bucket number, in the order of the launches
        plan.shards.begin_round()

    def launch(self, number: int) -> None:
        """Reduce a bucket before backward goes on, or start to."""
        self._launch(number, self._blocking(number), early=True)

    def launch_rest(self, mask: int, first: int) -> None:
        """Reduce, or start to, the buckets from ``first`` that ``mask`` names."""
        one_node = self._channel.num_nodes == 1
        for number in range(first, len(self._plan.buckets)):
            if mask & bucket_bit(number):
                # In shared memory ranks need to meet only once if all has been announced before they wait.
                together = one_node and self._plan.memories[number].shared
                self._launch(number, self._blocking(number) and not together, early=False)

    def progress(self) -> None:
        """Advance what has been launched: between nodes nothing moves without calls."""
        if self._works:
            self._channel.progress()

    def complete(self, mask: int) -> None:
        """Wait for the launched buckets, then average the sparse gradients if ``mask`` names them."""
        for number in list(self._works):
            self._finish(number)
        sparse = self._plan.sparse
        if not sparse or not mask & SPARSE:
            return
        parameters = [self._plan.parameters[index] for index in sparse]
        self._plan.sparse_changed = False
        means = average_sparse(self._channel, parameters, self.mean.divisor, self._share if self._contributes else None)
        if self._contributes:
            for index, parameter, mean in zip(list(sparse), parameters, means, strict=True):
                parameter.grad = sparse[index] = mean

    def _blocking(self, number: int) -> bool:
        # On a GPU streams overlap by themselves, at no cost.
        if self._settings.blocking is None and self._plan.buckets[number].plan.device.type != "cpu":
            return False
        return self._blocking_on_cpu

    def _launch(self, number: int, blocking: bool, *, early: bool) -> None:
        bucket = self._plan.buckets[number]
        self._make_room(number)
        if self._contributes:
            bucket.pack(detach=early)
            for index in bucket.misfits():
                self._plan.note_elsewhere(index)
            if self._share != 1.0:
                bucket.scale(self._share)
        else:
            bucket.pack_nothing()
        bucket.changed = False
        options = self._settings.reduction(blocking, self.mean.divisor)
        what = f"the reduction for {self._settings.algorithm} of {self._plan.descriptions[number]}"
        memory = self._plan.memories[number]
        work: Work[None] | CompressedReduction | None
        if isinstance(bucket, ScatteredBucket):
            work = self._channel.scatter_bucket(memory, bucket.rows.bounds, options, what)
        elif self._settings.compression is not None:
            work = self._launch_compressed(bucket, options, memory.shared, what)
        else:
            work = self._channel.reduce_bucket(memory, options, what)
        if work is None:
            self._reveal(number)
        else:
            self._works[number] = work

    def _launch_compressed(
        self, bucket: GradientBucket, options: ReduceOptions, shared: bool, what: str
    ) -> CompressedReduction | None:
        assert isinstance(bucket, Bucket)
        assert self._settings.compression is not None
        reduction = CompressedReduction(
            bucket, self._settings.compression, self._plan.residuals, self._channel, self._contributes
        )
        return None if reduction.launch(options, shared, what) else reduction

    def _make_room(self, number: int) -> None:
        """Wait for the bucket whose memory this one is to use; all ranks have launched it before."""
        turns = self._plan.shards.turns
        if turns:
            for earlier in [other for other in self._works if turns[other] == turns[number]]:
                self._finish(earlier)

    def _finish(self, number: int) -> None:
        self._works.pop(number).wait()
        self._reveal(number)

    def _reveal(self, number: int) -> None:
        if self._contributes:
            self._plan.buckets[number].reveal(self.mean.total)
