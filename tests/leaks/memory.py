"""Megabytes that are borrowed and given back again: what the process holds must not grow.

Run by tests/test_boundary.py in a process of its own; by hand: python tests/leaks/memory.py
"""

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import high_water

from flora import _core

SHAPE = (512, 512)  # a megabyte of float32
CORE, FACTORS = torch.ones(1, 1), [torch.ones(512, 1), torch.ones(512, 1)]


class Capsule:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)


def run(make):
    with suppress(ValueError):
        _core.tucker_reconstruct(make(), make(), CORE, FACTORS, 1.0)
    with suppress(ValueError):
        _core.tucker_reconstruct(make(), make(), CORE, FACTORS[:1], 1.0)


KINDS = [
    lambda: torch.ones(SHAPE),
    lambda: np.ones(SHAPE, np.float32),
    lambda: Capsule(torch.ones(SHAPE)),
    lambda: Capsule(np.ones(SHAPE, np.float32)),
    lambda: torch.complex(torch.zeros(SHAPE), torch.ones(SHAPE)).conj().imag,
]

for _ in range(5):
    for kind in KINDS:
        run(kind)
before = high_water.megabytes()
for _ in range(30):
    for kind in KINDS:
        run(kind)
grown = high_water.megabytes() - before
assert grown < 20, f"the process has grown by {grown:.0f} MB"  # one array of one kind kept: 30
