"""Megabytes that are borrowed and given back again: what the process holds must not grow.

Run by tests/test_boundary.py in a process of its own; by hand: python tests/leaks/memory.py
"""

import resource
from contextlib import suppress

import numpy as np
import torch

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
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(30):
    for kind in KINDS:
        run(kind)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert grown < 30, f"the process has grown by {grown:.0f} MB"  # leaking one kind: 60 or more
