"""Every function of `flora._core` beside its twin in `flora.reference`, which runs in float64 on the same numbers.

A case is drawn by the builder of its function: shapes, layouts in memory, which arguments are None, geometry. Outputs
lie inside larger buffers of a guard value. The error allowed to an element is `TOLERANCE` times the sum of the
magnitudes of its terms, which is what the twin gives for the absolute values of all arguments. Where the CPU multiplies
bfloat16 itself, the operands on the way to it are rounded too; small whole numbers are not, so `TOLERANCE` holds.
"""

import inspect
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import NATIVE_BFLOAT16, TOLERANCE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flora import _core, reference
from flora.functional import compute_dtype
from flora.reference.conv import PADDING_MODES

NAMES = {
    name: tuple(inspect.signature(getattr(reference, name)).parameters)
    for name in dir(_core)
    if name[0] != "_" and name not in ("info", "set_isa", "takes", "ArrayError")
}
GUARD = 7.25
DIMS = st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65))  # around the widths of vectors
RANKS = DIMS.filter(bool)
SMALL = st.integers(1, 3)
FEW = st.sampled_from((0, 1, 2, 3, 5, 8, 16, 17, 33))
ROUNDINGS = 6  # of y or dx, the longest ways: a factor, its product, the core, its product, a factor, the result

# Cases ---------------------------------------------------------------------------------------------------------------


class Case:
    """The arguments of one call by name, in the twin's order, and the memory around its outputs."""

    def __init__(self, function, dtype, draw=None, seed=0, whole=False):
        self.function, self.dtype, self.real, self.whole = function, dtype, compute_dtype(dtype), whole
        self.draw = draw
        self.random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)) if draw else seed)
        self.arguments = {}
        self.outputs = {}  # name: (the view, the buffer around it, which elements of that are the view's)

    def flip(self):
        return self.draw(st.booleans()) if self.draw else True

    def normal(self, *shape, dtype):
        """Or, if ``whole``, a few ±1 among zeros, so that all sums over ranks and channels are below 256."""
        numbers = torch.randn(*shape, generator=self.random, dtype=torch.float64)
        return ((numbers / 1.5).trunc() if self.whole else numbers / 2).to(dtype)

    def view(self, shape, dtype, kinds):
        """Uninitialised memory and a view of that shape into it."""
        kind = self.draw(st.sampled_from(kinds)) if self.draw else kinds[0]
        if kind == "overlapping":
            buffer = torch.empty(sum(n - 1 for n in shape if n) + 1, dtype=dtype)
            return buffer, buffer.as_strided(shape, [1] * len(shape))
        offset = self.draw(st.integers(1, 5)) if kind == "offset" else 0
        order = self.draw(st.permutations(range(len(shape)))) if kind == "permuted" else range(len(shape))
        steps = [self.draw(SMALL) if kind == "gaps" else 1 for _ in shape]
        stored = [1 if kind == "expanded" and self.flip() else n * k for n, k in zip(shape, steps, strict=True)]
        buffer = torch.empty(offset + math.prod(stored) + 3, dtype=dtype)
        view = buffer[offset : offset + math.prod(stored)].view([stored[i] for i in order])
        view = view.permute([list(order).index(i) for i in range(len(shape))])
        return buffer, view[tuple(slice(None, None, k) for k in steps)].expand(shape)

    def scale(self):
        return self.draw(st.sampled_from((1.0, -0.5, 2.0, 0.0))) if self.draw else 0.75

    def input(self, *shape, dtype=None):
        kinds = ("contiguous", "offset", "permuted", "gaps", "expanded", "overlapping")
        buffer, view = self.view(shape, dtype or self.real, kinds)
        buffer.copy_(self.normal(buffer.numel(), dtype=buffer.dtype))
        return view

    def output(self, name, *shape, dtype=None, update=False):
        """Holds numbers that the function adds to, or NaN that it has to overwrite."""
        buffer, view = self.view(shape, dtype or self.real, ("contiguous", "offset", "permuted", "gaps"))
        buffer.fill_(GUARD)
        view.copy_(self.normal(*shape, dtype=buffer.dtype) if update else torch.full(shape, math.nan))
        inside = torch.zeros_like(buffer, dtype=torch.bool)
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        self.outputs[name] = view, buffer, inside
        return view

    def call(self, implementation, change=lambda tensor: tensor):
        """Calls with every tensor changed; gives the outputs, which are copies if ``change`` copies."""

        def changed(value):
            if isinstance(value, Tensor):
                return change(value)
            return [changed(item) for item in value] if isinstance(value, list) else value

        arguments = {name: changed(value) for name, value in self.arguments.items()}
        getattr(implementation, self.function)(*(arguments[name] for name in NAMES[self.function]))
        found = {}
        for name in self.outputs:
            base, _, index = name.partition("/")
            found[name] = arguments[base][int(index)] if index else arguments[base]
        return found

    def expect(self):
        """The exact outputs and the sums of the magnitudes of their terms, in float64."""
        exact = self.call(reference, lambda t: t.double().clone(memory_format=torch.contiguous_format))
        arguments = self.arguments
        self.arguments = arguments | {"scale": abs(arguments.get("scale", 1.0))}
        if self.function == "conv_input_gradient":  # a tap is filtered together with the other eight
            of_taps = arguments["weight"].abs().amax((2, 3), keepdim=True)
            self.arguments["weight"] = of_taps.expand_as(arguments["weight"])
        magnitude = self.call(reference, lambda t: t.double().abs().clone(memory_format=torch.contiguous_format))
        self.arguments = arguments
        if self.function.startswith("toeplitz"):  # transforms and sums along diagonals mix an array's numbers
            magnitude = {
                name: sums.amax().expand_as(sums) if sums.numel() else sums for name, sums in magnitude.items()
            }
        return exact, magnitude

    def check(self):
        """Runs the C function and compares every output, and that nothing around one was written."""
        exact, magnitude = self.expect()
        before = {name: buffer.clone() for name, (_, buffer, _) in self.outputs.items()}
        try:
            found = self.call(_core)
        except ValueError as error:  # a layout that no body writes
            if "stride" not in str(error):
                raise
            assert any(view.stride() != torch.empty(view.shape).stride() for view, _, _ in self.outputs.values())
            for name, (_, buffer, _) in self.outputs.items():
                assert same_bits(buffer, before[name])
            return
        for name, (_, buffer, inside) in self.outputs.items():
            assert (buffer[~inside] == GUARD).all(), f"{name}: written outside"
            assert_close(name, found[name], exact[name], magnitude[name], self.tolerance(found[name].dtype))

    def tolerance(self, dtype):
        native = self.dtype == torch.bfloat16 and _core.info()["isa"] in NATIVE_BFLOAT16
        if native and not self.whole and self.function.startswith(("tucker_linear", "tucker_conv")):
            return ROUNDINGS * TOLERANCE[torch.bfloat16]
        return TOLERANCE[dtype]


def assert_close(name, found, exact, magnitude, tolerance):
    allowed = tolerance * magnitude + torch.finfo(found.dtype).smallest_normal
    error = (found.double() - exact).abs()
    assert (error <= allowed).all(), f"{name}: error {float((error / allowed).max())} times the tolerance"


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def linear(case, rows, d_in, d_out, r_in, r_out):
    a = case.arguments
    a["x"] = case.input(rows, d_in, dtype=case.dtype)
    a["u_in"] = case.input(d_in, r_in)
    a["core"] = case.input(r_out, r_in) if r_in != r_out or case.flip() else None
    a["u_out"] = case.input(d_out, r_out)
    a["scale"] = case.scale()


