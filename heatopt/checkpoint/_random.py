"""The random generators of a process: Python's, numpy's, torch's, and CUDA's once that is in use."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

__all__ = ["generator_states", "reseed", "restore_generators"]


def generator_states() -> dict[str, Any]:
    """The states, as a checkpoint holds them."""
    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, python_words, python_gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, torch.tensor(python_words, device="cpu"), python_gauss],
        "numpy": [torch.from_numpy(np.asarray(words, dtype=np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    """Put :func:`generator_states` back."""
    version, python_words, gauss = states["python"]
    random.setstate((version, tuple(python_words.tolist()), gauss))
    words, *rest = states["numpy"]
    np.random.set_state(("MT19937", words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)


def reseed(states: dict[str, Any], rank: int, size: int) -> int:
    """Seed all generators from the states of another number of ranks; return the seed, which differs on each rank."""
    digest = hashlib.blake2b(states["torch"].numpy().tobytes() + f"{rank} of {size}".encode(), digest_size=8)
    seed = int.from_bytes(digest.digest(), "little") >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return seed
