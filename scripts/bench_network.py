#!/usr/bin/env python
"""How much of the communication between nodes is hidden behind the backward pass, and how many bytes it sends.

    scripts/two_nodes.sh -n 2 -r 1gbit -- python scripts/bench_network.py --json out.json

A model of equal Linear layers, whose backward also computes for as long as the communication takes (once per layer, so
that nothing but the layers' hooks can make progress in between): multiplies matrices, which takes the rank's core from
the network's own work, or with --elsewhere waits, as for an accelerator. For each way of synchronising, in turns:

    communication  a step without the computation, less the same step without synchronisation
    computation    a step without synchronisation, less the same step without the computation
    together       a step with both
    hidden         (communication + computation - together) / min(communication, computation): 1 is best

The way "bare sockets" synchronises nothing: a thread for each direction moves the same bytes through TCP, from the
beginning of the step on. What it cannot hide is the work of the system itself, on cores that are full.

The bytes are those that the network interface has counted, per node and step, over 2 (n - 1) / n times the size of the
gradients in single precision; for a local-update method (--methods) over what its period makes of that. One step of
such a method is the mean over its period.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _bare_exchange import BareExchange
from _measuring import interleave, open_gloo, write_json
from _methods import EXACT, HEAT, METHODS, Epochs
from rich.console import Console
from rich.table import Table
from torch import nn

import heatopt
from heatopt.comm import Communicator

PLAIN, LOADED = "no synchronisation", ", loaded"
REFERENCE = "heatopt blocking"


class Load:
    """What stands for the computation of a layer's backward.

    Args:
        elsewhere: leave the core free.
    """

    def __init__(self, elsewhere: bool) -> None:
        self.repeats = 0
        self._elsewhere = elsewhere
        self._matrix = torch.full((128, 128), 1e-3)
        self._product = torch.empty(128, 128)

    def work(self) -> None:
        """Multiply ``repeats`` times, or wait for ``repeats`` times a tenth of a millisecond."""
        if self._elsewhere:
            time.sleep(self.repeats * 1e-4)
            return
        for _ in range(self.repeats):
            torch.mm(self._matrix, self._matrix, out=self._product)


class Burden(torch.autograd.Function):
    """The identity, with a load in its backward."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, load: Load) -> torch.Tensor:
        context.load = load
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        context.load.work()
        return gradient, None


class Layers(nn.Module):
    """Linear layers of equal width; the load comes before each layer's gradient."""

    def __init__(self, count: int, width: int, load: Load) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))
        self._load = load

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = Burden.apply(layer(x), self._load)
        return x


class Way:
    """One way of synchronising: a model and an optimizer of its own.

    Args:
        model: what is trained.
        forward: what is called.
        optimizer: what is stepped.
        period: steps after which the communication repeats.
        share: of the gradients' bytes, what the formula says that is sent in each step.
    """

    def __init__(
        self, model: nn.Module, forward: nn.Module, optimizer: Any, period: int = 1, share: float = 1.0
    ) -> None:
        self.model = model
        self.period = period
        self.share = share
        self._forward = forward
        self._optimizer = optimizer

    def step(self, load: Load, repeats: int, batch: torch.Tensor) -> None:
        """One period of training steps."""
        load.repeats = repeats
        for _ in range(self.period):
            self._optimizer.zero_grad()
            self._forward(batch).square().mean().backward()
            self._optimizer.step()

    def checksum(self) -> float:
        """Sum of all parameters, in double precision."""
        return sum(p.detach().double().sum().item() for p in self.model.parameters())

    def gradient_bytes(self) -> int:
        """Of all parameters, in single precision."""
        return sum(4 * p.numel() for p in self.model.parameters())

    def close(self) -> None:
        """Let go of what only this way needs."""


