"""The states of Hetu's optimizers by all of their names, wherever they live, and of any data-parallel optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import heatopt
from tests.ranks._hetu import adam, gradient_of, sgd
from tests.ranks._training import assert_close, assert_equal, assert_ranks_equal, batch, gradients, loss_of, net
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

WHERE: dict[str, dict[str, Any]] = {
    "none": {},
    "state": {"shard": "state"},
    "gradients": {"shard": "gradients"},
    "fused": {"fuse": True},
    "masters": {"master_dtype": torch.float64},
}
"""Where the states live."""


@pytest.mark.parametrize("where", WHERE)
def test_states(ranks: Ranks, where: str) -> None:
    """NumPy in, whole tensors out, wherever the state lives, by each of the names."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = adam(comm, **WHERE[where])
        optimizer.minimize(loss_of(model, batch(0, comm.rank)))
        variables = list(model.parameters())
        for variable in variables:
            states = optimizer.get_states(variable)
            names = ["step", "mean", "variance"]
            assert set(states) == {"exp_avg", "exp_avg_sq", *names, *(f"var_{name}" for name in names)}
            assert states["mean"].shape == variable.shape
            assert states["step"] == 1.0
            for theirs, own in zip(names, ["step", "exp_avg", "exp_avg_sq"], strict=True):
                assert_equal([states[theirs], states["var_" + theirs]], [states[own], states[own]])
        value = np.arange(variables[0].numel(), dtype=np.float64).reshape(variables[0].shape)
        optimizer.set_states(variables[0], "var_mean", value)
        optimizer.set_states(variables[0], "exp_avg_sq", 2 * value)
        optimizer.set_states(variables[0], "step", np.array([7]))
        value[:] = -1.0  # the optimizer has a copy
        found = optimizer.get_states(variables[0])
        expected = torch.arange(variables[0].numel(), dtype=torch.float64).reshape(variables[0].shape)
        assert_equal([found["mean"], found["variance"]], [expected, 2 * expected])
        assert found["step"].shape == ()
        assert found["step"] == 7.0
        assert_ranks_equal(comm, found)
        with pytest.raises(ValueError, match="no state 'velocity'; it has 'step', 'exp_avg', 'exp_avg_sq', 'mean'"):
            optimizer.set_states(variables[0], "velocity", value)
        with pytest.raises(ValueError, match="has shape"):
            optimizer.set_states(variables[0], "mean", np.zeros(3))
        with pytest.raises(TypeError):
            optimizer.set_states(variables[0], "mean", object())

    ranks(body)


@pytest.mark.parametrize("where", WHERE)
def test_states_set_before_the_first_step(ranks: Ranks, where: str) -> None:
    """Training goes on from another run's states, of which one variable's are left to what they start with."""

    def body(comm: Communicator) -> None:
        narrow = torch.float32 if where == "masters" else torch.float64
        models = [net(narrow) for _ in range(2)]
        first, second = [adam(comm, params=model.parameters(), **WHERE[where]) for model in models]
        data = [batch(step, comm.rank, dtype=narrow) for step in range(3)]
        first.minimize(loss_of(models[0], data[0]))
        models[1].load_state_dict(models[0].state_dict())
        second.scheduler.load_state_dict(first.scheduler.state_dict())
        last = list(models[0].parameters())[-1]
        for name in ("mean", "variance", "step"):
            first.set_states(last, name, np.zeros(() if name == "step" else last.shape))
        for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert second.get_states(other) == {}
            with pytest.raises(ValueError, match="no state 'velocity'; it has 'step'"):
                second.set_states(other, "velocity", np.zeros(1))
            states = first.get_states(own)
            for name in () if own is last else ("variance", "mean", "step"):
                second.set_states(other, name, states[name].numpy())
            if where == "masters":
                second.wrapped.set_states(other, "master_weight", states["master_weight"])
        for optimizer, model in zip((first, second), models, strict=True):
            for number in (1, 2):
                optimizer.minimize(loss_of(model, data[number]))
        assert_equal(models[1], models[0])
        assert_ranks_equal(comm, models[1])

    ranks(body)


def test_velocity(ranks: Ranks) -> None:
    """Hetu's, with the learning rate inside, in and out; SGD without momentum has no state."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = sgd(comm, momentum=0.9, params=model.parameters())
        velocity = np.full((6, 4), 0.5)
        first = next(model.parameters())
        optimizer.set_states(first, "velocity", velocity)
        optimizer.minimize(loss_of(model, batch(0, comm.rank)))
        gradient = gradient_of(expected, 0, comm.size)[0]
        now = 0.9 * torch.from_numpy(velocity) - 0.1 * gradient
        states = optimizer.get_states(first)
        assert set(states) == {"momentum_buffer", "velocity", "var_velocity"}
        assert_close([states["velocity"], states["var_velocity"], states["momentum_buffer"]], [now, now, -now / 0.1])
        assert_close(first.detach(), next(expected.parameters()) + now)
        plain = sgd(comm, params=net().parameters())
        still = sgd(comm, momentum=0.9, init_lr=0.0, max_lr=0.0, min_lr=0.0, params=net().parameters())
        with pytest.raises(ValueError, match="with a learning rate of 0 no gradients have a velocity"):
            still.set_states(still.wrapped.param_groups[0]["params"][0], "velocity", velocity)
        with pytest.raises(ValueError, match="the variable has no state 'velocity'; it has none"):
            plain.set_states(plain.wrapped.param_groups[0]["params"][0], "velocity", velocity)

    ranks(body)


def test_general_methods_take_numpy(ranks: Ranks) -> None:
    """``minimize`` and ``set_states`` of the data-parallel optimizer itself."""

    def body(comm: Communicator) -> None:
        model, other = net(), net()
        ours, theirs = [
            heatopt.DataParallelOptimizer(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), comm=comm, model=m)
            for m in (model, other)
        ]
        first = next(model.parameters())
        ours.set_states(first, "momentum_buffer", np.ones(first.shape))
        theirs.set_states(next(other.parameters()), "momentum_buffer", torch.ones(first.shape, dtype=torch.float64))
        for step in range(3):
            loss = loss_of(model, batch(step, comm.rank))
            assert ours.minimize(loss, var_list=None, grad_loss=None, name="update").equal(loss.detach())
            theirs.zero_grad()
            loss_of(other, batch(step, comm.rank)).backward()
            theirs.step()
        assert_equal(model, other)
        assert_equal(gradients(model), gradients(other))  # they are there to be looked at

    ranks(body)


def test_minimize_knows_its_parameters(ranks: Ranks) -> None:
    """A tensor of somebody else would collect gradients that nobody uses, and nobody clears."""

    def body(comm: Communicator) -> None:
        model, stranger = net(), torch.nn.Parameter(torch.ones(()))
        optimizer = heatopt.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), comm=comm, model=model)
        first, *others = model.parameters()
        loss = loss_of(model, batch(0, comm.rank)) * stranger
        with pytest.raises(ValueError, match=r"var_list\[1\] is no parameter of this optimizer"):
            optimizer.minimize(loss, var_list=[first, stranger])
        assert all(parameter.grad is None for parameter in (first, stranger))
        optimizer.minimize(loss, var_list=iter([first]))
        assert first.grad is not None
        assert all(parameter.grad is None for parameter in others)

    ranks(body)
