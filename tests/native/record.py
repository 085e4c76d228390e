"""Writes calls of the C functions to a file, with what each must give: `replay.c` makes them again without Python.

The calls are those of the authors' numbers (`../golden`), drawn ones and large ones (`../test_kernels.py`). What is
expected, and how far a result may be from it, is the twin's in float64 or the authors'; no kernel has a part in it.

    python tests/native/record.py build/native/calls --examples 4
"""

import argparse
import math
import struct
import sys
from pathlib import Path

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_golden as golden
import test_kernels as kernels
from conftest import DTYPES, TOLERANCE

from flora.reference.conv import PADDING_MODES

NONE, NUMBER, INTEGERS, ARRAY, ARRAYS = range(5)
MAX_NDIM = 8
LINE = 64  # bytes: an array keeps its address modulo this


class Call:
    """One call: its arguments by name, and for each output what it must be, to which tolerance of which magnitude.

    `native` is the tolerance of levels that multiply bfloat16 themselves.
    """

    def __init__(self, function, arguments, expected):
        self.function, self.arguments, self.expected = function, arguments, expected
        self.arrays = []  # tensors in the order of their records

    @classmethod
    def of_case(cls, case):
        exact, magnitude = case.expect()
        native = case.dtype == torch.bfloat16 and not case.whole and case.function.startswith("tucker_")
        factor = kernels.ROUNDINGS if native and "reconstruct" not in case.function else 1
        expected = {}
        for name, (view, _, _) in case.outputs.items():
            tolerance = TOLERANCE[view.dtype]
            worst = TOLERANCE[torch.bfloat16] * factor if factor > 1 else tolerance
            expected[name] = exact[name], magnitude[name], tolerance, worst
        return cls(case.function, case.arguments, expected)

    def array(self, name, tensor):
        """The record of a tensor: shape, strides, memory from its first to its last element, what it must become."""
        for at, other in enumerate(self.arrays):
            if other is tensor:  # out is weight
                return struct.pack("<2q", ARRAY, at)
        self.arrays.append(tensor)
        shape, strides = list(tensor.shape), list(tensor.stride())
        span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        memory = tensor.as_strided((span,), (1,)).clone().view(torch.uint8).numpy().tobytes() if span else b""
        rest = [0] * (MAX_NDIM - len(shape))
        head = [DTYPES.index(tensor.dtype), len(shape), *shape, *rest, *strides, *rest]
        head += [tensor.data_ptr() % LINE, len(memory), name in self.expected]
        body = struct.pack(f"<{len(head)}q", *head) + padded(memory)
        if name in self.expected:
            exact, magnitude, tolerance, native = self.expected[name]
            body += struct.pack("<3d", tolerance, native, torch.finfo(tensor.dtype).smallest_normal)
            body += numbers(exact) + numbers(magnitude)
        return struct.pack("<2q", ARRAY, len(self.arrays) - 1) + body

    def argument(self, name, value):
        if value is None:
            return struct.pack("<q", NONE)
        if isinstance(value, Tensor):
            return self.array(name, value)
        if isinstance(value, float):
            return struct.pack("<qd", NUMBER, value)
        if name == "padding_mode":
            value = list(PADDING_MODES).index(value)
        if isinstance(value, int):
            value = (value,)
        if name in ("factors", "d_factors"):
            items = (self.argument(f"{name}/{m}", item) for m, item in enumerate(value))
            return struct.pack("<2q", ARRAYS, len(value)) + b"".join(items)
        return struct.pack(f"<{2 + len(value)}q", INTEGERS, len(value), *value)

    def record(self):
        names = kernels.NAMES[self.function]
        body = b"".join(self.argument(name, self.arguments[name]) for name in names)
        return struct.pack("<56sq", self.function.encode(), len(names)) + body


def padded(memory):
    return memory + bytes(-len(memory) % 8)


def numbers(tensor):
    return tensor.detach().double().contiguous().numpy().tobytes()


# Drawn and large calls -----------------------------------------------------------------------------------------------


def drawn(function, dtype, examples, seed, whole=False):
    """`examples` calls of random shapes, strides and options."""
    calls = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def draw(data):
        case = kernels.Case(function, dtype, data.draw, whole=whole)
        kernels.BUILDERS[function](case)
        calls.append(Call.of_case(case))

    draw()
    return calls


def large(function, sizes, dtype):
    case = kernels.Case(function, dtype)
    kernels.BUILDERS[function](case, *sizes)
    return Call.of_case(case)


# The squares in which a thread turned its rows of this core's gradient reached into another thread's.
SHARED_SQUARES = (2, 1, 5, 3, None, 4, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "zeros", (6, 7))


# The authors' numbers ------------------------------------------------------------------------------------------------


def authors_call(function, dtype, expected, updated=None, **arguments):
    """A call whose outputs are the authors' numbers; those in `updated` are added to, the others hold NaN before."""
    given = dict.fromkeys(kernels.NAMES[function])
    given |= {name: cast(value, dtype) for name, value in arguments.items()}
    wanted = {}
    for name, theirs in expected.items():
        value = (updated or {}).get(name)
        output = torch.full_like(theirs, math.nan, dtype=dtype) if value is None else value.to(dtype, copy=True)
        base, _, index = name.partition("/")
        if index:
            given[base] = given[base] or [None] * len(given["factors"])
            given[base][int(index)] = output
        else:
            given[base] = output
        bound = golden.BOUND[dtype]
        wanted[name] = theirs, theirs.abs().max().expand_as(theirs), bound, bound
    return Call(function, given, wanted)