class BareWay(Way):
    """No synchronisation, while its bytes travel all the same: what this machine allows to hide."""

    def __init__(self, model: nn.Module, optimizer: Any, comm: Communicator) -> None:
        super().__init__(model, model, optimizer)
        self._exchange = BareExchange(comm, self.gradient_bytes())

    def step(self, load: Load, repeats: int, batch: torch.Tensor) -> None:
        """One step, and the bytes from its beginning on."""
        self._exchange.start()
        super().step(load, repeats, batch)
        self._exchange.finish()

    def close(self) -> None:
        self._exchange.close()


def make_ways(comm: Communicator, make_model: Callable[[], nn.Module], bucket_mb: float) -> dict[str, Way]:
    """All ways that this version of heatopt has, and its peer."""

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def wrapped(**options: Any) -> Way:
        model = make_model()
        # Optimizers that share a communicator reduce at the end of backward only, where their order is sure.
        own = comm.duplicate("the benchmark")
        optimizer = heatopt.DataParallelOptimizer(sgd(model), model=model, comm=own, bucket_mb=bucket_mb, **options)
        return Way(model, model, optimizer)

    model = make_model()
    ways = {
        PLAIN: Way(model, model, sgd(model)),
        REFERENCE: wrapped(blocking=True),
        "heatopt non-blocking": wrapped(blocking=False),
    }
    if "wire_dtype" in inspect.signature(heatopt.DataParallelOptimizer).parameters:
        ways["heatopt blocking, bf16"] = wrapped(blocking=True, wire_dtype=torch.bfloat16)
        ways["heatopt non-blocking, bf16"] = wrapped(blocking=False, wire_dtype=torch.bfloat16)
    model = make_model()
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb)
    ways["DDP gloo"] = Way(model, parallel, sgd(model))
    model = make_model()
    ways["bare sockets"] = BareWay(model, sgd(model), comm)
    return ways


def make_local_ways(comm: Communicator, make_model: Callable[[], nn.Module]) -> dict[str, Way]:
    """The local-update methods, DASO between its warm-up and its cool-down."""
    ways = {}
    for name, method in METHODS.items():
        if name in (EXACT, HEAT):
            continue
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=1e-3)
        optimizer = method.make(inner, model, comm.duplicate(name), Epochs(total=2**30, warmup=0, cooldown=0))
        # Whole periods far from the beginning, and from the end of an epoch.
        steps = range(method.period * 100, method.period * 101)
        share = sum(method.share(optimizer, step, step, False) for step in steps) / method.period
        ways[name] = Way(model, model, optimizer, method.period, share)
    return ways


def calibrate(comm: Communicator, load: Load, milliseconds: float, layers: int) -> int:
    """Repeats per layer that take so long in all layers, while all ranks compute."""
    load.repeats = 200
    times = []
    for _ in range(5):
        comm.barrier()
        start = time.perf_counter()
        load.work()
        times.append((time.perf_counter() - start) / load.repeats * 1e3)
    mean = torch.tensor(statistics.median(times), dtype=torch.float64)
    return max(1, round(milliseconds / layers / comm.allreduce(mean, "mean").item()))


def sent_bytes(interface: str) -> int | None:
    """What the node has sent, if it has such an interface."""
    path = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")
    return int(path.read_text()) if path.exists() else None


def per_step(times: dict[str, list[float]], ways: dict[str, Way]) -> dict[str, list[float]]:
    """Times of periods as times of steps."""
    return {name: [t / ways[name.removesuffix(LOADED)].period for t in each] for name, each in times.items()}


def traffic(comm: Communicator, interface: str, step: Callable[[], None], steps: int) -> float | None:
    """Bytes that a node sends for one step, the mean over nodes."""
    comm.barrier()
    before = sent_bytes(interface)
    for _ in range(steps):
        step()
    comm.barrier()
    after = sent_bytes(interface)
    own = None if before is None or after is None else (after - before) / steps
    counted = [c for c, rank in comm.all_gather_object((own, comm.node_rank)) if rank == 0]
    return None if any(c is None for c in counted) else sum(counted) / len(counted)


