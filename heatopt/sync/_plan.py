"""Which parameter's gradient travels in which bucket, agreed by all ranks, and what of it has not travelled yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch

from heatopt.buckets import Bucket, GradientBucket, ParameterSpec, gradient_dtype, plan_buckets
from heatopt.comm import BucketMemory, Communicator
from heatopt.errors import HeatoptError, RankMismatchError
from heatopt.sync._cleared import ClearedGradients
from heatopt.sync._coordinator import OwnedOptions
from heatopt.sync._fingerprint import (
    Fingerprint,
    ParameterPrint,
    first_difference,
    numeric_options,
    options_hash,
    printable_options,
)
from heatopt.sync._header import ALL, REPLAN, SPARSE, bucket_bit
from heatopt.sync._residuals import Residuals
from heatopt.sync._settings import SyncSettings
from heatopt.sync._shards import GradientShards
from heatopt.sync._tuning import DEFAULT
from heatopt.sync._weights import SampleWeights

__all__ = ["GradientPlan"]


class GradientPlan:
    """The parameters of one optimizer and the buckets that their gradients live in.

    Args:
        groups: returns the optimizer's param_groups.
        names: name of parameters by ``id``, for messages; others are called by their group and position.
        settings: what the user chose.
        shards: what this rank keeps of the gradients, where they are sharded.
        residuals: what it has not sent of them, where they are compressed.
    """

    def __init__(
        self,
        groups: Callable[[], list[dict[str, Any]]],
        names: dict[int, str],
        settings: SyncSettings,
        shards: GradientShards,
        residuals: Residuals,
    ) -> None:
        self._groups = groups
        self._names = names
        self._settings = settings
        self.shards = shards
        self.residuals = residuals
        self.weights = SampleWeights(groups)
        """How much the gradients count."""
        self.parameters: list[torch.Tensor] = []
        self.names: list[str] = []
        self.buckets: list[GradientBucket] = []
        self.bucket_mb = settings.bucket_mb or DEFAULT.bucket_mb
        """Size of the buckets that :meth:`lay_out` makes."""
        self.memories: list[BucketMemory] = []
        """What the buckets live in."""
        self.descriptions: list[str] = []
        """Number and first names of each bucket, for messages."""
        self.places: dict[int, tuple[int, int]] = {}
        """Bucket number, and position in it, by parameter index."""
        self.sparse: dict[int, torch.Tensor | None] = {}
        """By index of the parameters with sparse gradients: the gradient that the last reduction left."""
        self.unplanned: set[int] = set()
        """Parameters that have got a gradient for which the plan has no (fitting) place."""
        self.sparse_changed = False
        """True if a sparse gradient has got a contribution that no reduction has seen."""
        self._cleared = ClearedGradients(residuals)
        self._outside: list[int] = []
        self._through_node = False  # reductions use the memory of the node where buckets are in it
        self.list_parameters()
        self._cleared.watch(self.parameters)  # a copy may have been made between a reduction and the update

    def list_parameters(self) -> None:
        """Number the parameters in group order; indices of known ones do not change."""
        self.parameters, self.names = [], []
        for number, group in enumerate(self._groups()):
            given = group.get("param_names")
            for position, parameter in enumerate(group["params"]):
                fallback = given[position] if given else f"group{number}.param{position}"
                self.parameters.append(parameter)
                self.names.append(self._names.get(id(parameter), fallback))

    def require_known(self) -> None:
        """Raise unless the groups hold the parameters that they held when the plan was made."""
        found = list(chain.from_iterable(map(itemgetter("params"), self._groups())))
        if len(found) != len(self.parameters):
            raise HeatoptError(
                f"the parameter groups have {len(found)} parameters, but {len(self.parameters)} are synchronised: some "
                "were added to or removed from the wrapped optimizer itself; use the DataParallelOptimizer's "
                "add_param_group"
            )
        if not all(map(is_, found, self.parameters)):
            exchanged = [
                name for p, known, name in zip(found, self.parameters, self.names, strict=True) if p is not known
            ]
            raise HeatoptError(
                f"{exchanged[0]} in the parameter groups is not the tensor that is synchronised: it was exchanged by "
                "hand; assign to the parameter's data instead, or make a new DataParallelOptimizer"
            )

    def trainable(self) -> list[int]:
        """Indices of the parameters that require a gradient now."""
        return [index for index, parameter in enumerate(self.parameters) if parameter.requires_grad]

    def compressed(self) -> dict[str, tuple[int, torch.Tensor]]:
        """Number and tensor, by name, of the parameters that may have a residual, frozen or not; equal on all ranks."""
        sparse = {*self.sparse, *self._settings.sparse}
        return {
            name: (index, parameter)
            for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True))
            if index in self.residuals or index not in sparse
        }

    def fingerprint(self) -> Fingerprint:
        """What must be equal on all ranks."""
        group_of = [number for number, group in enumerate(self._groups()) for _ in group["params"]]
        return Fingerprint(
            self._settings.printable(),
            tuple(printable_options(group) for group in self._groups()),
            tuple(
                ParameterPrint(name, tuple(p.shape), str(p.dtype), p.device.type, group, self._manner(index))
                for index, (p, name, group) in enumerate(zip(self.parameters, self.names, group_of, strict=True))
            ),
        )

    def options(self, loads: int) -> list[OwnedOptions]:
        """Numbers that must agree before an update."""
        groups = [OwnedOptions(f"parameter group {n}", numeric_options(g)) for n, g in enumerate(self._groups())]
        return [*groups, OwnedOptions("the optimizer", tuple(self._own_options(loads).items()))]

    def options_hash(self, loads: int) -> int:
        """What :meth:`options` of all ranks are compared by."""
        return options_hash([*self._groups(), self._own_options(loads)])

    def _own_options(self, loads: int) -> dict[str, int]:
        by_hand = {"step(weight=n)": 1} if self.weights.by_hand else {}
        return {"number of load_state_dict() calls": loads, **by_hand}

    def describe(self, number: int) -> str:
        """The bucket of that number, for messages; all of them if there is none."""
        return self.descriptions[number] if number < len(self.descriptions) else f"{len(self.parameters)} parameters"

    def _manner(self, index: int) -> str:
        if index in self.sparse:
            return "sparse"
        return "dense" if index in self.places else "no"

    def lay_out(self, channel: Communicator, dense: Iterable[int], sparse: Iterable[int]) -> int:
        """Add parameters to the plan, the union over ranks, and lay out all buckets anew. Collective.

        Returns:
            The digest of the new fingerprint.

        Raises:
            RankMismatchError: the ranks' parameters differ.
        """
        with channel.in_step(f"a new plan of {self._settings.algorithm}"):
            return self._lay_out(channel, dense, sparse)

    def _lay_out(self, channel: Communicator, dense: Iterable[int], sparse: Iterable[int]) -> int:
        # Sums in rank order across nodes leave that memory aside.
        self._through_node = channel.num_nodes == 1 or not self._settings.reproducible
        self.shards.make_whole(channel, self.parameters, self.weights.reduced_share)
        wishes = channel.exchange_objects((list(dense), list(sparse)), f"new plan of {self._settings.algorithm}")
        planned = set(self.places).union(*(wish[0] for wish in wishes))
        scattered = set(self.sparse).union(*(wish[1] for wish in wishes))
        specs = [
            ParameterSpec(index, name, tuple(parameter.shape), gradient_dtype(parameter), parameter.device)
            for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True))
            if index in planned and index not in scattered
        ]
        plans = plan_buckets(specs, max(int(self.bucket_mb * 2**20), 1))
        self.places = {slot.index: (n, k) for n, plan in enumerate(plans) for k, slot in enumerate(plan.slots)}
        self.sparse = {index: self.sparse.get(index) for index in sorted(scattered)}
        self._outside = [i for i in range(len(self.parameters)) if i not in self.places and i not in self.sparse]
        self.unplanned.clear()
        # Not the groups' options: a rank in join() does not follow the others' schedules. Updates compare them.
        found = replace(self.fingerprint(), groups=())
        digests = channel.exchange_objects(found.digest(), "comparison of plans")
        if any(digest != digests[0] for digest in digests):
            raise RankMismatchError(
                f"ranks have different optimizers: {first_difference(channel.exchange_objects(found))}"
            )
        self.descriptions = [f"bucket {number}: {plan.describe()}" for number, plan in enumerate(plans)]
        if not self.shards.whole:
            self.memories, self.buckets = self.shards.make_buckets(channel, plans, self.parameters)
            return found.digest()
        self.memories = [channel.allocate(plan.numel, plan.dtype, plan.device) for plan in plans]
        self.buckets = [
            Bucket(plan, memory.own, [self.parameters[slot.index] for slot in plan.slots])
            for plan, memory in zip(plans, self.memories, strict=True)
        ]
        return found.digest()

    def report(self) -> dict[str, Any]:
        """What the buckets are."""
        plans = [bucket.plan for bucket in self.buckets]
        return {
            "shared_memory": bool(plans) and self._through_node and all(memory.shared for memory in self.memories),
            "buckets": len(plans),
            "bucket_bytes": sum(plan.numel * plan.dtype.itemsize for plan in plans),
            **({} if self.shards.whole else self.shards.report()),
            **({} if self._settings.compression is None else {"sent_bytes": self.residuals.sent_bytes}),
        }

    def replan(self, channel: Communicator) -> int:
        """Give every unplanned gradient of any rank a place. Collective; see :meth:`lay_out`."""
        sparse = [index for index in self.unplanned if _is_sparse(self.parameters[index].grad)]
        return self.lay_out(channel, sorted(self.unplanned), sparse)

    def expected(self) -> list[set[int]]:
        """By bucket: the parameters that may get a gradient now."""
        return [
            {slot.index for slot, p in zip(bucket.plan.slots, bucket.parameters, strict=True) if p.requires_grad}
            for bucket in self.buckets
        ]

    def mark_all_changed(self) -> None:
        """Let no dense gradient count as reduced."""
        for bucket in self.buckets:
            bucket.changed = True

    @contextmanager
    def weight(self, samples: float) -> Iterator[None]:
        """The context of a micro-batch of so many samples; see [Note: Weights]."""
        self.forget_cleared()
        if self.residuals.are_open and self.weights.in_use:
            raise HeatoptError(
                "weight() after compressed gradients with weights have been sent, before an update: what was not sent "
                "of them has the weights of then; put all micro-batches but the last into `with optimizer.no_sync():`"
            )
        with self.weights.context(samples) as scaled:
            if scaled:  # and on other ranks perhaps not
                self.mark_all_changed()
                self.sparse_changed = bool(self.sparse)
            yield

    def forget_cleared(self) -> None:
        """Notice that the user has cleared the gradients without the optimizer."""
        if self.shards.whole:  # otherwise their absence means that they have been reduced
            self.weights.forget_cleared()
            self.residuals.roll_back_cleared(self.parameters)

    def note_backward(self) -> None:
        """A backward pass has begun: one gradient has been accumulated."""
        self.weights.note_backward()
        self.residuals.roll_back_cleared(self.parameters)

    def note_reduction(self, total: float) -> None:
        """A reduction has brought all gradients to the mean over samples of weight ``total``."""
        self.weights.note_reduction(total)
        self._cleared.watch(self.parameters)

    def note_elsewhere(self, index: int) -> None:
        """A parameter has got a gradient that fits no slot: it has none, or the gradient is of another kind."""
        if index in self.sparse:
            self.sparse_changed = True
        else:
            self.unplanned.add(index)

    def has_one_bucket(self) -> bool:
        """True if every gradient that may come now has a place in the only bucket."""
        outside = [*self._outside, *self.sparse]
        return len(self.buckets) == 1 and not any(self.parameters[index].requires_grad for index in outside)

    def kept_mask(self) -> int:
        """Ask for new memory if somebody keeps gradients of an earlier step: O(parameters)."""
        return REPLAN if any(bucket.is_aliased() for bucket in self.buckets) else 0

    def clear(self, set_to_none: bool) -> None:
        """The parameters' gradients are about to be cleared. Local."""
        self.shards.clear(set_to_none)
        self.residuals.roll_back()
        self._cleared.stop()
        self.weights.clear()

    def consume(self) -> None:
        """An update has used the gradients."""
        self.shards.consume()
        self.residuals.commit()
        self._cleared.stop()
        self.weights.consume()
        for bucket in self.buckets:
            bucket.consume()

    def changed_mask(self) -> int:
        """What backward has delivered that no reduction has seen: O(buckets)."""
        mask = SPARSE if self.sparse_changed else 0
        for number, bucket in enumerate(self.buckets):
            if bucket.changed:
                mask |= bucket_bit(number)
        return mask | ((REPLAN | ALL) if self.unplanned else 0)

    def pending_mask(self) -> int:
        """The same, and what was set by hand: O(parameters)."""
        for bucket in self.buckets:
            if bucket.has_foreign_gradients():
                bucket.changed = True
                for slot, parameter in zip(bucket.plan.slots, bucket.parameters, strict=True):
                    if parameter.grad is not None and not bucket.fits(parameter.grad):
                        self.unplanned.add(slot.index)
        for index, final in self.sparse.items():
            gradient = self.parameters[index].grad
            self.sparse_changed |= gradient is not None and gradient is not final
        self.unplanned.update(index for index in self._outside if self.parameters[index].grad is not None)
        return self.changed_mask() | self.kept_mask()


def _is_sparse(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and gradient.layout is not torch.strided