def linear_sizes(case):
    rows, d_in, d_out, r_in = (case.draw(sizes) for sizes in (DIMS, DIMS, DIMS, RANKS))
    return rows, d_in, d_out, r_in, case.draw(st.just(r_in) | RANKS)


def linear_forward(case, *sizes):
    rows, d_in, d_out, r_in, r_out = sizes or linear_sizes(case)
    linear(case, rows, d_in, d_out, r_in, r_out)
    case.arguments["y"] = case.output("y", rows, d_out, dtype=case.dtype, update=True)
    case.arguments["h"] = case.output("h", rows, r_in) if case.flip() else None


def linear_backward(case, *sizes):
    rows, d_in, d_out, r_in, r_out = sizes or linear_sizes(case)
    linear(case, rows, d_in, d_out, r_in, r_out)
    a = case.arguments
    a["dy"] = case.input(rows, d_out, dtype=case.dtype)
    gradients(case, a["x"].double() @ a["u_in"].double())


def gradients(case, h):
    """Any subset of the outputs of tucker_linear_backward."""
    a = case.arguments
    for name in ("u_in", "core", "u_out"):
        wanted = a[name] is not None and case.flip()
        a[f"d_{name}"] = case.output(f"d_{name}", *a[name].shape) if wanted else None
    input_gradients(case, h, a["d_u_in"] is None)


def input_gradients(case, h, without_x):
    """dx or not; h or not, and no x where it may be left out."""
    a = case.arguments
    a["dx"] = case.output("dx", *a["x"].shape, dtype=case.dtype, update=True) if case.flip() else None
    a["h"] = h.to(case.real) if case.flip() else None
    if without_x and a["h"] is not None and case.flip():
        a["x"] = None


def factor_gradients(case):
    return [
        case.output(f"d_factors/{m}", *factor.shape) if factor is not None and case.flip() else None
        for m, factor in enumerate(case.arguments["factors"])
    ]