def evaluate(times: dict[str, list[float]], name: str) -> dict[str, float]:
    """Medians over rounds of the quantities of one way."""
    rows = []
    for k in range(len(times[PLAIN])):
        computation = times[f"{PLAIN}{LOADED}"][k] - times[PLAIN][k]
        communication = times[name][k] - times[PLAIN][k]
        together = times[f"{name}{LOADED}"][k] - times[PLAIN][k]
        hidden = (computation + communication - together) / min(computation, communication)
        rows.append((computation, communication, together, hidden, together / max(computation, communication)))
    keys = ("computation", "communication", "together", "hidden", "over_longer")
    return {key: statistics.median(column) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}


def show(results: dict[str, Any], gradient_bytes: int, comm: Communicator) -> None:
    """Print the table."""
    n = comm.num_nodes
    table = Table(
        title=f"{n} nodes x {comm.node_size} ranks, {gradient_bytes / 2**20:.0f} MiB of gradients, milliseconds a step"
    )
    for column in ("way", "communication", "computation", "together", "hidden", "/ longer", "MB sent", "/ theory"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, row in results.items():
        sent, theory = row["sent"], 2 * (n - 1) / n * gradient_bytes * row["share"]
        table.add_row(
            name,
            *(f"{row[key]:.1f}" for key in ("communication", "computation", "together")),
            f"{row['hidden']:.2f}" if row["period"] == 1 else "",
            f"{row['over_longer']:.2f}",
            "" if sent is None else f"{sent / 1e6:.1f}",
            "" if sent is None or not theory else f"{sent / theory:.3f}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="Linear layers (default %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="of each layer (default %(default)s: 4 MiB)")
    parser.add_argument("--bucket-mb", type=float, default=4.0, help="of heatopt and of DDP (default %(default)s)")
    parser.add_argument("--balance", type=float, default=1.0, help="computation / communication (default %(default)s)")
    parser.add_argument("--elsewhere", action="store_true", help="compute as an accelerator does: the core is free")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps per round (default %(default)s)")
    parser.add_argument("--ways", nargs="+", help="only these, besides the one without synchronisation")
    parser.add_argument("--methods", action="store_true", help="the local-update methods too")
    parser.add_argument("--interface", default="eth0", help="whose bytes are counted (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write all times to this file")
    options = parser.parse_args()
    comm = heatopt.world()
    if comm.size == 1:
        raise SystemExit("this benchmark needs two or more ranks")
    open_gloo(comm)
    load = Load(options.elsewhere)

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        return Layers(options.layers, options.width, load)

    ways = make_ways(comm, make_model, options.bucket_mb)
    if options.methods:
        ways |= make_local_ways(comm, make_model)
    chosen = [name for name in ways if name != PLAIN and (not options.ways or name in options.ways)]
    batch = torch.randn(1, options.width, generator=torch.Generator().manual_seed(comm.rank))
    probe = interleave(
        comm, {name: partial(ways[name].step, load, 0, batch) for name in (PLAIN, REFERENCE)}, 3, options.steps
    )
    communication = statistics.median(probe[REFERENCE]) - statistics.median(probe[PLAIN])
    repeats = calibrate(comm, load, options.balance * communication, options.layers)
    calls = {}
    for name in (PLAIN, *chosen):
        calls[name] = partial(ways[name].step, load, 0, batch)
        calls[f"{name}{LOADED}"] = partial(ways[name].step, load, repeats, batch)
    times = per_step(interleave(comm, calls, options.rounds, options.steps), ways)
    results: dict[str, Any] = {}
    for name in chosen:
        results[name] = evaluate(times, name)
        sent = traffic(comm, options.interface, calls[name], 4)
        results[name]["sent"] = None if sent is None else sent / ways[name].period
        results[name] |= {"period": ways[name].period, "share": ways[name].share}
        results[name]["checksum"] = ways[name].checksum()
    gradient_bytes = ways[PLAIN].gradient_bytes()
    write_json(options.json, comm, {"gradient_bytes": gradient_bytes, "ways": results, "milliseconds": times})
    if comm.rank == 0:
        show(results, gradient_bytes, comm)
    comm.barrier()
    for way in ways.values():
        way.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
