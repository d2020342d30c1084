"""Copies of a model and its optimizer, by deepcopy and by pickle, train on their own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import heatopt
from heatopt import lr_scheduler as schedulers
from tests.ranks._training import (
    ALGORITHMS,
    TINY,
    Algorithm,
    adamw,
    assert_close,
    assert_equal,
    assert_ranks_equal,
    batch,
    by_name,
    loss_of,
    net,
    reference,
    sgd,
    train,
    whole,
    wrap,
)
from tests.support.ranks import Ranks

if TYPE_CHECKING:
    from heatopt.comm import Communicator

Copy = Callable[[Any], Any]


def by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def by_file(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def ranks_of_a_pickle(comm: Communicator) -> list[int]:
    """The ranks that an unpickled optimizer works with: those of heatopt.world(), for a thread itself alone."""
    return list(range(comm.size)) if heatopt.world().size == comm.size else [comm.rank]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


WAYS = [(algorithm, how) for algorithm in ALGORITHMS for how in (copy.deepcopy, by_pickle)]
WAYS += [(by_name[name], by_file) for name in ("AdamW", "LBFGS")]


@pytest.mark.parametrize(("algorithm", "how"), WAYS, ids=lambda one: getattr(one, "name", None) or one.__name__)
def test_t25_copied_pair_trains(ranks: Ranks, algorithm: Algorithm, how: Copy) -> None:
    """After some steps, with a scheduler attached: the pair shares its tensors, and nothing with the original."""

    def body(comm: Communicator) -> None:
        model, expected = algorithm.model(), algorithm.model()
        optimizer = heatopt.DataParallelOptimizer(algorithm.optimizer(model), model=model, comm=comm, bucket_mb=TINY)
        plain = algorithm.optimizer(expected)
        scheduler, plain_scheduler = schedulers.ExponentialLR(optimizer, 0.9), schedulers.ExponentialLR(plain, 0.9)
        for step in range(2):
            algorithm.update(optimizer, model, batch(step, comm.rank))
            algorithm.update(plain, expected, whole(step, comm.size))
            scheduler.step()
            plain_scheduler.step()

        module, duplicate = how((model, optimizer))
        assert type(duplicate) is heatopt.DataParallelOptimizer
        assert isinstance(duplicate.torch_optimizer, type(optimizer.torch_optimizer))
        assert duplicate.param_groups is duplicate.torch_optimizer.param_groups
        assert duplicate.state is duplicate.torch_optimizer.state
        assert duplicate.defaults is duplicate.torch_optimizer.defaults
        assert [id(p) for p in parameters_of(duplicate)] == [id(p) for p in module.parameters()]
        assert not {id(p) for p in parameters_of(duplicate)} & {id(p) for p in parameters_of(optimizer)}
        assert_equal(duplicate, optimizer)
        before = copy.deepcopy([optimizer.state_dict(), model.state_dict()])
        members = list(range(comm.size)) if how is copy.deepcopy else ranks_of_a_pickle(comm)
        tolerance = {"rtol": 2e-2, "atol": 1e-3} if algorithm.name == "Muon" else {}

        algorithm.update(duplicate, module, batch(2, comm.rank))
        other_expected = algorithm.model()
        other_expected.load_state_dict(model.state_dict())
        other_plain = algorithm.optimizer(other_expected)
        other_plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        algorithm.update(other_plain, other_expected, whole(2, members))
        assert_close(module, other_expected, **tolerance)
        assert_equal([optimizer.state_dict(), model.state_dict()], before)

        after = copy.deepcopy([duplicate.state_dict(), module.state_dict()])
        algorithm.update(optimizer, model, batch(3, comm.rank))
        algorithm.update(plain, expected, whole(3, comm.size))
        scheduler.step()
        assert_close(model, expected, **tolerance)
        assert_equal([duplicate.state_dict(), module.state_dict()], after)
        assert_ranks_equal(comm, model, optimizer)
        if len(members) == comm.size:
            assert_ranks_equal(comm, module, duplicate)

    ranks(body)


def test_t25_scheduler_on_a_copy(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        scheduler = schedulers.StepLR(optimizer, 1, gamma=0.5)
        train(optimizer, model, [batch(0, comm.rank)])
        scheduler.step()
        module, duplicate, its_scheduler = copy.deepcopy((model, optimizer, scheduler))
        assert its_scheduler.optimizer is duplicate
        train(duplicate, module, [batch(1, comm.rank)])
        its_scheduler.step()
        assert duplicate.torch_optimizer.param_groups[0]["lr"] == 0.025
        assert optimizer.torch_optimizer.param_groups[0]["lr"] == 0.05
        fresh = schedulers.ExponentialLR(duplicate, 0.5)  # warnings are errors: the copy's step can be watched too
        train(duplicate, module, [batch(2, comm.rank)])
        fresh.step()
        assert duplicate.param_groups[0]["lr"] == 0.0125
        assert optimizer.param_groups[0]["lr"] == 0.05

    ranks(body)


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle], ids=lambda how: how.__name__)
def test_t25_scheduler_of_the_wrapped_optimizer_is_not_copied(ranks: Ranks, how: Copy) -> None:
    """A scheduler replaces ``step`` on the object; a copied replacement would step the original."""

    def body(comm: Communicator) -> None:
        model = net()
        inner = sgd(model)
        scheduler = schedulers.StepLR(inner, 1, gamma=0.5)
        optimizer = heatopt.DataParallelOptimizer(inner, model=model, comm=comm, bucket_mb=TINY)
        train(optimizer, model, [batch(0, comm.rank)])
        scheduler.step()
        module, duplicate = how((model, optimizer))
        before = copy.deepcopy(model.state_dict())
        train(duplicate, module, [batch(1, comm.rank)])
        assert_equal(model.state_dict(), before)
        expected = net()
        plain = sgd(expected)
        train(plain, expected, [whole(0, comm.size)])
        plain.param_groups[0]["lr"] = 0.05
        members = list(range(comm.size)) if how is copy.deepcopy else ranks_of_a_pickle(comm)
        train(plain, expected, [whole(1, members)])
        assert_close(module, expected)

    ranks(body)


def test_t25_copy_alone_has_parameters_of_its_own(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model)
        duplicate = copy.deepcopy(optimizer)
        before = copy.deepcopy(model.state_dict())
        for parameter in parameters_of(duplicate):
            parameter.grad = torch.full_like(parameter, comm.rank + 1.0)
        duplicate.step()
        assert_equal(model, before)
        gradient = (comm.size + 1) / 2
        wanted = [p.detach() - 0.1 * gradient for p in model.parameters()]
        assert_close(parameters_of(duplicate), wanted)

    ranks(body)


def test_t25_copy_of_a_copy(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        pair: tuple[nn.Module, Any] = (model, wrap(comm, adamw, model))
        for step in range(3):
            train(pair[1], pair[0], [batch(step, comm.rank)])
            pair = copy.deepcopy(pair)
        assert_close(pair[1], reference(adamw, expected, comm.size, 3))
        assert_close(pair[0], expected)

    ranks(body)


def test_t25_copy_before_the_first_step(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        module, duplicate = copy.deepcopy((model, wrap(comm, adamw, model)))
        train(duplicate, module, [batch(step, comm.rank) for step in range(2)])
        assert_close(duplicate, reference(adamw, expected, comm.size, 2))
        assert_close(module, expected)

    ranks(body)


def test_t25_copy_between_backward_and_step(ranks: Ranks) -> None:
    """torch does not copy gradients with parameters; the original's are still there."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, adamw, model)
        loss_of(model, batch(0, comm.rank)).backward()
        module, duplicate = copy.deepcopy((model, optimizer))
        optimizer.step()
        assert_close(optimizer, reference(adamw, expected, comm.size, 1))
        assert_close(model, expected)
        train(duplicate, module, [batch(0, comm.rank)])
        assert_close(module, expected)

    ranks(body)


