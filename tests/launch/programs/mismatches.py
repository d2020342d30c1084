"""Ranks disagree on purpose, in one way after the other; the error is caught on all ranks, and all go on.

    mismatches.py FOLDER [NAME]

Each rank writes lines ``NAME: message`` into a file of the folder. With a name only that disagreement takes place, and
its error ends the program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

import heatopt
from heatopt.comm import Communicator

Disagreement = Callable[[Communicator, bool], object]


def make_model(*widths: int, names: str = "abcdef") -> torch.nn.Module:
    model = torch.nn.Sequential()
    for name, inputs, outputs in zip(names, widths, widths[1:], strict=False):
        model.add_module(name, torch.nn.Linear(inputs, outputs))
    return model


def sgd(model: torch.nn.Module, **options: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def wrap(inner: torch.optim.Optimizer, model: torch.nn.Module | None = None, **options: float) -> object:
    return heatopt.DataParallelOptimizer(inner, model=model, **options)  # type: ignore[arg-type]


def shape(comm: Communicator, odd: bool) -> None:
    model = make_model(4, 7 if odd else 6, 2)
    wrap(sgd(model), model)


def count(comm: Communicator, odd: bool) -> None:
    model = make_model(*((4, 6, 2, 2) if odd else (4, 6, 2)))
    wrap(sgd(model), model)


def dtype(comm: Communicator, odd: bool) -> None:
    model = make_model(4, 6, 2)
    if odd:
        model.b.bfloat16()
    wrap(sgd(model), model)


def order(comm: Communicator, odd: bool) -> None:
    model = make_model(4, 4, 4)
    parameters = list(model.parameters())
    wrap(torch.optim.SGD(parameters[::-1] if odd else parameters, lr=0.1), model)


def names(comm: Communicator, odd: bool) -> None:
    model = make_model(4, 6, 2, names="ax" if odd else "ab")
    wrap(sgd(model), model)


def group_count(comm: Communicator, odd: bool) -> None:
    model = make_model(4, 6, 2)
    parts = [list(model.a.parameters()), list(model.b.parameters())]
    groups = [{"params": parts[0]}, {"params": parts[1]}] if odd else [{"params": parts[0] + parts[1]}]
    wrap(torch.optim.SGD(groups, lr=0.1), model)


def option(comm: Communicator, odd: bool) -> None:
    model = make_model(4, 2)
    wrap(sgd(model, weight_decay=0.01 if odd else 0.02), model)


def algorithm(comm: Communicator, odd: bool) -> None:
    model = make_model(4, 2)
    wrap(torch.optim.Adagrad(model.parameters()) if odd else torch.optim.Adadelta(model.parameters()), model)


def setting(comm: Communicator, odd: bool) -> None:
    wrap(sgd(make_model(4, 2)), bucket_mb=3 if odd else 4)


def construction(comm: Communicator, odd: bool) -> None:
    """While there is no optimizer yet, or the odd rank would wait where the others never come."""
    if odd:
        comm.allreduce(torch.ones(3))
    else:
        wrap(sgd(make_model(4, 2)))


class Training:
    """One healthy optimizer, which has to go on after each disagreement."""

    def __init__(self) -> None:
        self.model = make_model(4, 6, 2)
        self.optimizer = heatopt.DataParallelOptimizer(sgd(self.model), model=self.model)

    def backward(self, comm: Communicator) -> None:
        self.optimizer.zero_grad()
        self.model(torch.full((2, 4), comm.rank + 1.0)).sum().backward()

    def learning_rate(self, comm: Communicator, odd: bool) -> None:
        self.backward(comm)
        group = self.optimizer.param_groups[0]
        group["lr"] = 0.2 if odd else 0.1
        try:
            self.optimizer.step()
        finally:
            group["lr"] = 0.1

    def clip(self, comm: Communicator, odd: bool) -> None:
        self.backward(comm)
        if odd:
            self.optimizer.clip_grad_norm_(1.0)
        else:
            self.optimizer.step()

    def clip_without_backward(self, comm: Communicator, odd: bool) -> None:
        """The odd rank has skipped its backward, which is right, and then does what the others do not."""
        self.optimizer.zero_grad()
        if odd:
            self.optimizer.clip_grad_norm_(1.0)
        else:
            self.backward(comm)
            self.optimizer.step()

    def added_group(self, comm: Communicator, odd: bool) -> None:
        self.backward(comm)
        if odd:
            self.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        else:
            self.optimizer.step()

    def check(self, comm: Communicator) -> None:
        self.backward(comm)
        self.optimizer.step()
        weights = comm.all_gather(self.model.a.weight)
        assert all(torch.equal(found, weights[0]) for found in weights)


def main() -> None:
    comm = heatopt.world()
    report = (Path(sys.argv[1]) / f"rank{comm.rank}.txt").open("w")
    chosen = sys.argv[2] if len(sys.argv) > 2 else None

    def run(name: str, disagreement: Disagreement) -> None:
        if chosen not in (None, name):
            return
        # The last rank, except once, differs from the others; then rank 0 is alone with its opinion.
        odd = comm.rank == (0 if name == "option" else comm.size - 1)
        try:
            disagreement(comm, odd)
        except heatopt.RankMismatchError as error:
            print(f"{name}: {error}", file=report, flush=True)
            if chosen:
                print("fault", file=sys.stderr, flush=True)
                raise

    run("construction", construction)
    training = Training()
    for one in (shape, count, dtype, order, names, group_count, option, algorithm, setting):
        run(one.__name__, one)
        training.check(comm)
    for one in (training.learning_rate, training.clip, training.clip_without_backward):
        run(one.__name__, one)
        training.check(comm)
    run("added_group", training.added_group)  # the odd rank has a group more from here on
    sys.stdout.write(f"rank {comm.rank} has finished\n")  # in one piece: ranks share the stream


if __name__ == "__main__":
    main()