def convolution(case, sizes, direct=False):
    """Everything but y, dy and h; gives the shape of y. ``direct``: perhaps, or with r_in=None, without U_in."""
    a = case.arguments
    if sizes:
        batch, groups, c_in, c_out, r_in, r_out, kernel, stride, padding, dilation, mode, extents = sizes
    else:
        n = case.draw(SMALL)
        batch, groups = case.draw(st.integers(0, 3)), case.draw(st.sampled_from((1, 1, 2, 3)))
        channels = st.sampled_from((1, 2, 3, 5, 8, 17, 33)) if n < 3 else SMALL
        c_in, c_out, r_in, r_out = (case.draw(channels) for _ in range(4))
        r_in = None if direct and case.flip() else r_in
        kernel, stride, dilation = (case.draw(st.tuples(*[SMALL] * n)) for _ in range(3))
        padding = case.draw(st.tuples(*[st.integers(0, 2)] * (2 * n)))
        mode = case.draw(st.sampled_from(tuple(PADDING_MODES)))
        extents = []
        for k, d, before, after in zip(kernel, dilation, padding[::2], padding[1::2], strict=True):
            least = {"reflect": 1 + max(before, after), "circular": max(before, after)}.get(mode, 1)
            extents.append(
                case.draw(st.sampled_from((0, 0, 1, 3, 6))) + max(1, least, d * (k - 1) + 1 - before - after)
            )
    a["x"] = case.input(batch, groups * c_in, *extents, dtype=case.dtype)
    of_kernel = [case.input(k, case.draw(SMALL) if case.draw else 2) if case.flip() else None for k in kernel]
    ranks = [k if u is None else u.shape[1] for k, u in zip(kernel, of_kernel, strict=True)]
    a["core"] = case.input(r_out, c_in if r_in is None else r_in, *ranks)
    u_in = None if r_in is None else case.input(c_in, r_in)
    a["factors"] = [case.input(groups * c_out, r_out), u_in, *of_kernel]
    a |= {"scale": case.scale(), "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    a["padding_mode"] = mode
    geometry = zip(extents, kernel, stride, dilation, padding[::2], padding[1::2], strict=True)
    return batch, groups * c_out, *((m + p + q - d * (k - 1) - 1) // s + 1 for m, k, s, d, p, q in geometry)


def conv_h(case):
    a = case.arguments
    _, u_in, *u_k = (None if u is None else u.double() for u in a["factors"])
    h = reference.pad_input(reference.conv_project(a["x"].double(), u_in, a["groups"]), a["padding"], a["padding_mode"])
    if u_in is None:
        core = reference.reconstruct(a["core"].double(), [None, None, *u_k], 1.0)
        h = reference.conv_core(h, core, a["stride"], a["dilation"], a["groups"])
    return h.movedim(1, -1)


def conv_forward(case, *sizes):
    shape = convolution(case, sizes, direct=True)
    case.arguments["y"] = case.output("y", *shape, dtype=case.dtype, update=True)
    case.arguments["h"] = case.output("h", *conv_h(case).shape) if case.flip() else None


def conv_backward(case, *sizes):
    shape = convolution(case, sizes, direct=True)
    a = case.arguments
    a["dy"] = case.input(*shape, dtype=case.dtype)
    a["d_core"] = case.output("d_core", *a["core"].shape) if case.flip() else None
    a["d_factors"] = factor_gradients(case)
    if a["factors"][1] is not None:
        input_gradients(case, conv_h(case), a["d_factors"][1] is None)
        return
    of_x = any(d is not None for d in (a["d_core"], *a["d_factors"][1:]))
    like = a["x"]
    input_gradients(case, conv_h(case), not of_x)
    if a["dx"] is None:
        a["x"] = like


def weight_gradient(case, *sizes):
    shape = convolution(case, sizes)
    a = case.arguments
    u_out, u_in, *of_kernel = a.pop("factors")
    ranks = a.pop("core").shape[2:]
    kernel = [r if u is None else u.shape[0] for r, u in zip(ranks, of_kernel, strict=True)]
    a["dy"] = case.input(*shape, dtype=case.dtype)
    a["d_weight"] = case.output("d_weight", u_out.shape[0], u_in.shape[0], *kernel)


def input_gradient(case, *sizes):
    if not sizes:
        padding = case.draw(st.tuples(*[st.integers(0, 3)] * 4))
        extents = [case.draw(st.integers(max(1, 3 - sum(padding[2 * i : 2 * i + 2])), 21)) for i in range(2)]
        sizes = (case.draw(st.integers(0, 3)), case.draw(DIMS), case.draw(DIMS), padding, extents)
    batch, d_out, d_in, padding, extents = sizes
    out = [n + padding[2 * i] + padding[2 * i + 1] - 2 for i, n in enumerate(extents)]
    case.arguments |= {
        "dx": case.output("dx", batch, d_in, *extents),
        "dy": case.input(batch, d_out, *out),
        "weight": case.input(d_out, d_in, 3, 3),
        "padding": padding,
    }


def tucker(case, dims):
    """A core and its factors; order 1 to 5."""
    a = case.arguments
    if not dims:
        order = case.draw(st.integers(1, 5))
        dims = case.draw(st.tuples(*[DIMS if order <= 2 else st.integers(0, 9 if order == 3 else 4)] * order))
        ranks = case.draw(st.tuples(*[RANKS if order <= 2 else SMALL] * order))
        dense = [case.flip() for _ in dims]
    else:
        ranks, dense = [max(1, d // 2) for d in dims], [True] * len(dims)
    a["factors"] = [case.input(d, r) if use else None for d, r, use in zip(dims, ranks, dense, strict=True)]
    a["core"] = case.input(*(r if use else d for d, r, use in zip(dims, ranks, dense, strict=True)))
    a["scale"] = case.scale()
    return dims


def reconstruct(case, *dims):
    weight_and_out(case, *tucker(case, dims))


def weight_and_out(case, *dims):
    """A weight or none, and an output, which may be the weight."""
    same = case.draw is not None and case.flip()
    out = case.output("out", *dims, dtype=case.dtype, update=same)
    case.arguments["out"] = out
    if same:
        case.arguments["weight"] = out
    else:
        case.arguments["weight"] = case.input(*dims, dtype=case.dtype) if case.flip() else None


def reconstruct_backward(case, *dims):
    dims = tucker(case, dims)
    a = case.arguments
    a["d_weight"] = case.input(*dims, dtype=case.dtype)
    a["d_core"] = case.output("d_core", *a["core"].shape) if case.flip() else None
    a["d_factors"] = factor_gradients(case)


def kronecker(case, sizes):
    """A and B; gives their extents p, q, m and n."""
    p, q, m, n = sizes or [case.draw(FEW) for _ in range(4)]
    a = case.arguments
    a["a"], a["b"], a["scale"] = case.input(p, q), case.input(m, n), case.scale()
    return p, q, m, n


def kronecker_forward(case, rows=None, *sizes):
    rows = case.draw(DIMS) if rows is None else rows
    p, q, m, n = kronecker(case, sizes)
    a = case.arguments
    a["x"] = case.input(rows, n * q, dtype=case.dtype)
    a["y"] = case.output("y", rows, m * p, dtype=case.dtype, update=True)
    a["h"] = case.output("h", rows, n * p) if case.flip() else None


def kronecker_backward(case, rows=None, *sizes):
    rows = case.draw(DIMS) if rows is None else rows
    p, q, m, n = kronecker(case, sizes)
    a = case.arguments
    a["x"] = case.input(rows, n * q, dtype=case.dtype)
    a["dy"] = case.input(rows, m * p, dtype=case.dtype)
    for name in ("a", "b"):
        a[f"d_{name}"] = case.output(f"d_{name}", *a[name].shape) if case.flip() else None
    projected = (a["x"].double().unflatten(-1, (n, q)) @ a["a"].double().mT).flatten(1)
    input_gradients(case, projected, a["d_a"] is None)


def weight_of(case, *dims):
    """out, and the weight: out itself, another array or, where it may be left out, None."""
    same = case.draw is not None and case.flip()
    case.arguments["out"] = out = case.output("out", *dims, dtype=case.dtype, update=same)
    case.arguments["weight"] = out if same else case.input(*dims, dtype=case.dtype)
    return same


def kronecker_reconstruct(case, *sizes):
    p, q, m, n = kronecker(case, sizes)
    if not weight_of(case, m * p, n * q) and not case.flip():
        case.arguments["weight"] = None


def kronecker_reconstruct_backward(case, *sizes):
    p, q, m, n = kronecker(case, sizes)
    a = case.arguments
    a["d_weight"] = case.input(m * p, n * q, dtype=case.dtype)
    for name in ("a", "b"):
        a[f"d_{name}"] = case.output(f"d_{name}", *a[name].shape) if case.flip() else None


def rescale(case, dims):
    """Row and column; gives the extents of the weight."""
    if not dims:
        order = case.draw(st.integers(2, 5))
        dims = case.draw(st.tuples(*[DIMS if order <= 2 else st.integers(0, 9 if order == 3 else 4)] * order))
    a = case.arguments
    a["row"] = case.input(dims[0]) if case.flip() else None
    a["column"] = case.input(dims[1]) if case.flip() else None
    a["scale"] = case.scale()
    return dims


def rescale_reconstruct(case, *dims):
    weight_of(case, *rescale(case, dims))


def rescale_backward(case, *dims):
    dims = rescale(case, dims)
    a = case.arguments
    a["weight"] = case.input(*dims, dtype=case.dtype)
    a["d_weight"] = case.input(*dims, dtype=case.dtype if case.flip() else case.real)
    scale_gradients(case)


def scale_gradients(case):
    a = case.arguments
    for name in ("row", "column"):
        wanted = a[name] is not None and case.flip()
        a[f"d_{name}"] = case.output(f"d_{name}", *a[name].shape) if wanted else None


def toeplitz(case, d_out, d_in, inner, terms):
    """Diagonals of products, or of single matrices if ``inner`` is None."""
    a = case.arguments
    a["left"] = case.input(terms, max(0, d_out + (d_in if inner is None else inner) - 1))
    a["right"] = None if inner is None else case.input(terms, inner + d_in - 1)
    a["scale"] = case.scale()


def toeplitz_sizes(case):
    d_out, d_in, inner = case.draw(DIMS), case.draw(DIMS), case.draw(RANKS)
    return d_out, d_in, inner if case.flip() else None, case.draw(st.sampled_from((1, 1, 2, 3, 17)))


def toeplitz_gradients(case):
    a = case.arguments
    for name in ("left", "right"):
        wanted = a[name] is not None and case.flip()
        a[f"d_{name}"] = case.output(f"d_{name}", *a[name].shape) if wanted else None


def toeplitz_reconstruct(case, *sizes):
    d_out, d_in, inner, terms = sizes or toeplitz_sizes(case)
    toeplitz(case, d_out, d_in, inner, terms)
    weight_and_out(case, d_out, d_in)


def toeplitz_reconstruct_backward(case, *sizes):
    d_out, d_in, inner, terms = sizes or toeplitz_sizes(case)
    toeplitz(case, d_out, d_in, inner, terms)
    case.arguments["d_weight"] = case.input(d_out, d_in, dtype=case.dtype)
    toeplitz_gradients(case)


def toeplitz_forward(case, *sizes):
    rows, d_out, d_in, inner, terms = sizes or (case.draw(DIMS), *toeplitz_sizes(case))
    toeplitz(case, d_out, d_in, inner, terms)
    case.arguments["x"] = case.input(rows, d_in, dtype=case.dtype)
    case.arguments["y"] = case.output("y", rows, d_out, dtype=case.dtype, update=True)


def toeplitz_backward(case, *sizes):
    rows, d_out, d_in, inner, terms = sizes or (case.draw(DIMS), *toeplitz_sizes(case))
    toeplitz(case, d_out, d_in, inner, terms)
    toeplitz_gradients(case)
    a = case.arguments
    a["dy"] = case.input(rows, d_out, dtype=case.dtype)
    a["dx"] = case.output("dx", rows, d_in, dtype=case.dtype, update=True) if case.flip() else None
    without_x = a["d_left"] is None and a["d_right"] is None and case.flip()
    a["x"] = None if without_x else case.input(rows, d_in, dtype=case.dtype)


def rescale_linear_backward(case, *sizes):
    rows, d_out, d_in = sizes or [case.draw(DIMS) for _ in range(3)]
    rescale(case, (d_out, d_in))
    a = case.arguments
    a["weight"] = case.input(d_out, d_in, dtype=case.dtype)
    a["dy"], a["x"] = case.input(rows, d_out, dtype=case.dtype), case.input(rows, d_in, dtype=case.dtype)
    scale_gradients(case)


def drop(case, n=None):
    n = case.draw(st.integers(0, 70)) if n is None else n
    case.output("out", n, dtype=case.dtype, update=True)
    probability = case.draw(st.floats(0, 1)) if case.draw else 0.3
    seed = case.draw(st.integers(-(2**63), 2**63 - 1)) if case.draw else 5
    case.arguments |= {"out": case.outputs["out"][0], "probability": probability, "seed": seed}


def multiply(case, *sizes):
    m, k, n = sizes or [case.draw(DIMS) for _ in range(3)]
    case.arguments |= {
        "out": case.output("out", m, n),
        "a": case.input(m, k),
        "b": case.input(k, n),
    }


BUILDERS = {
    "drop": drop,
    "multiply": multiply,
    "tucker_linear_forward": linear_forward,
    "tucker_linear_backward": linear_backward,
    "tucker_conv_forward": conv_forward,
    "tucker_conv_backward": conv_backward,
    "conv_weight_gradient": weight_gradient,
    "conv_input_gradient": input_gradient,
    "tucker_reconstruct": reconstruct,
    "tucker_reconstruct_backward": reconstruct_backward,
    "kronecker_forward": kronecker_forward,
    "kronecker_backward": kronecker_backward,
    "kronecker_reconstruct": kronecker_reconstruct,
    "kronecker_reconstruct_backward": kronecker_reconstruct_backward,
    "rescale_reconstruct": rescale_reconstruct,
    "rescale_backward": rescale_backward,
    "toeplitz_forward": toeplitz_forward,
    "toeplitz_backward": toeplitz_backward,
    "toeplitz_reconstruct": toeplitz_reconstruct,
    "toeplitz_reconstruct_backward": toeplitz_reconstruct_backward,
    "rescale_linear_backward": rescale_linear_backward,
}

# Large enough that every function uses more than one thread; odd sizes leave remainders everywhere.
LARGE_CONV = (3, 1, 37, 41, 9, 11, (3, 3), (1, 2), (1, 0, 1, 2), (1, 1), "zeros", (33, 47))
LARGE_GROUPS = (2, 3, 19, 21, 8, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "reflect", (41, 37))
NARROW_CONV = (2, 1, 3, 2, 4, 5, (1, 2), (1, 1), (0, 0, 0, 0), (1, 1), "zeros", (5, 2))  # lines of one output
DIRECT_CONV = (3, 1, 37, 41, None, 11, (3, 3), (1, 1), (1, 0, 1, 2), (1, 1), "zeros", (33, 47))
DIRECT_DEEP = (3, 1, 133, 41, None, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "zeros", (7, 7))  # dh in two blocks
DIRECT_GROUPS = (2, 3, 19, 21, None, 6, (3, 2), (1, 2), (1, 1, 1, 1), (2, 1), "reflect", (41, 37))
DIRECT_LINE = (2, 1, 33, 5, None, 4, (5,), (1,), (2, 2), (1,), "circular", (3001,))  # several windows on one line
DIRECT_POINTS = (3, 1, 37, 41, None, 11, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), "zeros", (33, 47))
DIRECT = (DIRECT_CONV, DIRECT_DEEP, DIRECT_GROUPS, DIRECT_LINE, DIRECT_POINTS)
LARGE_DEPTHWISE = (3, 37, 1, 1, 1, 1, (3, 3), (2, 1), (1, 0, 1, 2), (1, 1), "zeros", (43, 39))
LARGE_FILTERS = (
    (2, 37, 41, (1, 1, 0, 2), (33, 147)),  # several stretches on a line, blocks of them
    (3, 137, 301, (1, 1, 1, 1), (17, 20)),  # more input channels than tiles, in two blocks; a sum in two pieces
    (1, 24, 400, (1, 1, 1, 1), (6, 6)),
    (2, 1031, 523, (1, 1, 1, 1), (33, 33)),  # panels in two goes
)
LARGE_TOEPLITZ = ((403, 1031, 517, None, 2), (211, 301, 1109, 541, 1), (67, 519, 67, 301, 19))  # terms fill vectors
LARGE = [
    ("drop", (100_003,)),
    *(("multiply", sizes) for sizes in ((517, 301, 421), (17, 1031, 293))),
    *(("tucker_linear_forward", sizes) for sizes in ((2051, 67, 93, 16, 16), (517, 129, 301, 7, 21))),
    *(("tucker_linear_backward", sizes) for sizes in ((2051, 67, 93, 16, 16), (517, 129, 301, 7, 21))),
    *(("tucker_conv_forward", sizes) for sizes in (LARGE_CONV, LARGE_GROUPS, *DIRECT)),
    *(("tucker_conv_backward", sizes) for sizes in (LARGE_CONV, LARGE_GROUPS, NARROW_CONV, *DIRECT)),
    *(("conv_weight_gradient", sizes) for sizes in (LARGE_DEPTHWISE, LARGE_GROUPS)),
    *(("conv_input_gradient", sizes) for sizes in LARGE_FILTERS),
    *(("tucker_reconstruct", dims) for dims in ((517, 301), (131, 77, 3, 5))),
    *(("tucker_reconstruct_backward", dims) for dims in ((517, 301), (131, 77, 3, 5))),
    *(("kronecker_forward", sizes) for sizes in ((517, 32, 9, 11, 16), (301, 7, 21, 19, 13))),
    *(("kronecker_backward", sizes) for sizes in ((517, 32, 9, 11, 16), (301, 7, 21, 19, 13))),
    *(("kronecker_reconstruct", sizes) for sizes in ((32, 41, 37, 32), (7, 21, 190, 43))),
    *(("kronecker_reconstruct_backward", sizes) for sizes in ((32, 41, 37, 32), (7, 21, 190, 43))),
    *(("rescale_reconstruct", dims) for dims in ((1033, 1029), (131, 177, 7, 7))),
    *(("rescale_backward", dims) for dims in ((1033, 1029), (131, 177, 7, 7))),
    *(("toeplitz_forward", sizes) for sizes in LARGE_TOEPLITZ),
    *(("toeplitz_backward", sizes) for sizes in LARGE_TOEPLITZ),
    *(("toeplitz_reconstruct", sizes[1:]) for sizes in LARGE_TOEPLITZ),
    *(("toeplitz_reconstruct_backward", sizes[1:]) for sizes in LARGE_TOEPLITZ),
    ("rescale_linear_backward", (395, 261, 523)),
]
SUMS_OVER_ROWS = ("d_u_in", "d_core", "d_u_out", "d_factors", "d_weight")
SUMS_OVER_ROWS += ("d_a", "d_b", "d_row", "d_column", "d_left", "d_right")

# Tests ---------------------------------------------------------------------------------------------------------------


def test_registry():
    assert set(BUILDERS) == set(NAMES)


@pytest.mark.parametrize("function", BUILDERS)
@given(data=st.data())
def test_any_case(isa, dtype, function, data):
    case = Case(function, dtype, data.draw)
    BUILDERS[function](case)
    case.check()


@pytest.mark.parametrize(("function", "sizes"), LARGE)
def test_large_case(isa, threads, dtype, function, sizes):
    case = Case(function, dtype)
    BUILDERS[function](case, *sizes)
    case.check()


@pytest.mark.parametrize(("function", "sizes"), [case for case in LARGE if "h" in NAMES[case[0]]])
def test_without_h(isa, function, sizes):
    case = Case(function, torch.float64)
    BUILDERS[function](case, *sizes)
    case.arguments["h"] = None
    case.outputs.pop("h", None)
    case.check()


@pytest.mark.parametrize("function", [name for name in BUILDERS if name.startswith(("tucker_linear", "tucker_conv"))])
@given(data=st.data())
def test_whole_numbers_are_exact(isa, function, data):
    case = Case(function, torch.bfloat16, data.draw, whole=True)
    BUILDERS[function](case)
    case.check()


@pytest.mark.parametrize(("function", "sizes"), [case for case in LARGE if case[0].startswith("tucker_conv")])
def test_large_whole_numbers_are_exact(isa, function, sizes):
    case = Case(function, torch.bfloat16, whole=True)
    BUILDERS[function](case, *sizes)
    case.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("function", "sizes"), LARGE)
def test_repeatable(isa, threads, dtype, function, sizes):
    case = Case(function, dtype)
    BUILDERS[function](case, *sizes)
    first, *others = (case.call(_core, lambda tensor: tensor.clone()) for _ in range(4))
    assert all(same_bits(first[name], again[name]) for again in others for name in first)


@pytest.mark.parametrize(("function", "sizes"), LARGE)
def test_threads_change_only_sums_over_rows(isa, dtype, function, sizes):
    case = Case(function, dtype)
    BUILDERS[function](case, *sizes)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.call(_core, lambda tensor: tensor.clone())
        torch.set_num_threads(2)
        two = case.call(_core, lambda tensor: tensor.clone())
    finally:
        torch.set_num_threads(before)
    for name in one:
        if name.partition("/")[0] not in SUMS_OVER_ROWS:
            assert same_bits(one[name], two[name]), name


@pytest.mark.parametrize("numpy_dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("function", BUILDERS)
def test_numpy_arrays_give_the_same_bits(isa, function, numpy_dtype):
    dtype = torch.from_numpy(np.empty(0, numpy_dtype)).dtype
    sizes = next(sizes for name, sizes in LARGE if name == function)
    case = Case(function, dtype)
    BUILDERS[function](case, *sizes)
    tensors = case.call(_core, lambda tensor: tensor.clone())
    arrays = case.call(_core, lambda tensor: tensor.clone().numpy())
    assert all(same_bits(tensors[name], torch.from_numpy(arrays[name])) for name in tensors)


@given(data=st.data())
def test_negative_strides(isa, data):
    """Only NumPy has them."""
    case = Case("tucker_linear_backward", torch.float64, data.draw)
    linear_backward(case)
    outputs = [view for view, _, _ in case.outputs.values()]

    def turned(tensor):
        if any(tensor is view for view in outputs):
            return tensor.clone(memory_format=torch.contiguous_format).numpy()
        axes = tuple(range(tensor.ndim))
        return np.flip(np.flip(tensor.numpy(), axes).copy(), axes)

    exact, magnitude = case.expect()
    for name, array in case.call(_core, turned).items():
        assert_close(name, torch.from_numpy(array), exact[name], magnitude[name], TOLERANCE[torch.float64])


def test_nan_and_infinity_stay(isa, dtype):
    case = Case("tucker_linear_forward", dtype)
    linear_forward(case, 5, 33, 17, 3, 4)
    case.arguments["x"][1, 7] = math.nan
    case.arguments["y"][3, 2] = math.inf
    y = case.call(_core)["y"]
    assert y[1].isnan().all()
    assert y[3, 2] == math.inf
    assert y[[0, 2, 4]].isfinite().all()


def test_the_twin_takes_the_caller_s_h_whatever_x_is():
    case = Case("tucker_conv_backward", torch.float32)
    conv_backward(case, 2, 1, 33, 17, 5, 3, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "zeros", (13, 11))
    exact, _ = case.expect()
    case.arguments["x"] = case.arguments["x"] * 1e30
    huge, _ = case.expect()
    assert same_bits(huge["d_core"], exact["d_core"])


@pytest.mark.parametrize("r_in", [5, None])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nan_stays_where_it_is(isa, dtype, memory_format, r_in):
    """In a layer whose products have remainders everywhere: 33 and 17 channels of ranks 5 and 3."""
    case = Case("tucker_conv_backward", dtype)
    conv_backward(case, 2, 1, 33, 17, r_in, 3, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "zeros", (13, 11))
    a = case.arguments
    for name in ("x", "dy", "dx"):
        a[name] = a[name].contiguous(memory_format=memory_format)
    a["dy"][1, 16, 4, 7] = math.nan
    a["x"][0, 32, 12, 10] = math.inf
    found = case.call(_core, lambda t: t.clone())
    expected = torch.zeros(2, 33, 13, 11, dtype=torch.bool)
    expected[1, :, 3:6, 6:9] = True
    assert torch.equal(found["dx"].isnan(), expected)
    d_u_out, of_x = found["d_factors/0"], found["d_factors/1" if r_in else "d_core"]
    assert d_u_out[:16].isfinite().all()  # h is given, so x has no part in it
    assert d_u_out[16].isnan().all()
    assert of_x.isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_pixels_that_see_it(isa, dtype, value):
    """Minimal filtering takes 4 × 4 pixels of dy to 2 × 2 of dx, and each to those that the taps take it to."""
    case = Case("conv_input_gradient", dtype)
    input_gradient(case, 2, 17, 33, (1, 1, 1, 1), (9, 10))
    dy = case.arguments["dy"].zero_()
    for row, column in ((4, 5), (5, 5), (0, 0), (8, 9)):
        dy[1, 16, row, column] = value
        expected = torch.zeros(2, 33, 9, 10, dtype=torch.bool)
        expected[1, :, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = True
        assert torch.equal(case.call(_core, lambda t: t.clone())["dx"].isfinite(), ~expected)
        dy.zero_()


@pytest.mark.parametrize("inner", [None, 29], ids=["single", "product"])
def test_rows_of_a_transform_never_meet(isa, dtype, inner):
    """LANES rows share a vector: one that is not finite, or huge, leaves its neighbours as they are."""
    case = Case("toeplitz_forward", dtype)
    toeplitz_forward(case, 37, 33, 17, inner, 2)
    alone = case.call(_core, lambda tensor: tensor.clone())["y"]
    x = case.arguments["x"]
    x[1, 7], x[5], x[30, 16] = math.nan, torch.finfo(dtype).max / 2, math.inf
    y = case.call(_core, lambda tensor: tensor.clone())["y"]
    others = [row for row in range(37) if row not in (1, 5, 30)]
    assert y[1].isnan().all()
    assert not y[30].isfinite().any()
    assert same_bits(y[others], alone[others])


def skew_circulant(c):
    return scipy.linalg.toeplitz(c, np.append(c[:1], -c[:0:-1]))


@pytest.mark.parametrize("n", [1, 2, 16, 37])
def test_structured_matrices_are_those_of_scipy(isa, n):
    """ΔW of a circulant times a skew-circulant, plus a symmetric Toeplitz times a general one."""
    c, s, v, column, row = np.random.default_rng(n).standard_normal((5, n))
    row[0] = column[0]
    expected = scipy.linalg.circulant(c) @ skew_circulant(s) + scipy.linalg.toeplitz(v) @ scipy.linalg.toeplitz(
        column, row
    )
    left = np.stack([np.append(c[1:], c), np.append(v[:0:-1], v)])
    right = np.stack([np.append(-s[1:], s), np.append(row[:0:-1], column)])
    out, y, dx = np.empty((n, n)), np.zeros((n, n)), np.zeros((n, n))
    _core.toeplitz_reconstruct(out, None, left, right, 1.0)
    _core.toeplitz_forward(y, np.eye(n), left, right, 1.0)
    _core.toeplitz_backward(dx, None, None, np.eye(n), None, left, right, 1.0)
    for found in (out, y.T, dx):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("function", ["toeplitz_forward", "toeplitz_backward"])
def test_transforms_add_to_rows_of_unit_stride(function):
    case = Case(function, torch.float32)
    BUILDERS[function](case, 5, 3, 4, 5, 2)
    name = {"toeplitz_forward": "y", "toeplitz_backward": "dx"}[function]
    case.arguments[name] = torch.zeros(*reversed(case.arguments[name].shape)).mT
    with pytest.raises(ValueError, match=f"^{function}: {name} must have unit stride in its last dimension, not 5"):
        case.call(_core)
    assert not case.arguments[name].any()


def half_linear(x, u_in, core, u_out, scale):
    """LoRA's two layers with the core between them, every product rounded to the 16-bit type."""
    return F.linear(F.linear(F.linear(x, u_in.mT), core), u_out) * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_beats_pytorch_in_16_bits(isa, dtype):
    case = Case("tucker_linear_forward", dtype)
    linear_forward(case, 301, 129, 93, 8, 12)
    a = case.arguments
    for name in ("u_in", "core", "u_out"):
        a[name] = a[name].to(dtype).float()  # numbers that PyTorch's layers can hold too
    factors = [a[name] for name in ("u_in", "core", "u_out")]
    exact = a["y"].double() + half_linear(a["x"].double(), *(f.double() for f in factors), a["scale"])
    theirs = a["y"] + half_linear(a["x"], *(f.to(dtype) for f in factors), a["scale"])
    ours = case.call(_core)["y"]
    assert (ours.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_convolution_beats_pytorch_in_16_bits(isa, dtype):
    case = Case("tucker_conv_forward", dtype)
    conv_forward(case, 2, 1, 33, 17, 8, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "zeros", (13, 11))
    a = case.arguments
    a["factors"][2:] = None, None
    a["core"] = torch.randn(5, 8, 3, 3).to(dtype).float()
    a["factors"][:2] = (u.to(dtype).float() for u in a["factors"][:2])

    def composed(x, u_in, core, u_out):
        h = F.conv2d(x, u_in.mT[:, :, None, None])
        return F.conv2d(F.conv2d(h, core, padding=1), u_out[:, :, None, None]) * a["scale"]

    factors = [a["factors"][1], a["core"], a["factors"][0]]
    exact = a["y"].double() + composed(a["x"].double(), *(f.double() for f in factors))
    theirs = a["y"] + composed(a["x"], *(f.to(dtype) for f in factors))
    ours = case.call(_core)["y"]
    assert (ours.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max()


def test_kronecker_is_numpys(isa, dtype):
    case = Case("kronecker_reconstruct", dtype)
    kronecker_reconstruct(case, 3, 5, 7, 2)
    a = case.arguments
    product = a["scale"] * np.kron(a["b"].double().numpy(), a["a"].double().numpy())
    out = torch.empty(21, 10, dtype=case.real)
    _core.kronecker_reconstruct(out, None, a["a"], a["b"], a["scale"])
    np.testing.assert_allclose(out.numpy(), product, rtol=1e-6)
    x, y = torch.randn(4, 10, dtype=case.real), torch.zeros(4, 21, dtype=case.real)
    _core.kronecker_forward(y, None, x, a["a"], a["b"], a["scale"])
    np.testing.assert_allclose(y.numpy(), x.numpy() @ product.T, rtol=1e-5, atol=1e-6)


def test_kronecker_needs_x_or_h_for_d_b():
    a, b, d_b = torch.ones(2, 3), torch.ones(5, 4), torch.full((5, 4), GUARD)
    with pytest.raises(ValueError, match="^kronecker_backward: d_b needs h or x, and both are left out"):
        _core.kronecker_backward(None, None, d_b, torch.ones(1, 10), None, None, a, b, 1.0)
    assert (d_b == GUARD).all()


@pytest.mark.parametrize(
    "layouts",
    [("contiguous", "channels_last"), ("channels_last", "contiguous"), ("transposed", "contiguous")],
    ids="-of-".join,
)
def test_rescaled_weights_of_other_layouts(isa, threads, dtype, layouts):
    """out or d_weight in one layout, the weight in another, both as large as to be shared by threads."""
    make = {
        "contiguous": lambda t: t.contiguous(),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    }
    for builder, name in ((rescale_reconstruct, "out"), (rescale_backward, "d_weight")):
        case = Case(builder.__name__, dtype)
        builder(case, 97, 401, 3, 5)
        for argument, layout in zip((name, "weight"), layouts, strict=True):
            view = case.arguments[argument] = make[layout](case.arguments[argument])
            if argument in case.outputs:
                case.outputs[argument] = view, view, torch.ones_like(view, dtype=torch.bool)
        case.check()


# Each line: a function, the argument that is wrong, its value given the arguments, the error.
BAD = [
    ("tucker_linear_forward", "x", lambda a: a["x"][:, 1:], ValueError, r"x must have shape \(5, 4\), not \(5, 3\)"),
    ("tucker_linear_forward", "x", lambda a: a["x"][0, 0], ValueError, "x must have 2 dimensions"),
    ("tucker_linear_forward", "x", lambda a: a["x"].double(), TypeError, "float64"),
    ("tucker_linear_forward", "u_in", lambda a: a["u_in"].bfloat16(), TypeError, "u_in must be float32, not bfloat16"),
    ("tucker_linear_forward", "core", lambda a: a["core"].mT, ValueError, "core must have shape"),
    ("tucker_linear_forward", "core", lambda a: None, ValueError, "core|u_out"),
    ("tucker_linear_forward", "h", lambda a: a["h"][1:], ValueError, "h must have shape"),
    ("tucker_linear_forward", "scale", lambda a: math.nan, ValueError, "scale"),
    ("tucker_linear_backward", "d_core", lambda a: a["d_core"].mT, ValueError, "d_core must have shape"),
    ("tucker_linear_backward", "x", lambda a: None, ValueError, "x"),
    ("tucker_linear_backward", "dy", lambda a: a["dy"][:, 1:], ValueError, "dy|u_out"),
    ("tucker_conv_forward", "stride", lambda a: (1, 0), ValueError, "stride"),
    ("tucker_conv_forward", "dilation", lambda a: (0, 1), ValueError, "dilation"),
    ("tucker_conv_forward", "dilation", lambda a: (400, 1), ValueError, "kernel|output"),
    ("tucker_conv_forward", "padding", lambda a: (0, -1, 0, 0), ValueError, "padding"),
    ("tucker_conv_forward", "stride", lambda a: (1, 1, 1), ValueError, "stride, padding and dilation"),
    ("tucker_conv_forward", "stride", lambda a: (1, 1, 1, 1), ValueError, "stride has 4 entries"),
    ("tucker_conv_forward", "padding", lambda a: (0, 0), ValueError, "stride, padding and dilation"),
    ("tucker_conv_forward", "groups", lambda a: 2, ValueError, "groups"),
    ("tucker_conv_forward", "groups", lambda a: 0, ValueError, "groups"),
    ("tucker_conv_forward", "groups", lambda a: 2**70, ValueError, "groups 1180591620717411303424 is too large"),
    ("tucker_conv_forward", "groups", lambda a: "1", TypeError, "groups must be an int, not '1'"),
    ("tucker_conv_forward", "stride", lambda a: (1, 1.0), TypeError, "stride must be an int, not 1.0"),
    ("tucker_conv_forward", "stride", lambda a: 1, TypeError, "stride is 1, not a sequence"),
    ("tucker_conv_forward", "padding_mode", lambda a: "same", ValueError, "padding_mode 'same'"),
    ("tucker_conv_forward", "padding_mode", lambda a: 0, TypeError, "padding_mode must be a str, not 0"),
    ("tucker_conv_forward", "scale", lambda a: "1", TypeError, "scale must be a float, not '1'"),
    ("tucker_conv_forward", "y", lambda a: a["y"][:, :, 1:], ValueError, "y must have shape"),
    ("tucker_conv_forward", "factors", lambda a: a["factors"][:3], ValueError, "factors has 3 entries, the weight 4"),
    (
        "tucker_conv_forward",
        "factors",
        lambda a: [None, *a["factors"][1:]],
        TypeError,
        r"factors\[0\] must be an array",
    ),
    ("tucker_conv_forward", "factors", lambda a: [*a["factors"][:3], a["factors"][3][0]], ValueError, "2 dimensions"),
    (
        "tucker_conv_forward",
        "factors",
        lambda a: [*a["factors"][:3], a["factors"][3][:, 1:]],
        ValueError,
        r"factors\[3\] must have shape \(3, 2\), not \(3, 1\)",
    ),
    (
        "tucker_conv_backward",
        "d_factors",
        lambda a: [a["d_factors"][0][1:], *a["d_factors"][1:]],
        ValueError,
        r"d_factors\[0\] must have shape",
    ),
    (
        "tucker_conv_backward",
        "factors",
        lambda a: [*a["factors"][:3], None],
        ValueError,
        r"d_factors\[3\] is given, but factors\[3\] is not",
    ),
    ("tucker_conv_backward", "x", lambda a: a["x"][..., 0], ValueError, "x must have 4 dimensions"),
    ("conv_weight_gradient", "d_weight", lambda a: a["d_weight"][1:], ValueError, "d_weight|groups|dy"),
    ("conv_weight_gradient", "x", lambda a: a["x"].double(), TypeError, "float64"),
    ("conv_weight_gradient", "groups", lambda a: 2, ValueError, "groups"),
    (
        "conv_input_gradient",
        "weight",
        lambda a: a["weight"][..., :2],
        ValueError,
        r"weight must have shape \(5, 4, 3, 3\)",
    ),
    ("conv_input_gradient", "weight", lambda a: a["weight"][0], ValueError, "weight must have 4 dimensions"),
    ("conv_input_gradient", "weight", lambda a: a["weight"].half(), TypeError, "weight must be float32, not float16"),
    ("conv_input_gradient", "dx", lambda a: a["dx"][0], ValueError, "dx must have 4 dimensions"),
    ("conv_input_gradient", "dx", lambda a: a["dx"][:, 1:], ValueError, "dx must have shape"),
    ("conv_input_gradient", "dx", lambda a: a["dx"][..., :1, :1], ValueError, "dy must have shape|larger than"),
    ("conv_input_gradient", "dx", lambda a: a["dx"].bfloat16(), TypeError, "must be float32, not bfloat16"),
    (
        "conv_input_gradient",
        "dx",
        lambda a: a["dx"].new_empty(2, 8, 6, 14)[:, ::2, :, ::2],
        ValueError,
        "dx must have unit stride along its channels or its columns, not 168 and 2",
    ),
    ("conv_input_gradient", "dx", lambda a: a["dy"][:, :4], ValueError, "the output dx and the input dy share memory"),
    ("conv_input_gradient", "dy", lambda a: a["dy"][1:], ValueError, "dy must have shape"),
    ("conv_input_gradient", "dy", lambda a: a["dy"].double(), TypeError, "dy must be float32, not float64"),
    ("conv_input_gradient", "padding", lambda a: (1, 1), ValueError, "padding has 2 entries, 4 are needed"),
    ("conv_input_gradient", "padding", lambda a: (1, 1, 1, -1), ValueError, r"padding must not be negative"),
    ("conv_input_gradient", "padding", lambda a: (1, 1, 1, 1.5), TypeError, "padding"),
    ("conv_input_gradient", "padding", lambda a: (2**62,) * 4, ValueError, "too large"),
    ("tucker_reconstruct", "factors", lambda a: a["factors"][:1], ValueError, "out must have 1 dimensions, not shape"),
    ("tucker_reconstruct", "factors", lambda a: a["factors"] * 3, ValueError, "factors has 6 entries, at most 5"),
    ("tucker_reconstruct", "factors", lambda a: a["factors"][::-1], ValueError, r"factors\[0\] must have"),
    ("tucker_reconstruct", "factors", lambda a: None, TypeError, "factors is None, not a sequence"),
    ("tucker_reconstruct", "factors", lambda a: ["u", "v"], TypeError, r"factors\[0\] is str"),
    ("tucker_reconstruct", "weight", lambda a: a["weight"].bfloat16(), TypeError, "weight must be float32"),
    ("tucker_reconstruct", "weight", lambda a: a["weight"].mT, ValueError, "weight must have shape"),
    ("tucker_reconstruct_backward", "d_factors", lambda a: a["d_factors"][:1], ValueError, "d_factors has 1 entries"),
    ("tucker_reconstruct_backward", "d_core", lambda a: a["d_core"][1:], ValueError, "d_core must have shape"),
    ("toeplitz_forward", "x", lambda a: a["x"][1:], ValueError, r"x must have shape \(5, 4\), not \(4, 4\)"),
    ("toeplitz_forward", "y", lambda a: a["y"][0, 0], ValueError, "y must have 2 dimensions"),
    ("toeplitz_forward", "x", lambda a: a["x"].double(), TypeError, "x must be float32, not float64"),
    ("toeplitz_forward", "left", lambda a: a["left"].half(), TypeError, "left must be float32, not float16"),
    ("toeplitz_forward", "left", lambda a: a["left"][0], ValueError, "left must have 2 dimensions"),
    ("toeplitz_forward", "left", lambda a: a["left"][:, :2], ValueError, "left has 2 diagonals, .* of 3 rows has"),
    ("toeplitz_forward", "left", lambda a: a["left"][1:], ValueError, r"right must have shape \(1, 8\), not \(2, 8\)"),
    (
        "toeplitz_forward",
        "right",
        lambda a: a["right"][:, 1:],
        ValueError,
        r"right must have shape \(2, 8\), not \(2, 7\)",
    ),
    ("toeplitz_forward", "right", lambda a: None, ValueError, r"left must have shape \(2, 6\), not \(2, 7\)"),
    ("toeplitz_forward", "scale", lambda a: math.nan, ValueError, "scale"),
    ("toeplitz_backward", "x", lambda a: None, ValueError, "x is needed for the gradients of left and right"),
    ("toeplitz_backward", "d_left", lambda a: a["d_left"][1:], ValueError, "d_left must have shape"),
    ("toeplitz_backward", "dx", lambda a: a["dx"][:, 1:], ValueError, r"dx must have shape \(5, 4\)"),
    ("toeplitz_backward", "right", lambda a: None, ValueError, r"left must have shape \(2, 6\)"),
    ("toeplitz_reconstruct", "weight", lambda a: a["weight"][1:], ValueError, r"weight must have shape \(3, 4\)"),
    ("toeplitz_reconstruct", "weight", lambda a: a["weight"].double(), TypeError, "weight must be float32"),
    ("toeplitz_reconstruct", "right", lambda a: a["right"].T, ValueError, "right must have shape"),
    ("toeplitz_reconstruct_backward", "d_right", lambda a: a["d_right"].T, ValueError, "d_right must have shape"),
    ("toeplitz_reconstruct_backward", "d_weight", lambda a: a["d_weight"][0], ValueError, "d_weight must have 2"),
    ("toeplitz_reconstruct_backward", "scale", lambda a: "1", TypeError, "scale must be a float, not '1'"),
    ("kronecker_forward", "x", lambda a: a["x"][:, 1:], ValueError, r"x must have shape \(6, 14\), not \(6, 13\)"),
    ("kronecker_forward", "x", lambda a: a["x"].double(), TypeError, "x must be float32, not float64"),
    ("kronecker_forward", "y", lambda a: a["y"][:, ::2], ValueError, r"y must have shape \(6, 15\), not \(6, 8\)"),
    ("kronecker_forward", "h", lambda a: a["h"][:, 1:], ValueError, "h must have shape"),
    ("kronecker_forward", "a", lambda a: a["a"].bfloat16(), TypeError, "a must be float32, not bfloat16"),
    ("kronecker_forward", "b", lambda a: a["b"][0], ValueError, r"b must have 2 dimensions, not shape \(2,\)"),
    ("kronecker_forward", "b", lambda a: a["b"].mT, ValueError, "y must have shape"),
    (
        "kronecker_forward",
        "b",
        lambda a: torch.empty(2**62, 0),
        ValueError,
        "b has extents whose size in bytes overflows",
    ),
    ("kronecker_forward", "scale", lambda a: math.nan, ValueError, "scale must be a number"),
    ("kronecker_backward", "x", lambda a: None, ValueError, "d_a needs x"),
    ("kronecker_backward", "d_a", lambda a: a["d_a"].mT, ValueError, "d_a must have shape"),
    ("kronecker_backward", "d_b", lambda a: a["dy"], ValueError, "d_b must have shape"),
    ("kronecker_backward", "dx", lambda a: a["dx"][1:], ValueError, "dx must have shape"),
    ("kronecker_reconstruct", "out", lambda a: a["out"].mT, ValueError, r"out must have shape \(15, 14\)"),
    ("kronecker_reconstruct", "out", lambda a: torch.empty(30, 28)[::2, ::2], ValueError, "out must have unit stride"),
    ("kronecker_reconstruct", "weight", lambda a: a["weight"][1:], ValueError, "weight must have shape"),
    ("kronecker_reconstruct", "weight", lambda a: a["out"][:, :0], ValueError, "weight must have shape"),
    ("kronecker_reconstruct", "weight", lambda a: a["out"].view(14, 15).mT, ValueError, "share memory"),
    ("kronecker_reconstruct_backward", "d_weight", lambda a: a["d_weight"].mT, ValueError, "d_weight must have shape"),
    ("kronecker_reconstruct_backward", "d_b", lambda a: a["d_b"].double(), TypeError, "d_b must be float32"),
    ("kronecker_reconstruct_backward", "d_b", lambda a: a["b"], ValueError, "output d_b and the input b share memory"),
    ("rescale_reconstruct", "out", lambda a: a["out"].bfloat16(), TypeError, "out must be float32, not bfloat16"),
    ("rescale_reconstruct", "out", lambda a: a["out"][1:], ValueError, "out must have shape"),
    ("rescale_reconstruct", "weight", lambda a: a["row"], ValueError, "out must have shape|weight must have 2 to 5"),
    ("rescale_reconstruct", "row", lambda a: a["column"], ValueError, r"row must have shape \(7,\), not \(9,\)"),
    ("rescale_reconstruct", "column", lambda a: a["column"].double(), TypeError, "column must be float32"),
    ("rescale_reconstruct", "scale", lambda a: math.nan, ValueError, "scale must be a number"),
    ("rescale_backward", "d_weight", lambda a: a["d_weight"].bfloat16(), TypeError, "d_weight must be float32"),
    ("rescale_backward", "d_weight", lambda a: a["d_weight"].mT, ValueError, "d_weight must have shape"),
    ("rescale_backward", "row", lambda a: None, ValueError, "d_row is given, but row is not"),
    ("rescale_backward", "d_column", lambda a: a["d_row"], ValueError, "d_column must have shape"),
    ("rescale_linear_backward", "x", lambda a: a["x"][1:], ValueError, r"x must have shape \(5, 9\), not \(4, 9\)"),
    ("rescale_linear_backward", "dy", lambda a: a["dy"][:, 1:], ValueError, r"dy must have shape \(5, 7\)"),
    ("rescale_linear_backward", "weight", lambda a: a["weight"][0], ValueError, "weight must have 2 dimensions"),
    ("rescale_linear_backward", "column", lambda a: None, ValueError, "d_column is given, but column is not"),
    ("rescale_linear_backward", "d_row", lambda a: a["row"], ValueError, "output d_row and the input row share"),
    ("multiply", "out", lambda a: a["out"].mT, ValueError, r"out must have shape \(5, 9\), not \(9, 5\)"),
    ("multiply", "out", lambda a: torch.empty(5, 18)[:, ::2], ValueError, "out must have unit stride .*not 2"),
    ("multiply", "out", lambda a: a["out"].bfloat16(), TypeError, "must be float32, not bfloat16"),
    ("multiply", "a", lambda a: a["a"][0], ValueError, r"a must have 2 dimensions, not shape \(7,\)"),
    ("multiply", "b", lambda a: a["b"][1:], ValueError, r"b must have shape \(7, 9\), not \(6, 9\)"),
    ("multiply", "b", lambda a: a["b"].double(), TypeError, "b must be float32, not float64"),
    ("multiply", "out", lambda a: a["b"][:5], ValueError, "output out and the input b share memory"),
]
BAD_SIZES = {
    "multiply": (5, 7, 9),
    "toeplitz_reconstruct": (3, 4, 5, 2),
    "toeplitz": (5, 3, 4, 5, 2),
    "kronecker_reconstruct": (3, 7, 5, 2),
    "kronecker": (6, 3, 7, 5, 2),
    "rescale_linear": (5, 7, 9),
    "rescale": (7, 9),
    "linear": (5, 4, 3, 2, 3),
    "conv_input": (2, 5, 4, (1, 1, 1, 1), (6, 7)),
    "conv": (2, 1, 5, 3, 2, 3, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), "zeros", (6, 7)),
    "reconstruct": (7, 9),
}


@pytest.mark.parametrize(("function", "name", "wrong", "error", "match"), BAD)
def test_bad_arguments_are_named_and_nothing_is_written(function, name, wrong, error, match):
    case = Case(function, torch.float32)
    BUILDERS[function](case, *BAD_SIZES[next(kind for kind in BAD_SIZES if kind in function)])
    if (function, name) == ("tucker_linear_backward", "x"):
        case.arguments["h"] = None
    case.arguments[name] = wrong(case.arguments)
    before = {name: buffer.clone() for name, (_, buffer, _) in case.outputs.items()}
    with pytest.raises(error, match=f"^{function}: .*({match})"):
        getattr(_core, function)(
            *(case.arguments[n] for n in inspect.signature(getattr(reference, function)).parameters)
        )
    assert all(same_bits(buffer, before[name]) for name, (_, buffer, _) in case.outputs.items())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": None, "dx": None}, "one of x and dx must be given"),
        ({"x": None}, r"x may be left out only if every gradient but that of factors\[0\] is, and h is given"),
        ({"h": slice(1)}, r"h must have shape \(2, 13, 11, 3\)"),
        ({"core": slice(2)}, r"core must have shape \(3, 33, 2, 2\)"),
        ({"d_factors": [None, torch.zeros(33, 5), None, None]}, r"d_factors\[1\] is given, but factors\[1\] is not"),
    ],
    ids=str,
)
def test_bad_arguments_without_an_input_factor(changes, match):
    case = Case("tucker_conv_backward", torch.float32)
    conv_backward(case, 2, 1, 33, 17, None, 3, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "zeros", (13, 11))
    for name, value in changes.items():
        case.arguments[name] = case.arguments[name][value] if isinstance(value, slice) else value
    before = {name: buffer.clone() for name, (_, buffer, _) in case.outputs.items()}
    with pytest.raises(ValueError, match=f"^tucker_conv_backward: .*({match})"):
        _core.tucker_conv_backward(*(case.arguments[name] for name in NAMES["tucker_conv_backward"]))
    assert all(same_bits(buffer, before[name]) for name, (_, buffer, _) in case.outputs.items())
