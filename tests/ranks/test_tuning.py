"""What the first steps try out changes speed alone: bits and agreement stay."""

from __future__ import annotations

import pytest
import torch

import heatopt
from heatopt.comm import Communicator
from tests.ranks._training import (
    FEATURES,
    OUTPUTS,
    assert_equal,
    assert_ranks_equal,
    batch,
    fill,
    loss_of,
    net,
    sgd,
)
from tests.support.ranks import Ranks

STEPS = 45  # more than all trials


def large_net() -> torch.nn.Module:
    """A network of 3.2 MiB: one bucket of the default size, two of the smallest that is tried out."""
    layers = [torch.nn.Linear(FEATURES, 450), torch.nn.Tanh(), torch.nn.Linear(450, 450), torch.nn.Tanh()]
    layers += [torch.nn.Linear(450, 450), torch.nn.Linear(450, OUTPUTS)]
    return fill(torch.nn.Sequential(*layers).double())


def test_tuned_training_has_the_same_bits(ranks: Ranks) -> None:
    def train(comm: Communicator, **options: object) -> tuple[torch.nn.Module, heatopt.DataParallelOptimizer]:
        model = large_net()
        optimizer = heatopt.DataParallelOptimizer(sgd(model), model=model, comm=comm, **options)  # type: ignore[arg-type]
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss_of(model, batch(step, comm.rank)).backward()
            optimizer.step()
        return model, optimizer

    def body(comm: Communicator) -> None:
        tuned, optimizer = train(comm)
        fixed, other = train(comm, blocking=True, bucket_mb=8)
        assert_equal(tuned, fixed)
        assert_ranks_equal(comm, tuned)
        if comm.size > 1:
            report = optimizer.report()
            assert report["tuned"]
            assert [trial["bucket_mb"] for trial in report["trials"]] == [8.0, 8.0, 2.0]
            choices = comm.all_gather_object((report["blocking"], report["bucket_mb"]))
            assert len(set(choices)) == 1
            assert other.report()["tuned"]
            assert (other.report()["blocking"], other.report()["bucket_mb"]) == (True, 8.0)

    ranks(body)


@pytest.mark.parametrize("keep_going", [0, 1])
def test_tuning_inside_join(ranks: Ranks, keep_going: int) -> None:
    """Ranks that have left the loop do not see the others' times, so nobody may count them."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = heatopt.DataParallelOptimizer(sgd(model), model=model, comm=comm)
        for epoch in range(4):
            with optimizer.join():
                for step in range(5 + (4 if comm.rank == keep_going else 0)):
                    optimizer.zero_grad()
                    loss_of(model, batch(10 * epoch + step, comm.rank)).backward()
                    optimizer.step()
        reports = comm.all_gather_object({k: v for k, v in optimizer.report().items() if k != "trials"})
        assert all(report == reports[0] for report in reports)
        assert_ranks_equal(comm, model, optimizer)

    ranks(body, min_size=2)
