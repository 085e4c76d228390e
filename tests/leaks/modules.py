"""Extension modules that are made, used and dropped: their state goes with them.

Run by tests/test_boundary.py in a process of its own; by hand: python tests/leaks/modules.py
"""

import gc
import importlib.util
import sys
import weakref

import torch

from flora import _core


def make():
    spec = importlib.util.spec_from_file_location("flora._core", _core.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = torch.zeros(4)
    module.tucker_reconstruct(out, None, torch.ones(4), [None], 2.0)
    assert out.tolist() == [2, 2, 2, 2]
    return weakref.ref(module)


for _ in range(50):
    make()
gc.collect()
before = sys.getrefcount(torch.Tensor)
modules = [make() for _ in range(200)]
gc.collect()
assert all(module() is None for module in modules)
assert sys.getrefcount(torch.Tensor) - before < 20
