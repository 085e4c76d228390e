"""Every C function, over and over, in calls that succeed and calls that are refused: nothing may pile up.

For each function and each way that a call can end: the references to its arguments, the blocks of Python's allocator,
the bytes of C's and the memory of the process. Run in a short form by tests/test_boundary.py, in a process of its own;
all of it: python tests/leaks/calls.py --calls 100000
"""

import argparse
import ctypes
import gc
import itertools
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import dlpack
import test_kernels as kernels

from flora import _core

CONV = (1, 1, 2, 3, 2, 2, (3,), (1,), (1, 1), (1,), "zeros", (5,))
SIZES = {
    "drop": (7,),
    "multiply": (3, 4, 5),
    "tucker_linear_forward": (3, 4, 5, 2, 3),
    "tucker_linear_backward": (3, 4, 5, 2, 3),
    "tucker_conv_forward": CONV,
    "tucker_conv_backward": CONV,
    "conv_weight_gradient": CONV,
    "conv_input_gradient": (1, 3, 2, (1, 1, 1, 1), (5, 4)),
    "tucker_reconstruct": (3, 4),
    "tucker_reconstruct_backward": (3, 4),
    "kronecker_forward": (3, 2, 3, 4, 5),
    "kronecker_backward": (3, 2, 3, 4, 5),
    "kronecker_reconstruct": (2, 3, 4, 5),
    "kronecker_reconstruct_backward": (2, 3, 4, 5),
    "rescale_reconstruct": (3, 4),
    "rescale_backward": (3, 4),
    "rescale_linear_backward": (3, 4, 5),
    "toeplitz_forward": (3, 4, 5, 3, 2),
    "toeplitz_backward": (3, 4, 5, 3, 2),
    "toeplitz_reconstruct": (4, 5, 3, 2),
    "toeplitz_reconstruct_backward": (4, 5, 3, 2),
}


class Wrapped:
    """An array of another framework."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)


class Raising:
    def __dlpack__(self, **keywords):
        raise RuntimeError("no")


class Giving:
    def __init__(self, value):
        self.value = value

    def __dlpack__(self, **keywords):
        return self.value


class Endless:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise IndexError(index)


FRAMEWORK = dlpack.framework(dlpack.Producer)


def exported(array):
    """An array of a framework with an exchange API of its own."""
    producer = FRAMEWORK(tuple(array.shape), array.stride(), data=array.data_ptr())
    producer.array = array
    return producer


def negated(array):
    return torch.complex(torch.zeros_like(array), -array).conj().imag


def read_only(array):
    return np.broadcast_to(np.float32(1), tuple(array.shape))


def tracked(array):
    return array.clone().requires_grad_()


def used():
    producer = dlpack.Producer((1,), (1,), name=b"used_dltensor_versioned")
    again = Giving(producer.__dlpack__(max_version=(1, 0)))
    again.producer = producer
    return again


TAKEN = {  # of every array
    "tensors": lambda array: array,
    "arrays": lambda array: array.numpy(),
    "capsules": Wrapped,
    "NumPy's capsules": lambda array: Wrapped(array.numpy()),
    "an exchange table": exported,
}
TAKEN_INPUTS = {"negated inputs": negated, "inputs that require grad": tracked}
REFUSED = {  # of one array at a time
    "no array": lambda array: 1.0,
    "a producer that raises": lambda array: Raising(),
    "no capsule": lambda array: Giving("rubbish"),
    "a used capsule": lambda array: used(),
    "another version": lambda array: dlpack.Producer((1,), (1,), version=(2, 0)),
    "another dtype": lambda array: array.long(),
    "another shape": lambda array: Wrapped(torch.zeros([n + 1 for n in array.shape])),
    "nine dimensions": lambda array: torch.zeros([1] * 9),
    "no memory": lambda array: torch.zeros(array.shape, device="meta"),
    "a subclass": lambda array: np.ma.zeros(tuple(array.shape), np.float32),
}
REFUSED_OUTPUTS = {"a negated output": negated, "a read-only output": read_only, "a tracked output": tracked}
ODD = ("no", None, 2**80, (1.5,), [1] * 9, Endless(), object())


def with_item(arguments, index, change):
    """The arguments with one array changed, which may be in a list."""
    arguments = list(arguments)
    if isinstance(index, tuple):
        arguments[index[0]] = list(arguments[index[0]])
        arguments[index[0]][index[1]] = change(arguments[index[0]][index[1]])
    else:
        arguments[index] = change(arguments[index])
    return arguments


def ways(function):
    """The argument lists of every way that a call of the function can go."""
    case = kernels.Case(function, torch.float32)
    kernels.BUILDERS[function](case, *SIZES[function])
    names = kernels.NAMES[function]
    arguments = [case.arguments.get(name) for name in names]
    arrays, outputs = [], []
    for index, (name, value) in enumerate(zip(names, arguments, strict=True)):
        items = [(index, i) for i in range(len(value))] if isinstance(value, list) else [index]
        for i, place in enumerate(items):
            array = value[i] if isinstance(value, list) else value
            if isinstance(array, torch.Tensor):
                arrays.append(place)
                if (f"{name}/{i}" if isinstance(value, list) else name) in case.outputs:
                    outputs.append(place)
    inputs = [place for place in arrays if place not in outputs]
    for name, change in TAKEN.items():
        every = arguments
        for place in arrays:
            every = with_item(every, place, change)
        yield name, [every], True
    for name, change in TAKEN_INPUTS.items():
        if inputs:
            yield name, [with_item(arguments, place, change) for place in inputs], True
    for changes, places in ((REFUSED, arrays), (REFUSED_OUTPUTS, outputs)):
        for name, change in changes.items():
            yield name, [with_item(arguments, place, change) for place in places], False
    capsules = arguments
    for place in arrays:
        capsules = with_item(capsules, place, Wrapped)
    others = [index for index in range(len(names)) if not isinstance(arguments[index], torch.Tensor)]
    odd = [with_item(capsules, index, lambda _, thing=thing: thing) for index in others for thing in ODD]
    if odd:
        yield "other things", odd, False
    yield "another number of arguments", [capsules[:-1], [*capsules, None]], False


REFUSALS = (TypeError, ValueError, BufferError)


class Heap(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in ("arena", "a", "b", "c", "mapped", "d", "e", "used", "f", "g"))


def c_bytes():
    """What C's allocator has given out; 0 where it cannot tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = Heap
    heap = mallinfo()
    return heap.used + heap.mapped