def cast(value, dtype):
    if isinstance(value, Tensor):
        return value.to(dtype).contiguous()
    return [cast(item, dtype) for item in value] if isinstance(value, list) else value


def authors_tucker(path, dtype):
    """FLoRA's layer: forward, backward, ΔW, and the gradients of its parts from that of the weight."""
    a = golden.load(path, torch.float64)
    weight, x, dy, scale = a["weight"], a["x"], a["dy"], float(a["scale"])
    factors = [a["u_out"], a["u_in"], *(a[f"u_k{i}"] for i in range(weight.ndim - 2))]
    core, d_core = a["core"].transpose(0, 1), a["d_core"].transpose(0, 1)
    theirs = [a["d_u_out"], a["d_u_in"], *(a[f"d_u_k{i}"] for i in range(weight.ndim - 2))]
    d_factors = {f"d_factors/{m}": value for m, value in enumerate(theirs)}
    x.requires_grad_()
    weight.requires_grad_()
    if weight.ndim == 2:
        x, dy, y, dx = (a[name].flatten(0, -2) for name in ("x", "dy", "y", "dx"))
        base = F.linear(x, weight, a.get("bias"))
        parts = {"u_out": factors[0], "u_in": factors[1], "core": core, "scale": scale}
        prefix, gradients = "tucker_linear", {"d_u_out": theirs[0], "d_u_in": theirs[1]}
    else:
        geometry = {k: tuple(int(v) for v in a[k]) for k in ("stride", "padding", "dilation")}
        groups, y, dx = x.shape[1] // weight.shape[1], a["y"], a["dx"]
        conv = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        base = conv(x, weight, a.get("bias"), groups=groups, **geometry)
        parts = {"core": core, "factors": factors, "scale": scale, "groups": groups, "padding_mode": "zeros"}
        parts |= geometry | {"padding": tuple(p for p in geometry["padding"] for _ in range(2))}
        prefix, gradients = "tucker_conv", d_factors
    d_base, d_weight = torch.autograd.grad(base, (x, weight), dy)
    x, base, weight = x.detach(), base.detach(), weight.detach()
    of_weight = {"core": core, "factors": factors, "scale": scale}
    return [
        authors_call(f"{prefix}_forward", dtype, {"y": y}, {"y": base}, x=x, **parts),
        authors_call(
            f"{prefix}_backward",
            dtype,
            {"dx": dx, "d_core": d_core, **gradients},
            {"dx": d_base},
            x=x,
            dy=dy,
            **parts,
        ),
        authors_call("tucker_reconstruct", dtype, {"out": a["delta_weight"]}, **of_weight),
        authors_call(
            "tucker_reconstruct_backward", dtype, {"d_core": d_core, **d_factors}, d_weight=d_weight, **of_weight
        ),
    ]


def authors_linear(name, dtype):
    """SURM's matrices on rows: y and dx; gradients too where they are those of the C function's own arguments."""
    a, _, delta, theirs = golden.build_linear(name, "fused", torch.float64)
    weight, x, dy, y, dx = (a[k].flatten(0, -2) for k in ("weight", "x", "dy", "y", "dx"))
    updated = {"y": F.linear(x, weight, a["bias"]), "dx": dy @ weight}
    _, tensors = delta.parts(weight)
    tensors = [None if t is None else t.detach() for t in tensors]
    if name.startswith("rlrr"):
        row, column = tensors[:2]
        expected = {f"d_{own}": theirs(own, "d_").flatten() for own in ("row", "column")}
        given = {"dy": dy, "x": x, "weight": weight, "row": row, "column": column, "scale": delta.scale}
        return [authors_call("rescale_linear_backward", dtype, expected, **given)]
    if "kronecker" in name:
        parts = {"a": tensors[0], "b": tensors[1], "scale": delta.scale}
        gradients = {f"d_{own}": theirs(own, "d_") for own in ("a", "b")}
        prefix = "kronecker"
    else:
        parts = {"left": tensors[0], "right": tensors[1], "scale": delta.scale}
        gradients, prefix = {}, "toeplitz"
    return [
        authors_call(f"{prefix}_forward", dtype, {"y": y}, updated, x=x, **parts),
        authors_call(f"{prefix}_backward", dtype, {"dx": dx, **gradients}, updated, x=x, dy=dy, **parts),
    ]


def authors():
    for dtype in golden.BOUND:
        for path in golden.FILES:
            yield from authors_tucker(path, dtype)
        for name in golden.LINEAR:
            yield from authors_linear(name, dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--examples", type=int, default=0, help="drawn calls of each function and dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="the large calls of the kernels' tests")
    parser.add_argument("--functions", nargs="+", default=list(kernels.BUILDERS), metavar="NAME", help="these alone")
    parser.add_argument("--golden", action="store_true", help="the authors' numbers")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with options.output.open("wb") as file:

        def write(calls):
            nonlocal count
            for call in calls:
                file.write(call.record())
                count += 1

        file.write(b"floracal")
        if options.golden:
            write(authors())
        if options.examples:
            if "tucker_conv_backward" in options.functions:
                write(large("tucker_conv_backward", SHARED_SQUARES, dtype) for dtype in DTYPES)
            for function in options.functions:
                for dtype in DTYPES:
                    write(drawn(function, dtype, options.examples, options.seed))
                if function.startswith(("tucker_linear", "tucker_conv")):
                    write(drawn(function, torch.bfloat16, options.examples, options.seed, whole=True))
        if options.large:
            for function, sizes in kernels.LARGE:
                if function in options.functions:
                    write(large(function, sizes, dtype) for dtype in (torch.float32, torch.bfloat16))
    print(f"{options.output}: {count} calls, {options.output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
