"""Randomness as a function of names: the same (seed, stage, step, …) always gives the same numbers.

Resuming then needs no generator state, and the number of processes changes nothing: every process draws the
numbers of the whole global batch and keeps its own part.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator that depends on the seed and the names alone, e.g. `generator(0, "finetune", step)`."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
