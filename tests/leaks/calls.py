"""Calls that succeed and calls that are refused, over and over: neither objects nor memory may pile up.

Run by tests/test_boundary.py in a process of its own; by hand: python tests/leaks/calls.py
"""

import gc
import itertools
import sys
from contextlib import suppress

import numpy as np
import torch

from flora import _core

ROUNDS = 100
CORE = torch.ones(64)


class Capsule:
    """An array of another framework."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)


class Raising:
    def __dlpack__(self, **keywords):
        raise RuntimeError("no")


class Rubbish:
    def __dlpack__(self, **keywords):
        return "rubbish"


def write(out, weight=None, core=CORE, factors=(None,), scale=1.0):
    _core.tucker_reconstruct(out, weight, core, factors, scale)


def negated():
    return torch.complex(torch.zeros(64), torch.ones(64)).conj().imag


def conv(**changed):
    geometry = {"stride": [1], "padding": [1, 1], "dilation": [1], "groups": 1, "mode": "zeros"} | changed
    y, x, u, core = torch.zeros(1, 3, 5), torch.zeros(1, 2, 5), torch.zeros(2, 2), torch.zeros(2, 2, 3)
    _core.tucker_conv_forward(y, None, x, core, (torch.zeros(3, 2), u, None), 1.0, *geometry.values())


def toeplitz(y):
    _core.toeplitz_forward(y, torch.zeros(3, 4), torch.zeros(2, 8), None, 1.0)


def kronecker(rows=3):
    a, b = torch.ones(2, 3), torch.ones(5, 4)
    _core.kronecker_forward(torch.zeros(3, 10), None, torch.zeros(rows, 12), a, b, 1.0)
    _core.kronecker_backward(
        None, torch.zeros(2, 3), None, Capsule(torch.zeros(3, 10)), torch.zeros(3, 12), None, a, b, 1.0
    )


def rescale(row=4):
    weight = torch.ones(4, 3)
    _core.rescale_reconstruct(torch.zeros(4, 3), weight, torch.ones(row), None, 1.0)
    _core.rescale_backward(torch.zeros(4), None, Capsule(torch.zeros(4, 3)), weight, torch.ones(4), None, 1.0)


CALLS = {
    "tensors": lambda: write(torch.zeros(64), torch.zeros(64)),
    "arrays": lambda: write(np.zeros(64, np.float32), np.zeros(64, np.float32)),
    "capsules": lambda: write(Capsule(torch.zeros(64)), Capsule(np.zeros(64, np.float32))),
    "a negated input": lambda: write(torch.zeros(64), negated()),
    "a negated output": lambda: write(negated()),
    "a late refusal": lambda: write(Capsule(torch.zeros(64)), Capsule(torch.zeros(64)), 1.0),
    "a kernel's refusal": lambda: write(Capsule(torch.zeros(64)), Capsule(torch.zeros(63))),
    "no scale": lambda: write(torch.zeros(64), scale="1"),
    "too many factors": lambda: write(torch.zeros(64), factors=[None] * 9),
    "no factors": lambda: write(torch.zeros(64), factors=3),
    "a wrong factor": lambda: write(torch.zeros(64), factors=[Capsule(torch.zeros(64, 1)), "x"]),
    "a producer that raises": lambda: write(Raising()),
    "rubbish": lambda: write(Rubbish()),
    "meta": lambda: write(torch.zeros(64, device="meta")),
    "requires grad": lambda: write(torch.zeros(64, requires_grad=True)),
    "read-only": lambda: write(np.broadcast_to(np.float32(1), 64)),
    "a subclass": lambda: write(np.ma.zeros(64, np.float32)),
    "a wrong dtype": lambda: write(torch.zeros(64, dtype=torch.int64)),
    "a convolution": conv,
    "a Toeplitz matrix": lambda: toeplitz(torch.zeros(3, 5)),
    "a wrong Toeplitz matrix": lambda: toeplitz(Capsule(torch.zeros(3, 4))),
    "a wrong stride": lambda: conv(stride=[1.5]),
    "a huge group": lambda: conv(groups=2**80),
    "a wrong mode": lambda: conv(mode="same"),
    "a Kronecker product": kronecker,
    "a wrong number of rows": lambda: kronecker(2),
    "a rescaled weight": rescale,
    "a wrong row": lambda: rescale(3),
    "a wrong isa": lambda: _core.set_isa("v9"),
    "info": lambda: _core.info(),
}


def blocks(call):
    for _ in range(ROUNDS):
        with suppress(TypeError, ValueError, BufferError):
            call()
    gc.collect()
    return sys.getallocatedblocks()


for name, call in CALLS.items():
    blocks(call)  # caches fill
    watched = (CORE, None, torch.Tensor, np.ndarray, "no")
    counts = [sys.getrefcount(thing) for thing in watched]
    levels = [blocks(call) for _ in range(4)]
    grown = min(after - before for before, after in itertools.pairwise(levels))  # a leak grows every time, a table once
    assert grown < ROUNDS // 2, f"{name}: {grown} blocks in {ROUNDS} calls"
    for thing, count in zip(watched, counts, strict=True):
        more = sys.getrefcount(thing) - count
        assert abs(more) < ROUNDS // 2, f"{name}: {more} references to {thing!r} in {ROUNDS} calls"
