"""What makes a wrapper a torch optimizer: the wrapped one's own objects, and torch's hooks around its calls."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy
import torch

from heatopt.comm import Communicator
from heatopt.optim._closures import Closure
from heatopt.sharding import States
from heatopt.sync import outside_graphs

__all__ = ["OptimizerWrapper"]


class OptimizerWrapper(torch.optim.Optimizer):
    """A :class:`torch.optim.Optimizer` whose groups, state and defaults are those of ``torch_optimizer``.

    Its calls run torch's hooks around what the subclass does in them. torch's own constructor is not called: it would
    add the parameter groups again. A subclass calls :meth:`_wrap` instead, and sets its own attributes.
    """

    torch_optimizer: torch.optim.Optimizer
    """The wrapped optimizer."""
    _comm: Communicator

    def _wrap(self, torch_optimizer: torch.optim.Optimizer, comm: Communicator) -> None:
        self.torch_optimizer = torch_optimizer
        self._comm = comm
        super().__setstate__({})  # hooks' dictionaries and torch's profiling

    # What a subclass adds

    @abstractmethod
    def _update(self, *arguments: Any, **keywords: Any) -> Any:
        """What a step does between its hooks."""

    @abstractmethod
    def _collect_state(self) -> dict[str, Any]:
        """What state_dict() gives, between its hooks."""

    @abstractmethod
    def _take_state(self, state_dict: dict[str, Any]) -> None:
        """What load_state_dict() does between its hooks, with a dictionary that is the caller's."""

    @abstractmethod
    def _present_states(self) -> States:
        """Where the states of the parameters are."""

    # The wrapped optimizer's own objects

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups, the very list."""
        return self.torch_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.torch_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state, the very dictionary."""
        return self.torch_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.torch_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults, the very dictionary."""
        return self.torch_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.torch_optimizer.defaults = value

    def __getattr__(self, name: str) -> Any:
        # Nothing is forwarded: what torch or a framework asks a wrapper for, the wrapper must be able to keep.
        inner = self.__dict__.get("torch_optimizer")
        hint = f"; the wrapped optimizer has it: .torch_optimizer.{name}" if hasattr(inner, name) else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    # What Hetu's users know

    def minimize(
        self, loss: torch.Tensor, var_list: Any = None, grad_loss: torch.Tensor | None = None, name: str = ""
    ) -> torch.Tensor:
        """Take one step by the gradients of ``loss`` alone; those from before are cleared. Collective.

        The same as ``zero_grad()``, ``loss.backward()`` and ``step()``. Not for algorithms that need a closure.

        Args:
            loss: of this rank.
            var_list: parameters that get a gradient; default: all that the loss depends on.
            grad_loss: the gradient with respect to the loss, by default 1.
            name: of the operation, where there is a graph of them, as in Hetu; not looked at.

        Returns:
            The loss, without its graph. The gradients are left in ``p.grad``, averaged where the step averages them.

        Raises:
            ValueError: ``var_list`` has a tensor that is no parameter of this optimizer.
        """
        if var_list is not None:
            var_list = [var_list] if isinstance(var_list, torch.Tensor) else list(var_list)
            own = set(map(id, self._parameters()))
            for position, variable in enumerate(var_list):
                if id(variable) not in own:
                    raise ValueError(
                        f"var_list[{position}] is no parameter of this optimizer, which updates only its own: leave it "
                        "out, or add it by add_param_group()"
                    )
        self.zero_grad()
        torch.autograd.backward(loss, grad_loss, inputs=var_list)
        self.step()
        return loss.detach()

    @outside_graphs
    def get_states(self, param: torch.Tensor) -> dict[str, Any]:
        """A copy of the whole state of a parameter, wherever it lives. Collective if it is sharded."""
        return self._present_states().get(param)

    @outside_graphs
    def set_states(self, param: torch.Tensor, name: str, value: Any) -> None:
        """Replace one entry of a parameter's whole state, with the same value on all ranks. Collective if sharded."""
        self._present_states().set(param, name, torch.as_tensor(value) if isinstance(value, numpy.ndarray) else value)

    # Calls with hooks

    def step(self, closure: Closure | None = None) -> Any:
        """Update the parameters, and average as the method says. Collective.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()`` and returns the loss. Hooks see it as
                it is given.

        Returns:
            What the wrapped optimizer returns.
        """
        if closure is None and not self._optimizer_step_pre_hooks and not self._optimizer_step_post_hooks:
            return self._update()  # small models notice what the rest costs
        arguments: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        keywords: dict[str, Any] = {}
        for pre_hook in self._optimizer_step_pre_hooks.values():
            changed = pre_hook(self, arguments, keywords)
            if changed is not None:
                arguments, keywords = changed
        result = self._update(*arguments[1:], **keywords)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, arguments, keywords)
        return result

    # torch would wrap `step` with its profiling and its global hooks, which the wrapped optimizer's step runs already.
    step.hooked = True  # type: ignore[attr-defined]

    @outside_graphs
    def state_dict(self) -> dict[str, Any]:
        """The state as the plain torch optimizer gives it; beside it what the wrapper itself must remember.

        Collective if the state is sharded, and for all local-update methods.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._collect_state()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    @outside_graphs
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict`, here or of a plain torch optimizer, returned. Do so on all ranks."""
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._take_state(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(ranks={self._comm.size}, {self.torch_optimizer!r})"