@pytest.mark.parametrize("shard", ["none", "state", "gradients"])
def test_t25_copy_that_is_first_extended(ranks: Ranks, shard: str) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        module, duplicate = copy.deepcopy((model, wrap(comm, adamw, model, shard=shard)))
        added = torch.nn.Parameter(torch.ones(3))
        duplicate.add_param_group({"params": [added]})
        added.grad = torch.full((3,), float(comm.rank))
        train_loss = loss_of(module, batch(0, comm.rank))
        train_loss.backward()
        duplicate.step()
        assert len(duplicate.state_dict()["state"]) == 7
        assert_ranks_equal(comm, module, added)

    ranks(body)


def test_t25_copy_on_one_rank_that_is_not_used(ranks: Ranks) -> None:
    """Copying meets nobody; only the use of the copy does."""

    def body(comm: Communicator) -> None:
        model, expected = net(), net()
        optimizer = wrap(comm, adamw, model)
        kept = copy.deepcopy((model, optimizer)) if comm.rank == comm.size - 1 else None
        train(optimizer, model, [batch(step, comm.rank) for step in range(2)])
        assert_close(optimizer, reference(adamw, expected, comm.size, 2))
        assert_close(model, expected)
        del kept

    ranks(body)


def test_t25_settings_travel_with_a_copy(ranks: Ranks) -> None:
    """The copy of an optimizer that synchronises every second backward does so too."""

    def body(comm: Communicator) -> None:
        model = net()
        optimizer = wrap(comm, sgd, model, accumulation_steps=2)
        module, duplicate = copy.deepcopy((model, optimizer))
        expected = net()
        for step in range(2):
            loss_of(module, batch(step, comm.rank)).backward()
            loss_of(expected, whole(step, comm.size)).backward()
            alone = net()
            if step == 0:
                loss_of(alone, batch(0, comm.rank)).backward()
                assert_equal([p.grad for p in module.parameters()], [p.grad for p in alone.parameters()])
        assert_close([p.grad for p in module.parameters()], [p.grad for p in expected.parameters()])
        duplicate.step()

    ranks(body)


