#!/usr/bin/env python
"""Memory of a rank while it trains: states, gradients and parameters, each by itself, against what sharding promises.

    python scripts/bench_memory.py --ranks 2 4 --workloads wide-mlp gpt --json memory.json

Each configuration runs in processes of its own. After three steps everything is found out twice: as counted bytes of
tensors, of the rank that has most, and as memory that the system gives to the processes: the mean of their
proportional set sizes (PSS, ``/proc/PID/smaps_rollup``), in which memory that ranks share counts once for all of them
together. It is what the PSS falls by when states, gradients (between backward and step) and parameters are let go, one
after the other. Shared parameters go with the gradients, so they are the fall by both without that of the gradients of
the same kind with own parameters. glibc keeps freed memory in its heap until ``malloc_trim``, which is called before
each look.

Numbers are multiples of what one process without sharding has of the same. *travelling* is memory through which updated
parameters travel, and *all* the growth since before there was a model, between backward and step, both in multiples of
the parameters.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _jobs import Job, serve
from _measuring import setting, write_results
from _workloads import WORKLOADS, Workload
from rich.console import Console
from rich.table import Table
from torch import nn

import heatopt

PLAIN = "no synchronisation"
SHARED = ", shared parameters"
KINDS = (PLAIN, "none", "state", "gradients", f"state{SHARED}", f"gradients{SHARED}")
PARTS = ("parameters", "states", "gradients")
TOGETHER = "gradients and parameters"
_STEPS = 3
# What may be there beside a rank's part: pages, presence flags, the places where pieces rather begin.
ALLOWANCE = 0.01


def proportional_set_size() -> int:
    """Bytes of this process, its part of what it shares with others, without what its heap has freed.

    Files are left out: of the libraries' pages every process that is started anywhere takes a part away.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
    if trim is not None:
        trim(0)
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(map(int, re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE)))


def limits(kind: str, ranks: int, bucket: float) -> dict[str, float]:
    """What a rank may have of each part, in multiples of the whole; only of what is divided.

    Args:
        kind: one of ``KINDS``.
        ranks: their number, all of one node.
        bucket: the largest bucket over all gradients.
    """
    share = 1 / ranks + ALLOWANCE
    shard = kind.removesuffix(SHARED)
    found = {"parameters": share} if kind.endswith(SHARED) else {}
    if shard in ("state", "gradients"):
        found["states"] = share
    if shard == "gradients":
        found["gradients"] = share + bucket
    return found


