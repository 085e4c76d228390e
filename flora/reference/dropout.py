"""The twin of the dropout that counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def drop(out: Tensor, probability: float, seed: int) -> None:
    """Zeroes elements of out (n) with this probability, two from each number of SplitMix64 (OOPSLA 2014)."""

    def mixed(z: Tensor, shift: int, factor: int) -> Tensor:
        z = z ^ ((z >> shift) & (2 ** (64 - shift) - 1))  # int64, so the shift has to be made a logical one
        return z * (factor - 2**64)

    z = seed + torch.arange(1, (len(out) + 1) // 2 + 1) * (0x9E3779B97F4A7C15 - 2**64)
    z = mixed(mixed(z, 30, 0xBF58476D1CE4E5B9), 27, 0x94D049BB133111EB)
    z = z ^ ((z >> 31) & (2**33 - 1))
    draws = torch.stack([z & (2**32 - 1), (z >> 32) & (2**32 - 1)], 1).flatten()[: len(out)]
    out.masked_fill_(draws < math.ceil(probability * 2**32), 0)