def test_t25_copy_of_a_tied_model(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
        model[1].weight = model[0].weight
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.25)
        expected = copy.deepcopy(model)
        module, duplicate = copy.deepcopy((model, wrap(comm, adamw, model)))
        assert module[1].weight is module[0].weight
        train(duplicate, module, [batch(step, comm.rank) for step in range(2)])
        reference(adamw, expected, comm.size, 2)
        assert_close(module, expected)

    ranks(body)


def test_t25_hooks_stay_with_the_original(ranks: Ranks) -> None:
    """As with plain torch optimizers, whose copies have no hooks either."""

    def body(comm: Communicator) -> None:
        model = net()
        inner = sgd(model)
        calls: list[str] = []
        inner.register_step_post_hook(lambda *_: calls.append("inner"))
        optimizer = heatopt.DataParallelOptimizer(inner, comm=comm, bucket_mb=TINY)
        optimizer.register_step_post_hook(lambda *_: calls.append("wrapper"))
        module, duplicate = copy.deepcopy((model, optimizer))
        train(duplicate, module, [batch(0, comm.rank)])
        assert calls == []
        train(optimizer, model, [batch(0, comm.rank)])
        assert calls == ["inner", "wrapper"]

    ranks(body)


def test_t25_second_wrapper_on_a_copys_parameters_is_refused(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = net()
        module, duplicate = copy.deepcopy((model, wrap(comm, sgd, model)))
        with pytest.raises(ValueError, match="another DataParallelOptimizer"):
            wrap(comm, sgd, module)
        del duplicate
        wrap(comm, sgd, module)

    ranks(body)


def test_t25_communicator_is_not_pickled(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(TypeError, match="communicator"):
            pickle.dumps(comm)
        model = net()
        assert b"Communicator" not in pickle.dumps(wrap(comm, sgd, model))

    ranks(body)


@pytest.mark.launched
def test_t25_pickled_pair_goes_on_in_all_processes(ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        algorithm = by_name["LBFGS"]
        model, expected = algorithm.model(), algorithm.model()
        pair = by_pickle((model, heatopt.DataParallelOptimizer(algorithm.optimizer(model), bucket_mb=TINY)))
        plain = algorithm.optimizer(expected)
        for step in range(3):
            algorithm.update(pair[1], pair[0], batch(step, comm.rank))
            algorithm.update(plain, expected, whole(step, comm.size))
            pair = by_pickle(pair)
        assert_close(pair[0], expected)

    ranks(body)