class Stage:
    """In a rank of one kind."""

    def __init__(self, kind: str) -> None:
        self._shard = kind.removesuffix(SHARED)
        self._shares = kind.endswith(SHARED)
        self._comm = heatopt.world()

    def serve(self) -> None:
        """Measure when asked to."""
        serve(self._comm, lambda _command, *arguments: self.measure(*arguments))

    def measure(self, workload: str, bucket_mb: float) -> dict[str, Any]:
        """Train for a few steps; return what there is between the last backward and its step, in bytes."""
        task = WORKLOADS[workload]
        torch.manual_seed(0)
        _train_once(nn.Linear(8, 8), torch.randn(4, 8))  # what is loaded and allocated once for any model
        batch = task.make_batch(torch.Generator().manual_seed(self._comm.rank))
        before = self._look()
        model = task.make_model()
        optimizer: Any = self._optimizer(task, model, bucket_mb)
        for _ in range(_STEPS):
            _backward(task, model, optimizer, batch)
            optimizer.step()
        _backward(task, model, optimizer, batch)
        pss = {"all": self._look() - before}
        counted = self._count(model, optimizer)
        bucket = max(bucket_mb * 2**20, *(p.nbytes for p in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        pss |= self._let_go_of_states(optimizer)
        _backward(task, model, optimizer, batch)
        looks = [self._look()]
        model.zero_grad()
        if not self._shares:  # otherwise each rank would get the parameters into memory of its own
            optimizer = None
            looks.append(self._look())
        for parameter in model.parameters():
            parameter.data = torch.empty(0)
        optimizer = None
        looks.append(self._look())
        parts = [TOGETHER] if self._shares else ["gradients", "parameters"]
        pss |= {part: a - b for part, (a, b) in zip(parts, pairwise(looks), strict=True)}
        return {"counted": counted, "pss": pss, "bucket": bucket, "setting": setting(self._comm)}

    def _optimizer(self, task: Workload, model: nn.Module, bucket_mb: float) -> torch.optim.Optimizer:
        plain = task.make_optimizer(list(model.parameters()))
        if self._shard == PLAIN:
            return plain
        return heatopt.DataParallelOptimizer(
            plain,
            model=model,
            shard=self._shard,
            parameters_per_node="shared" if self._shares else "own",
            bucket_mb=bucket_mb,
        )

    def _count(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        if isinstance(optimizer, heatopt.DataParallelOptimizer):  # it has them in buckets
            gradients = optimizer.report().get("bucket_bytes", gradients)
        states = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
        parameters = sum(p.nbytes for p in model.parameters())
        return {
            "parameters": parameters / (self._comm.node_size if self._shares else 1),
            "states": states,
            "gradients": gradients,
        }

    def _let_go_of_states(self, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        """What the PSS falls by without the states, and then without the memory through which parameters travel."""
        looks = [self._look()]
        optimizer.state.clear()
        looks.append(self._look())
        groups = optimizer.torch_optimizer if isinstance(optimizer, heatopt.DataParallelOptimizer) else optimizer
        optimizer.load_state_dict({"state": {}, "param_groups": groups.state_dict()["param_groups"]})
        looks.append(self._look())
        return {"states": looks[0] - looks[1], "travelling": looks[1] - looks[2]}

    def _look(self) -> int:
        """The PSS, while no rank does anything."""
        self._comm.barrier()
        found = proportional_set_size()
        self._comm.barrier()
        return found


def _train_once(model: nn.Module, batch: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    model(batch).square().mean().backward()
    optimizer.step()


def _backward(task: Workload, model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    task.loss(model, batch).backward()


def summarize(ranks: int, found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By kind and part: counted bytes, PSS, the limit, and whether both keep to it.

    In multiples of what is counted without synchronisation; ``all`` and ``travelling`` in multiples of the parameters.

    Args:
        ranks: their number.
        found: what :meth:`Stage.measure` returned on each of them, by kind, ``PLAIN`` among them.
    """
    whole = found[PLAIN][0]["counted"]
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, measured in found.items():
        bounds = limits(kind, ranks, measured[0]["bucket"] / whole["gradients"])
        counted = {part: max(rank["counted"][part] for rank in measured) for part in PARTS}
        pss = {part: fmean(rank["pss"][part] for rank in measured) for part in measured[0]["pss"]}
        if TOGETHER in pss:
            own = found[kind.removesuffix(SHARED)]
            pss["parameters"] = pss[TOGETHER] - fmean(rank["pss"]["gradients"] for rank in own)
        rows[kind] = {}
        for part in (*PARTS, "travelling", "all"):
            unit = whole.get(part, whole["parameters"])
            ways = {"counted": counted, "pss": pss}
            row: dict[str, Any] = {way: sizes[part] / unit for way, sizes in ways.items() if part in sizes}
            if part in bounds:
                row |= {"limit": bounds[part], "kept": all(value <= bounds[part] for value in row.values())}
            rows[kind][part] = row
    return rows


def show(title: str, rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print the table."""
    table = Table("shard", "part", title=title)
    for column in ("counted", "PSS", "limit", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for kind, parts in rows.items():
        for part, row in parts.items():
            numbers = (f"{row[key]:.3f}" if key in row else "" for key in ("counted", "pss", "limit"))
            verdict = {None: "", True: "kept", False: "MISSED"}[row.get("kept")]
            table.add_row(kind if part == PARTS[0] else "", part, *numbers, verdict, end_section=part == "all")
    Console(width=100).print(table)


def measure(workload: str, ranks: int, bucket_mb: float) -> dict[str, list[dict[str, Any]]]:
    """What :meth:`Stage.measure` returns on each rank, by kind."""
    found = {}
    for kind in KINDS:
        job = Job(ranks, Path(__file__), ["--kind", kind])
        try:
            found[kind] = job.call("measure", workload, bucket_mb)
        finally:
            job.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="processes of each kind (default 2)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["wide-mlp"], help="default wide-mlp")
    parser.add_argument("--bucket-mb", type=float, default=8.0, help="size of a bucket (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        Stage(options.kind).serve()
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = []
    for workload in options.workloads:
        for ranks in options.ranks:
            found = measure(workload, ranks, options.bucket_mb)
            parameters = found[PLAIN][0]["counted"]["parameters"]
            rows = summarize(ranks, found)
            show(f"{workload}, {ranks} ranks: parts over the same of one process, travelling/all over parameters", rows)
            about = found[PLAIN][0]["setting"]
            results.append({"workload": workload, "ranks": ranks, "parameter_bytes": parameters, "kinds": rows})
    if options.json:
        write_results(options.json, about, results)


if __name__ == "__main__":
    main()