def resident():
    """Bytes of the process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * 4096


def things(calls):
    """Everything that the calls are given."""
    for arguments in calls:
        for value in arguments:
            yield value
            if isinstance(value, list):
                yield from value


def check(name, call, calls, count):
    """Makes ``count`` calls in four rounds: a leak grows in every one of them, a cache in one."""

    def levels():
        for _ in range(max(1, count // 4 // len(calls))):
            for arguments in calls:
                call(arguments)
        gc.collect()
        return sys.getallocatedblocks(), c_bytes(), resident()

    levels()
    watched = list({id(thing): thing for thing in (*things(calls), torch.Tensor, np.ndarray)}.values())
    before = [sys.getrefcount(thing) for thing in watched]
    found = [levels() for _ in range(4)]
    blocks, used_bytes, pages = (min(b - a for a, b in itertools.pairwise(of)) for of in zip(*found, strict=True))
    made = max(1, count // 4 // len(calls)) * len(calls)
    limit = max(32, made // 200)  # what this keeps of each round are some blocks itself
    assert blocks < limit, f"{name}: {blocks} blocks in {made} calls"
    assert used_bytes < 16 * limit, f"{name}: {used_bytes} bytes in {made} calls"
    assert pages < max(1 << 20, 16 * limit), f"{name}: the process has grown by {pages} bytes in {made} calls"
    for thing, references in zip(watched, before, strict=True):
        more = sys.getrefcount(thing) - references
        assert abs(more) < limit, f"{name}: {more} references to {type(thing).__name__} in {4 * made} calls"
    return 5 * made


def check_function(function, count):
    run, total, kinds = getattr(_core, function), 0, 0

    def taken(arguments):
        run(*arguments)

    def refused(arguments):
        with suppress(*REFUSALS):
            run(*arguments)

    for way, calls, succeeds in ways(function):
        if not succeeds:  # what is taken after all (None for a scale's place, say) is no refusal
            calls = [arguments for arguments in calls if is_refused(run, arguments)]
        if calls:
            total += check(f"{function}, {way}", taken if succeeds else refused, calls, count)
            kinds += 1
    return total, kinds


def is_refused(run, arguments):
    try:
        run(*arguments)
    except REFUSALS:
        return True
    return False


def about_the_library():
    """Those that are given no arrays, or ask about them."""
    x = torch.ones(3)
    taken = {
        "info": lambda _: _core.info(),
        "set_isa": lambda _: _core.set_isa(_core.info()["isa"]),
        "takes": lambda _: _core.takes(x, x, None, (x, None)),
        "takes, and refuses": lambda _: _core.takes(x, x, 1.0, (x.numpy(),)),
    }
    refused = {
        "set_isa, another name": lambda _: _core.set_isa("v9"),
        "set_isa, no name": lambda _: _core.set_isa(3),
        "takes, no tuple": lambda _: _core.takes(x, x, None, [x]),
    }

    def quietly(call):
        def attempt(arguments):
            with suppress(*REFUSALS):
                call(arguments)

        return attempt

    return taken | {name: quietly(call) for name, call in refused.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=200, help="of every function for every way that a call can end")
    parser.add_argument("functions", nargs="*", help="all, unless some are named")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what the modules hold, which every collection would look through again
    missing = set(kernels.NAMES) - set(SIZES)
    assert not missing, f"no sizes for {missing}"
    total = kinds = 0
    for function in options.functions or SIZES:
        made, of_function = check_function(function, options.calls)
        total, kinds = total + made, kinds + of_function
        print(f"{function}: {made} calls that end in {of_function} ways", flush=True)
    for name, call in about_the_library().items() if not options.functions else ():
        total, kinds = total + check(name, call, [()], options.calls), kinds + 1
    print(f"{total} calls that end in {kinds} ways: nothing piles up")


if __name__ == "__main__":
    main()
