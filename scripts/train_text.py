#!/usr/bin/env python
"""Train a small byte-level GPT on the source of the Python standard library, on any number of ranks."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from _options import RankParser, make_parser, positive_int
from _training import Task, run
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import heatopt
from heatopt.comm import Communicator

LEARNING_RATES = {"AdamW": 3e-3, "SGD": 0.3, "Muon": 0.02}
BYTES = 256
# Of the files, in the order of their names, every eighth is held out for the test.
HELD_OUT = 8


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each added to what went in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_network = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = self.query_key_value(self.norm_attention(x))
        q, k, v = packed.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.contract(gelu(self.expand(self.norm_network(x))))


class ByteGPT(nn.Module):
    """Gives scores of the next byte at every position of a text.

    Args:
        context: the longest text, in bytes.
        width: numbers in the state of a position.
        heads: attention heads.
        layers: number of blocks.
    """

    def __init__(self, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        for embedding in (self.bytes, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        return self.head(self.norm(self.blocks(x)))


def read_source(library: Path, size: int) -> tuple[bytes, bytes]:
    """About ``size`` bytes of source for training, and what is held out for the test.

    Takes whole modules in the order of their names; every eighth goes to the test.

    Raises:
        ValueError: the directory has too little source.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    files = sorted(library.glob("*.py"), key=lambda path: path.name)
    for number, path in enumerate(files, start=1):
        parts[number % HELD_OUT == 0].append(path.read_bytes())
        if sum(map(len, parts[0])) >= size and parts[1]:
            return b"".join(parts[0])[:size], b"".join(parts[1])
    raise ValueError(f"{library} has less than {size:,} bytes of Python source for training: lower --text-size")


def read_on_rank_0(comm: Communicator, size: int) -> tuple[bytes, bytes]:
    """The texts as rank 0 reads them: other nodes may have another version of Python.

    Raises:
        ValueError: on all ranks, if rank 0 finds too little source.
    """
    texts: tuple[bytes, bytes] | str | None = None
    if comm.rank == 0:
        try:
            texts = read_source(Path(sysconfig.get_path("stdlib")), size)
        except (ValueError, OSError) as error:
            texts = str(error)
    texts = comm.broadcast_object(texts)
    if isinstance(texts, tuple):
        return texts
    raise ValueError(texts)


def cut(text: bytes, context: int) -> tuple[Tensor, Tensor]:
    """Cut a text into pieces that do not overlap; the target of each byte is the one after it."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    pieces = (len(data) - 1) // context
    end = pieces * context
    return data[:end].view(pieces, context), data[1 : end + 1].view(pieces, context)


def make_task(parser: RankParser, size: int, context: int, test_pieces: int) -> Task:
    """The model and the pieces of text; the default generator sets the weights."""
    try:
        train_text, test_text = read_on_rank_0(parser.comm, size)
    except ValueError as error:
        parser.error(str(error))
    model = ByteGPT(context, width=96, heads=4, layers=3)
    test_inputs, test_targets = cut(test_text, context)
    # Evenly spaced pieces, so that the test sees every held-out file.
    stride = max(1, len(test_inputs) // test_pieces)
    return Task(
        "Python source, next byte",
        model,
        *cut(train_text, context),
        test_inputs[::stride],
        test_targets[::stride],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = make_parser(
        "Train a small byte-level GPT on the source of the Python standard library of this machine.",
        heatopt.world(),
        epochs=4,
        batch_size=32,
        learning_rates=LEARNING_RATES,
        out="runs/text",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--text-size",
        type=positive_int,
        default=400_000,
        metavar="BYTES",
        help="training text (default 400000)",
    )
    data.add_argument(
        "--context", type=positive_int, default=64, metavar="BYTES", help="length of a sample (default 64)"
    )
    data.add_argument(
        "--test-pieces",
        type=positive_int,
        default=512,
        help="about how many samples to test on (default 512)",
    )
    options = parser.parse_args(arguments)
    task = partial(make_task, parser, options.text_size, options.context, options.test_pieces)
    run(parser, options, task, LEARNING_RATES)


if __name__ == "__main__":
    main()
