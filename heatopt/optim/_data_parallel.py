"""The optimizer that makes any torch optimizer data-parallel."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from heatopt.comm import Communicator, world
from heatopt.optim._arguments import check_arguments, listed_once, parameter_names, route_around_fused_sgd
from heatopt.optim._clip import clip_gradients
from heatopt.optim._closures import Closure, averaged
from heatopt.optim._copy import optimizer_contents, optimizer_from_contents
from heatopt.optim._own_parameters import WritableParameters
from heatopt.optim._ownership import claim, refuse_owned
from heatopt.optim._parts import assemble
from heatopt.sharding import Carried, States
from heatopt.sync import (
    Call,
    Compression,
    SyncSettings,
    broadcast_state,
    broadcast_tensors,
    check_weight,
    outside_graphs,
    start_equal,
)

__all__ = ["DataParallelOptimizer"]


class DataParallelOptimizer(WritableParameters):
    r"""Make ``torch_optimizer`` data-parallel: every rank sees the gradients' mean over all ranks.

    .. math:: g_t = \frac{1}{P} \sum_{r=0}^{P-1} \nabla f(x_{t}; B_{r,t}), \qquad x_{t+1} = \text{step}(x_t, g_t)

    With a mean loss and equal batches on each rank this is the training of one process with the whole batch, for every
    algorithm. Gradients are averages, in ``p.grad``, when ``backward()`` returns, so clipping, inspection and
    ``GradScaler`` need no extra call. ``step()`` averages what no hook saw: gradients set by hand, and those of
    ranks whose loss touched no parameter. A gradient that no rank has stays ``None``; a rank without one counts as
    zero.

    The wrapper is a :class:`torch.optim.Optimizer`; ``param_groups``, ``state`` and ``defaults`` are the wrapped
    optimizer's own objects. Construction is collective: it compares the optimizers of all ranks and broadcasts rank
    0's parameters and optimizer state. ``step``, ``synchronize``, ``clip_grad_norm_`` and ``add_param_group`` are
    collective.

    Args:
        torch_optimizer: any :class:`torch.optim.Optimizer`, with or without state.
        blocking: reduce each bucket of gradients before backward goes on (True), or while it goes on (False). The
            results are bit-identical. Default (None): whichever the first steps show to be faster; see :meth:`report`.
        model: the module that the parameters belong to: gives names for messages, broadcasts its buffers and its other
            parameters too, and tells which embeddings have sparse gradients.
        comm: the ranks; default :func:`heatopt.world`. Optimizers that are used together belong on one communicator.
        bucket_mb: size of a bucket, in MiB. The results do not depend on it. Default (None): as for ``blocking``.
        accumulation_steps: only every so many-th backward synchronises; the gradients of the ones between add up
            locally, as in plain torch, so divide the loss accordingly. ``step()`` belongs after the last of them.
        wire_dtype: ``torch.bfloat16`` or ``torch.float16``: wider gradients are rounded to it where they cross the
            network, not within a node. Each node's sum is rounded once, the nodes' sums are added in single precision,
            and the result is rounded once more: with terms of one sign the relative error is at most 2 u, where
            u = 2^-8 for bfloat16 and 2^-11 for float16 (which overflows above 65504).
        reproducible: sum in rank order across nodes too, so that the result does not depend on which ranks share a
            node. Costs the hierarchy: every rank then exchanges all its gradients with every other one.
        timeout: seconds after which a waiting rank gives up and names those that are late; 0: never.
            Default: ``HEATOPT_TIMEOUT`` or 600.
        fuse: update neighbouring parameters as one tensor, by torch's fused kernel where there is one and the group
            does not forbid it: much faster for many small parameters. Their data and states are moved into memory that
            they share (checkpoints are the same). For all algorithms but Adafactor, LBFGS, Muon and SparseAdam.
        shard: ``"state"``: each rank keeps the optimizer state of its part of the parameters alone, updates that part,
            and receives the others, with the results of ``"none"`` (the default). ``state`` shows that part; ``join()``
            makes them whole. LBFGS agrees to rounding, its inner products being sums over ranks. Not with ``fuse``.
            ``"gradients"``: each rank keeps the averaged gradients of its part alone, too, and the traffic between
            nodes is that of ``"none"``. With several ranks ``p.grad`` is then None after a synchronised ``backward()``,
            for every parameter whose gradient is not sparse: clip by :meth:`clip_grad_norm_`, clear by
            :meth:`zero_grad`. Averages add up until ``step()`` has used them. Not for LBFGS.
        parameters_per_node: ``"shared"``: the ranks of a node have the parameters (on the CPU) once, in memory that all
            of them read and each writes its part of, with the results of ``"own"`` (the default). Nothing of them
            travels within a node. Needs ``shard``. Write into them inside :meth:`own_parameters` alone.
        master_dtype: ``torch.float32`` (or float64): narrower parameters, of bfloat16 or float16, are updated in copies
            of this dtype, ``"master_weight"`` among their states, with moments of this dtype, and set to the copy
            rounded. A write to a parameter goes to its copy, too. State dicts have the copies in ``"master_weights"``,
            which plain torch optimizers ignore. Not with ``fuse``, nor for LBFGS.
        compression: :class:`heatopt.TopK`, :class:`heatopt.Threshold` or another :class:`heatopt.Compression`: of each
            dense gradient a rank sends a part, as indices and values, and adds the rest to its next one. For slow
            networks. Not with ``wire_dtype`` or ``shard="gradients"``, nor for LBFGS; nothing in one process.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, a parameter that another DataParallelOptimizer has, or a wrapped wrapper.
        RankMismatchError: on all ranks, if their optimizers differ; names the first parameter, option or setting.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = DataParallelOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model=model)
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        torch_optimizer: torch.optim.Optimizer,
        blocking: bool | None = None,
        *,
        model: torch.nn.Module | None = None,
        comm: Communicator | None = None,
        bucket_mb: float | None = None,
        accumulation_steps: int = 1,
        wire_dtype: torch.dtype | None = None,
        reproducible: bool = False,
        timeout: float | None = None,
        fuse: bool = False,
        shard: str = "none",
        parameters_per_node: str = "own",
        master_dtype: torch.dtype | None = None,
        compression: Compression | None = None,
    ) -> None:
        settings = check_arguments(
            torch_optimizer,
            blocking,
            model=model,
            comm=comm,
            bucket_mb=bucket_mb,
            accumulation_steps=accumulation_steps,
            wire_dtype=wire_dtype,
            reproducible=reproducible,
            timeout=timeout,
            fuse=fuse,
            shard=shard,
            parameters_per_node=parameters_per_node,
            master_dtype=master_dtype,
            compression=compression,
        )
        if isinstance(torch_optimizer, DataParallelOptimizer):
            raise ValueError("torch_optimizer is a DataParallelOptimizer already; use it as it is")
        names = parameter_names(model)
        refuse_owned([p for group in torch_optimizer.param_groups for p in group["params"]], names)
        self._assemble(torch_optimizer, world() if comm is None else comm, names, settings, Carried())
        self._gradients.attach()
        start_equal(self._comm, torch_optimizer, model)
        others = [] if model is None else [*model.parameters(), *model.buffers()]
        self._memory.hold(self._parameters(), others, equal=True)

    def _assemble(
        self,
        torch_optimizer: torch.optim.Optimizer,
        comm: Communicator,
        names: dict[int, str],
        settings: SyncSettings,
        carried: Carried,
    ) -> None:
        """Set every attribute."""
        self._wrap(torch_optimizer, comm)
        self._names = names
        self._settings = settings
        route_around_fused_sgd(torch_optimizer, torch_optimizer.param_groups)
        self._gradients, self._shards, self._residuals, self._states, self._stepper, self._memory = assemble(
            torch_optimizer, comm, names, settings, carried
        )
        claim(self._parameters(), self)

    # Training

    def step(self, closure: Closure | None = None, *, weight: float | None = None) -> Any:
        """Update the parameters with the averaged gradients. Collective.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()`` and returns the loss (a number, a
                tensor of one element, or None). It is called as often as the wrapped algorithm calls it; the algorithm
                sees averaged gradients and the mean of the loss over ranks.
            weight: of gradients that were set by hand, or are local yet: the number of samples or tokens, at least 0,
                that they are means over on this rank (0: they count as zeros). To be given by all ranks or by none. For
                what ``backward()`` synchronises, and in closures, there is :meth:`weight`.

        Returns:
            What the wrapped optimizer returns: with a closure the mean of the loss over ranks, otherwise None.

        Raises:
            RankMismatchError: other ranks are in another call, their groups have other options (learning rate, ...),
                or some have given a weight and others have not.
            TypeError: the weight is not a number.
            ValueError: it is negative or not finite, it is given with a closure, or all gradients are averages already.
            HeatoptError: the gradients have a weight by :meth:`weight` already.
        """
        if weight is not None:
            if closure is not None:
                raise ValueError("step(closure, weight=n): use `with optimizer.weight(n):` inside the closure")
            self._gradients.settle_by_hand(check_weight(weight))
        elif closure is None:
            self._gradients.settle(Call.STEP)
        return super().step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # as in the base class

    def _update(self, *arguments: Any, **keywords: Any) -> Any:
        if arguments:
            arguments = tuple(averaged(closure, self._gradients) for closure in arguments)
        result = self._stepper.step(*arguments, **keywords)
        self._gradients.consume()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the wrapped optimizer does. Local."""
        self._gradients.clear(set_to_none)
        self.torch_optimizer.zero_grad(set_to_none=set_to_none)

    def no_sync(self) -> AbstractContextManager[None]:
        """Context in which ``backward()`` leaves gradients local.

        The next ``backward()`` outside, or ``step()``, averages the accumulated sum.
        """
        return self._gradients.no_sync()

    @contextmanager
    def join(self) -> Iterator[None]:
        """Context for a loop over batches of which ranks have unequal numbers. Collective at its end.

        A rank that leaves the context serves the others until all have left. Meanwhile gradients are averages over the
        ranks that still train (the divisor is their number). At the end all ranks receive the parameters, the optimizer
        state and the groups' options of the lowest rank that trained last. Objects that are not the optimizer's (a
        scheduler's own counter, a GradScaler, the module's buffers) are left alone: step schedulers outside, or load
        their state from that rank.
        """
        with self._states.kept_whole():
            with self._gradients.join():
                yield
                root = self._gradients.serve_joined()
            broadcast_tensors(self._comm, self._parameters(), root, "the broadcast of parameters after join()")
            broadcast_state(self._comm, self.torch_optimizer, root)
            self.states_are_equal()

    @outside_graphs
    def synchronize(self) -> None:
        """Make all gradients averages now: those set by hand, accumulated in no_sync(), or without a hook. Collective.

        ``step()`` does it by itself; call it to look at gradients in between.
        """
        self._gradients.settle(Call.SYNCHRONIZE)

    @outside_graphs
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scale the averaged gradients so that their joint norm is at most ``max_norm``. Collective.

        Args:
            max_norm: largest norm allowed.
            norm_type: order p of the norm; ``math.inf`` for the largest absolute value.
            error_if_nonfinite: raise RuntimeError instead of scaling by a norm that is inf or nan.

        Returns:
            The norm of all gradients before the scaling, a tensor of no dimension, equal on all ranks.
        """
        self._gradients.settle(Call.CLIP)
        return clip_gradients(self._parameters(), self._shards, float(max_norm), float(norm_type), error_if_nonfinite)

    def report(self) -> dict[str, Any]:
        """What was chosen for this run, for logs. Local.

        Returns:
            ``algorithm``, ``ranks``, ``nodes``; and with several ranks ``shared_memory`` (gradients meet in the memory
            of the node), ``blocking`` (of CPU tensors), ``bucket_mb`` (MiB), ``buckets`` (their number),
            ``bucket_bytes`` (memory of all of them on this rank, and of sharded gradients), ``tuned`` (False while the
            first steps still try out what was left to them) and ``trials`` (median seconds of a step of the slowest
            rank with each candidate).
        """
        return {
            "algorithm": self._settings.algorithm,
            "ranks": self._comm.size,
            "nodes": self._comm.num_nodes,
            **self._gradients.report(),
        }

    def states_are_equal(self) -> None:
        """The ranks' states have just been made equal, whatever each of them had loaded."""
        self._gradients.loads = 0

    def make_states_whole(self, root: int) -> None:
        """Let rank ``root``, at least, hold all states until the next update. Collective if they are sharded."""
        self._states.gather(root)

    def unscale_agreed(self, found_inf: float) -> float:
        """Make all gradients averages and return the largest ``found_inf`` of all ranks. For GradScaler. Collective."""
        return max([found_inf, *(row.payload for row in self._gradients.settle(Call.UNSCALE, found_inf))])

    def gradient_holders(self) -> list[torch.Tensor]:
        """What has this rank's averaged gradients as ``grad``. For GradScaler."""
        return [*self._parameters(), *self._shards.holders()]

    def give_up_gradients(self) -> None:
        """The gradients are not to be used: what backward delivers next starts a new sum. For GradScaler."""
        self._shards.consume()
        self._residuals.roll_back()

    def rescale_residuals(self, factor: float) -> None:
        """The loss comes multiplied by ``factor`` from now on. For GradScaler. Local."""
        self._residuals.rescale(factor)

    @outside_graphs
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters and broadcast rank 0's values of them. Collective.

        Raises:
            ValueError: one of them belongs to another DataParallelOptimizer; and what torch raises.
            RankMismatchError: on all ranks, if they add different groups.
        """
        count = len(self._parameters())
        param_group, members = listed_once(param_group)
        refuse_owned(members, self._names, self)
        self._gradients.attach()  # a copy has not met the others yet, whose parameters are to be compared first
        self._states.gather()
        self.torch_optimizer.add_param_group(param_group)
        route_around_fused_sgd(self.torch_optimizer, self.param_groups[-1:])
        added = self._parameters()[count:]
        claim(added, self)
        self._gradients.extend()
        broadcast_tensors(self._comm, added, 0, "the broadcast of added parameters")
        self._memory.hold(self._parameters())

    # State

    def _collect_state(self) -> dict[str, Any]:
        return self._states.state_dict()

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        self._states.load_state_dict(state_dict)
        self._gradients.loads += 1

    def _present_states(self) -> States:
        return self._states

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        return {
            "torch_optimizer": optimizer_contents(self.torch_optimizer),
            "names": [self._names.get(id(parameter)) for parameter in self._parameters()],
            "settings": self._settings,
            "carried": self._states.carried(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(state, world())

    def __deepcopy__(self, memo: dict[int, Any]) -> DataParallelOptimizer:
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate._restore(copy.deepcopy(self.__getstate__(), memo), self._comm)
        return duplicate

    def _restore(self, state: dict[str, Any], comm: Communicator) -> None:
        """Become the copy that ``state`` describes. It meets the other ranks' copies at its first collective call."""
        optimizer = optimizer_from_contents(*state["torch_optimizer"])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names = {id(p): name for p, name in zip(parameters, state["names"], strict=True) if name is not None}
        self._assemble(optimizer, comm, names, state["settings"], state["carried"])
