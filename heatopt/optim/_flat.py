"""Updates of elementwise algorithms on flat tensors: torch's own code, run once for many parameters."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from operator import attrgetter, sub
from typing import Any

import torch

from heatopt.optim._flat_kinds import SameKind
from heatopt.optim._flat_layout import Layout
from heatopt.optim._flat_memory import LARGE, Run
from heatopt.sharding import HookedStep
from heatopt.sync import outside_graphs

__all__ = ["FlatStepper", "check_elementwise"]

_ELEMENTWISE = (
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
_WITH_FUSED_KERNEL = (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_FUSED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_COPIED_AT_ONCE = 4 * 2**20  # bytes
_HALF = (torch.float16, torch.bfloat16)
# Attributes are read from hundreds of tensors in each step, by loops that are not Python's.
_GRADIENT, _LAYOUT, _DTYPE = attrgetter("grad"), attrgetter("layout"), attrgetter("dtype")


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the algorithm can update many parameters as one."""
    if type(optimizer) not in _ELEMENTWISE:
        raise ValueError(
            f"fuse=True needs an algorithm that updates each element by itself, got {type(optimizer).__name__}; "
            f"allowed: {', '.join(sorted(kind.__name__ for kind in _ELEMENTWISE))}"
        )


class _FlatRun:
    """A run, as a parameter of the optimizer that updates runs."""

    def __init__(self, run: Run, fused: bool, options: dict[str, Any], scratch: torch.Tensor) -> None:
        self.run = run
        self.parameter = run.space.memory[run.elements]
        self.state = run.space.state_of(run)
        self.states = len(self.state)
        self.group: dict[str, Any] = {}
        self._own_options = {"params": [self.parameter], "foreach": bool(options["foreach"])}
        if "fused" in options:
            self._own_options["fused"] = fused
        self._shows_fused_steps = fused and not options["fused"]
        self._numbers = [(self.state[key], numbers, key) for key, numbers in run.space.numbers_of(run).items()]
        if fused and "step" in self.state:
            # The kernel's own kind of number, of which the parameters' remain independent.
            self.state["step"] = self.state["step"].to(self.parameter.device, torch.float32)
        self._alone = run.end == run.first + 1
        self._stride = run.parameters[0].stride()
        self._gradient = scratch[: self.parameter.numel()]
        self._parts = run.views_of(self._gradient)
        self._gaps = [self.parameter.new_zeros(gap) for gap in run.gaps()]
        self._has_gaps = any(map(torch.Tensor.numel, self._gaps))
        self._vectors = all(p.dim() == 1 and p.stride() == (1,) for p in run.parameters)

    def prepare(self, options: dict[str, Any], gradients: list[torch.Tensor], in_place: bool) -> None:
        """Set what the update reads."""
        self.group.update(options)
        self.group.update(self._own_options)
        # torch's foreach loop adds the momentum to the gradient itself: what lies behind that is somebody else's.
        written = options.get("nesterov") and self._own_options["foreach"]
        if not written and (in_place or (self._alone and gradients[0].stride() == self._stride)):
            self.parameter.grad = self._in_place(gradients[0])
            if self.parameter.grad is not None:
                return
        self.parameter.grad = self._copy(gradients)

    def _in_place(self, first: torch.Tensor) -> torch.Tensor | None:
        # No view is kept: whoever owns the memory counts the tensors that use it.
        storage, offset = first.untyped_storage(), first.storage_offset()
        if (offset + self.parameter.numel()) * first.itemsize > storage.nbytes():
            return None
        return first.new_empty(0).set_(storage, offset, self.parameter.shape, (1,))

    def _copy(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        if not self._vectors:
            torch._foreach_copy_(self._parts, gradients)
            return self._gradient
        # One call instead of one copy for each.
        pieces = chain.from_iterable(zip(gradients, self._gaps, strict=True)) if self._has_gaps else gradients
        return torch.cat(list(pieces), out=self._gradient)

    def finish(self, state: dict[torch.Tensor, dict[str, Any]]) -> bool:
        """Hand on what the update has made beside the parameters and the tensors of their state.

        Returns:
            True if these are new states, which are not in flat memory yet.
        """
        self.parameter.grad = None
        for own, numbers, key in self._numbers:
            if key == "step":
                numbers.add_(1)  # which waits for no device
            else:
                numbers.copy_(own)
        if len(self.state) == self.states:
            return False
        self._hand_on_new_states(state)
        return True

    def _hand_on_new_states(self, state: dict[torch.Tensor, dict[str, Any]]) -> None:
        for key, value in self.state.items():
            if value.shape == self.parameter.shape:
                parts = self.run.views_of(value)
            else:
                if self._shows_fused_steps:
                    single = torch.get_default_dtype() is not torch.float64
                    value = value.to("cpu", torch.float32 if single else torch.float64)
                parts = [value.clone() for _ in self.run.parameters]
            for parameter, part in zip(self.run.parameters, parts, strict=True):
                state.setdefault(parameter, {})[key] = part


class FlatStepper:
    """Updates the parameters of ``optimizer`` as its own ``step`` does, in few operations.

    Parameters and states are moved into flat memory, of which the parameters' data and the entries of
    ``optimizer.state`` become views. Neighbours that have a gradient and equal step counts are one run; an instance of
    the optimizer's own class updates runs as if they were parameters. What cannot be flat (complex or sparse tensors,
    differentiable or capturable groups, ...) that class updates as it is.

    Whatever is exchanged from outside (data of parameters, states, groups) is noticed by the next step.

    Args:
        optimizer: of an elementwise algorithm; see :func:`check_elementwise`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # The hooks fire for the user's optimizer, and not once more for those in here.
        self._update: Callable[..., None] = inspect.unwrap(type(optimizer).step)
        self._hooked_step = HookedStep(optimizer, self._step)
        self._for_runs = _empty_copy(optimizer)
        self._for_others = _empty_copy(optimizer)
        self._layout: Layout | None = None
        # What the runs were made for:
        self._kinds: Sequence[object] = ()
        self._same_kind = SameKind(())  # as these gradients
        self._breaks: list[int] | None = None
        self._active: list[int] = []  # places in the layout
        self._active_indices: list[int] = []
        self._active_parameters: list[torch.Tensor] = []
        self._offsets: list[int] = []
        self._strides: list[tuple[int, ...]] = []
        self._addresses: list[int] = []
        self._ends: list[tuple[int, int]] = []  # first and last of the gradients between breaks
        self._boundaries: list[int] = []
        self._others: dict[int, list[torch.Tensor]] = {}  # by group
        self._scratch: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self._runs: list[tuple[_FlatRun, int, int]] = []  # with the first and the end among the active ones

    @outside_graphs
    def step(self, *arguments: Any, **keywords: Any) -> Any:
        """The same as ``optimizer.step``, its hooks included."""
        return self._hooked_step(*arguments, **keywords)

    def _step(self, optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
                self._update(optimizer)  # torch's GradScaler talks to the kernels through the optimizer
            else:
                self._step_flat()
        return loss

    def _step_flat(self) -> None:
        optimizer = self._optimizer
        layout, self._layout = self._layout, None  # none if anything below fails
        if layout is None or not layout.is_current(optimizer.param_groups):
            self._before_moving()
            layout = Layout(optimizer.param_groups)
            self._kinds = ()
        if not layout.attach_states(optimizer.state):
            self._kinds = ()
        gradients: list[torch.Tensor | None] = list(map(_GRADIENT, layout.parameters))
        same_kind = bool(self._kinds) and self._same_kind(gradients)
        kinds = self._kinds if same_kind else _dtypes_of(gradients)
        fresh = kinds != self._kinds
        if fresh:
            self._kinds = kinds
            self._choose(layout, kinds)
        if not same_kind:
            self._same_kind = SameKind(() if None in kinds or False in kinds else gradients)
        active: list[Any] = [gradients[index] for index in self._active_indices]
        breaks = self._find_breaks(active, fresh, same_kind)
        if fresh or breaks != self._breaks:
            self._breaks = breaks
            self._make_runs(layout)
        known = len(optimizer.state)
        if self._update_runs(active):
            layout.forget_states()  # or one that is cleared before the next step would not be missed
        self._update_others()
        if len(optimizer.state) > known:
            _sort_states(optimizer.state, known, layout.parameters)
        layout.remember_contents()
        self._layout = layout

    def _before_moving(self) -> None:
        """For a subclass: parameters are new, or were exchanged, and are about to move into flat memory."""

    def _choose(self, layout: Layout, kinds: Sequence[object]) -> None:
        """Decide which parameters are updated in flat memory in this step, and which as they are."""
        odd = layout.odd()
        self._active = [
            place
            for place, (index, parameter) in enumerate(zip(layout.indices, layout.flat, strict=True))
            if kinds[index] is parameter.dtype and place not in odd
        ]
        self._active_indices = [layout.indices[place] for place in self._active]
        self._active_parameters = [layout.flat[place] for place in self._active]
        self._offsets = [layout.offsets[place] for place in self._active]
        self._strides = [layout.strides[place] for place in self._active]
        situations = layout.situations()
        self._boundaries = [
            number
            for number, (before, place) in enumerate(pairwise(self._active), 1)
            if place != before + 1
            or situations[place] != situations[before]
            or max(layout.flat[place].numel(), layout.flat[before].numel()) >= LARGE
        ]
        chosen = set(self._active_indices)
        self._others = {}
        for index, (parameter, kind) in enumerate(zip(layout.parameters, kinds, strict=True)):
            if kind is not None and index not in chosen:
                self._others.setdefault(layout.group_of[index], []).append(parameter)

    def _find_breaks(self, gradients: Sequence[torch.Tensor], fresh: bool, same_kind: bool) -> list[int] | None:
        """Where gradients do not lie in memory as their parameters do; None if they are best copied."""
        if not fresh and self._breaks is None and _apart(gradients, self._offsets):
            return None
        same_strides = same_kind and self._breaks is not None
        if not same_strides and list(map(torch.Tensor.stride, gradients)) != self._strides:
            return None
        addresses = list(map(torch.Tensor.data_ptr, gradients))
        if not fresh and self._breaks is not None and addresses == self._addresses and self._share_memory(gradients):
            return self._breaks
        distances = list(map(sub, addresses, self._offsets))
        breaks = [number for number, (before, here) in enumerate(pairwise(distances), 1) if before != here]
        if len(set(breaks).difference(self._boundaries)) > len(gradients) // 8:
            return None
        self._ends = [(start, end - 1) for start, end in pairwise([0, *breaks, len(gradients)]) if start < end]
        self._addresses = addresses
        return breaks if self._share_memory(gradients) else None

    def _share_memory(self, gradients: Sequence[torch.Tensor]) -> bool:
        """Neighbours by address may belong to two allocations, between which nothing may be read."""
        return all(_storage(gradients[first]) == _storage(gradients[last]) for first, last in self._ends)

    def _make_runs(self, layout: Layout) -> None:
        starts = sorted({0, *self._boundaries, *(self._breaks or ())})
        if self._breaks is None:
            starts = list(self._shortened(starts))
        self._runs = []
        for start, end in pairwise([*starts, len(self._active)]) if self._active else ():
            run = layout.run(self._active[start], self._active[end - 1])
            options = self._optimizer.param_groups[run.space.group]
            fused = _uses_fused_kernel(self._optimizer, options, run.space.memory)
            self._runs.append((_FlatRun(run, fused, options, self._scratch_for(run)), start, end))
        self._for_runs.state = defaultdict(dict, {run.parameter: run.state for run, _, _ in self._runs})

    def _scratch_for(self, run: Run) -> torch.Tensor:
        """Memory for copies of gradients, which all runs use in turn."""
        memory = run.space.memory
        kind = (memory.device, memory.dtype)
        needed = run.elements.stop - run.elements.start
        if kind not in self._scratch or self._scratch[kind].numel() < needed:
            self._scratch[kind] = memory.new_zeros(needed)
        return self._scratch[kind]

    def _shortened(self, starts: Sequence[int]) -> Iterator[int]:
        """More starts, so that no copy of gradients is large."""
        for start, end in pairwise([*starts, len(self._active)]):
            yield start
            reached = self._offsets[start]
            for number in range(start + 1, end):
                if self._offsets[number] - reached > _COPIED_AT_ONCE:
                    reached = self._offsets[number]
                    yield number

    def _update_runs(self, gradients: Sequence[torch.Tensor]) -> bool:
        """Update what is in flat memory; return True if that has made new states."""
        optimizer, in_place = self._optimizer, self._breaks is not None
        new_states = False
        for run, start, end in self._runs:
            run.prepare(optimizer.param_groups[run.run.space.group], list(gradients[start:end]), in_place)
            self._for_runs.param_groups = [run.group]
            self._update(self._for_runs)
            new_states |= run.finish(optimizer.state)
        # Autograd is to notice that the parameters are not what a graph may have saved.
        torch.autograd.graph.increment_version(self._active_parameters)
        return new_states

    def _update_others(self) -> None:
        if not self._others:
            return
        optimizer, others = self._optimizer, self._for_others
        others.state = optimizer.state
        others.param_groups = [
            {**optimizer.param_groups[number], "params": members} for number, members in self._others.items()
        ]
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            self._update(others)


def _dtypes_of(gradients: Sequence[torch.Tensor | None]) -> list[object]:
    """The dtype of each gradient; False where it is sparse, None where there is none."""
    try:
        if list(map(_LAYOUT, gradients)).count(torch.strided) == len(gradients):
            return list(map(_DTYPE, gradients))
    except AttributeError:
        pass  # a gradient is missing
    return [None if g is None else (g.dtype if g.layout is torch.strided else False) for g in gradients]


def _empty_copy(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same kind, without parameters."""
    kind = type(optimizer)
    copy: Any = kind.__new__(kind)
    copy.__setstate__({"defaults": optimizer.defaults, "state": defaultdict(dict), "param_groups": []})
    copy._warned_capturable_if_run_uncaptured = True
    return copy  # type: ignore[no-any-return]


def _uses_fused_kernel(optimizer: torch.optim.Optimizer, group: dict[str, Any], memory: torch.Tensor) -> bool:
    """True if the group does not want another implementation, and torch has a right one for this memory."""
    if not isinstance(optimizer, _WITH_FUSED_KERNEL) or memory.dtype not in _FUSED_DTYPES:
        return False
    if group["fused"] is None and group["foreach"] is not None:
        return False
    if group["fused"] is False or memory.device.type not in ("cpu", "cuda"):
        return False
    half_on_cpu = memory.dtype in _HALF and memory.device.type == "cpu"
    return not (half_on_cpu and isinstance(optimizer, torch.optim.SGD))


def _apart(gradients: Sequence[torch.Tensor], offsets: Sequence[int]) -> bool:
    """True if the first two gradients do not lie in memory as their parameters do."""
    return len(gradients) > 1 and gradients[1].data_ptr() - gradients[0].data_ptr() != offsets[1] - offsets[0]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _sort_states(state: dict[Any, Any], known: int, parameters: Sequence[torch.Tensor]) -> None:
    """Put the entries after the first ``known`` in the order of the parameters, as torch makes them."""
    order = {id(parameter): index for index, parameter in enumerate(parameters)}
    for parameter in sorted(list(state)[known:], key=lambda key: order.get(id(key), -1)):
        state[parameter] = state.pop(parameter)
