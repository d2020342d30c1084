"""N ranks with parts of a batch train what one process with the whole batch trains: every algorithm, every option."""

from __future__ import annotations

from typing import Any

import pytest

from heatopt.comm import Communicator
from tests.support import parity
from tests.support.algorithms import Case, algorithms, default_cases, known_algorithms, option_cases
from tests.support.launch import LAUNCH
from tests.support.problems import Net
from tests.support.ranks import Ranks
from tests.support.training import train_alone, train_as_rank

# Muon orthogonalises in bfloat16: where a last bit of the gradient, which the order of a sum decides, moves an entry
# across a rounding border, the update changes by 2^-8 of its size, which is about the learning rate (1e-3).
# That Muon gets the right gradient to the last bit is shown in test_bit_identity.
TOLERANCE = {"Muon": 1e-5}
# LBFGS remembers differences of almost equal gradients, divided by almost nothing: the parameters do not feel it.
STATE_TOLERANCE = TOLERANCE | {"LBFGS": 1e-6}

# The processes of a launcher average as threads do; what is left to the plain optimizer need not be repeated there.
CASES = option_cases(thorough=not LAUNCH.launched)
DEFAULTS = [case for case in default_cases() if case.takes_dense]


def make_net(case: Case) -> Net:
    return Net(device=case.device, matrices_only=case.matrices_only, with_empty=case.takes_empty)


def assert_all_close(results: list[dict[str, Any]], expected: dict[str, Any], case: Case) -> None:
    for rank, result in enumerate(results):
        for part, bounds in (("parameters", TOLERANCE), ("optimizer", STATE_TOLERANCE)):
            bound = bounds.get(case.name, parity.EXACT)
            parity.assert_close(result[part], expected[part], bound, f"{part} of rank {rank}")


def test_every_algorithm_has_a_case() -> None:
    with_case = {parameter.values[0].algorithm for parameter in CASES if not parameter.marks}
    assert with_case == set(known_algorithms()) == set(algorithms())
    assert {case.algorithm for case in default_cases()} == set(algorithms())


@pytest.mark.parametrize("case", [c for c in CASES if c.values[0].takes_dense])
def test_equals_one_process(ranks: Ranks, case: Case) -> None:
    net = make_net(case)
    expected = train_alone(case, net, net.losses(ranks.size))

    def body(comm: Communicator) -> dict[str, Any]:
        own = make_net(case)
        result = train_as_rank(comm, case, own, own.losses(comm.size, comm.rank), model=own)
        assert own.unused.grad is None
        return result

    assert_all_close(ranks(body), expected, case)


def grouped(case: Case, net: Net) -> list[dict[str, Any]]:
    """Parameters in groups of different learning rates, in another order than the model's."""
    names = [name for name, _ in net.named_parameters()]
    learning_rate = case.optimizer([net.first]).defaults["lr"]
    return [
        {"params": [getattr(net, name) for name in reversed(names[start::3])], "lr": learning_rate * factor}
        for start, factor in enumerate((1.0, 0.5, 0.0))
    ]


@pytest.mark.parametrize("case", [c for c in DEFAULTS if c.takes_groups], ids=lambda case: case.name)
def test_equals_one_process_with_groups(ranks: Ranks, case: Case) -> None:
    net = make_net(case)
    expected = train_alone(case, net, net.losses(ranks.size), grouped(case, net))

    def body(comm: Communicator) -> dict[str, Any]:
        own = make_net(case)
        return train_as_rank(comm, case, own, own.losses(comm.size, comm.rank), grouped(case, own), blocking=False)

    assert_all_close(ranks(body), expected, case)


@pytest.mark.parametrize("case", [c for c in DEFAULTS if c.name != "Muon"], ids=lambda case: case.name)
def test_comparison_sees_a_wrong_gradient(case: Case) -> None:
    """The tests above are able to fail: one of many gradients that is wrong by 1e-6 shows."""
    outcomes = []
    for factor in (1.0, 1.0 + 1e-6):
        net = make_net(case)
        net.second.register_hook(lambda gradient, factor=factor: gradient * factor)
        outcomes.append(train_alone(case, net, net.losses(2)))
    with pytest.raises(AssertionError, match="differs by up to"):
        assert_all_close([outcomes[1]], outcomes[0], case)
