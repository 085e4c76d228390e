"""Calls without a number: an extent of 0 makes an array empty whatever its others are, and those may be any.

Every function with every choice of 0, 2 and 2⁴⁰ as its sizes, as far as no array needs memory. A loop that goes through
the rows of such an array does not come back, so the calls are made in a process of their own, which says where it was.
"""

import itertools
import subprocess
import sys

import pytest
import torch

from flora import _core

SIZES = (0, 2, 2**40)
POINTWISE = ((1, 1), (0, 0, 0, 0), (1, 1), 1, "zeros")


class TooLargeError(Exception):
    """An array would need memory."""


def array(*shape):
    if 0 not in shape and any(n > 2 for n in shape):
        raise TooLargeError
    try:
        return torch.ones(shape)
    except (RuntimeError, TypeError, OverflowError) as error:  # extents or strides that overflow
        raise TooLargeError from error


def tucker_linear_forward(out, rows, d_in, d_out, r_in, r_out):
    h = array(rows, r_in) if out else None
    y, x, factors = array(rows, d_out), array(rows, d_in), (array(d_in, r_in), array(r_out, r_in), array(d_out, r_out))
    _core.tucker_linear_forward(y, h, x, *factors, 1.0)


def tucker_linear_backward(out, rows, d_in, d_out, r_in, r_out):
    dy, x, h = array(rows, d_out), array(rows, d_in), array(rows, r_in) if out else None
    u_in, core, u_out = array(d_in, r_in), array(r_out, r_in), array(d_out, r_out)
    outputs = (x.clone() if out else None, u_in.clone(), core.clone(), u_out.clone())
    _core.tucker_linear_backward(*outputs, dy, x, h, u_in, core, u_out, 1.0)
    return outputs[1:] if dy.numel() == 0 else ()


def tucker_conv_forward(out, batch, d_in, d_out, r_in, r_out, extent):
    y, x = array(batch, d_out, extent, extent), array(batch, d_in, extent, extent)
    h, factors = (
        array(batch, extent, extent, r_in) if out else None,
        (array(d_out, r_out), array(d_in, r_in), None, None),
    )
    _core.tucker_conv_forward(y, h, x, array(r_out, r_in, 1, 1), factors, 1.0, *POINTWISE)


def tucker_conv_backward(out, batch, d_in, d_out, r_in, r_out, extent):
    dy, x = array(batch, d_out, extent, extent), array(batch, d_in, extent, extent)
    h, factors = array(batch, extent, extent, r_in), [array(d_out, r_out), array(d_in, r_in)]
    core, d_factors = array(r_out, r_in, 1, 1), [factor.clone() for factor in factors]
    d_core, dx = core.clone(), x.clone() if out else None
    nothing = [None, None]
    _core.tucker_conv_backward(dx, d_core, d_factors + nothing, dy, x, h, core, factors + nothing, 1.0, *POINTWISE)
    return (d_core, *d_factors) if dy.numel() == 0 else ()


def conv_weight_gradient(out, batch, d_in, d_out, extent):
    dy, x = array(batch, d_out, extent, extent), array(batch, d_in, extent, extent)
    _core.conv_weight_gradient(dw := array(d_out, d_in, 1, 1), dy, x, *POINTWISE)
    return (dw,) if dy.numel() == 0 else ()


def conv_input_gradient(out, batch, d_in, d_out, height, width):
    dx, dy = array(batch, d_in, height, width), array(batch, d_out, height, width)
    _core.conv_input_gradient(dx, dy, array(d_out, d_in, 3, 3), (1, 1, 1, 1))
    return (dx,) if d_out == 0 else ()


def tucker_reconstruct(out, *sizes):
    dims, ranks = sizes[:3], sizes[3:]
    weight, factors = array(*dims), [array(*pair) for pair in zip(dims, ranks, strict=True)]
    _core.tucker_reconstruct(weight, weight.clone() if out else None, array(*ranks), factors, 1.0)


def tucker_reconstruct_backward(out, *sizes):
    dims, ranks = sizes[:3], sizes[3:]
    weight, factors = array(*dims), [array(*pair) for pair in zip(dims, ranks, strict=True)]
    core, d_factors = array(*ranks), [factor.clone() if out else None for factor in factors]
    d_core = core.clone()
    _core.tucker_reconstruct_backward(d_core, d_factors, weight, core, factors, 1.0)
    return (d_core, *(d_factors if out else ())) if weight.numel() == 0 else ()


def kronecker_forward(out, rows, m, n, p, q):
    h = array(rows, n * p) if out else None
    _core.kronecker_forward(array(rows, m * p), h, array(rows, n * q), array(p, q), array(m, n), 1.0)


def kronecker_backward(out, rows, m, n, p, q):
    dy, x, h, a, b = array(rows, m * p), array(rows, n * q), array(rows, n * p), array(p, q), array(m, n)
    d_a, d_b = a.clone(), b.clone()
    _core.kronecker_backward(x.clone() if out else None, d_a, d_b, dy, x, h if out else None, a, b, 1.0)
    return (d_a, d_b) if dy.numel() == 0 else ()


def kronecker_reconstruct(out, m, n, p, q):
    weight = array(m * p, n * q)
    _core.kronecker_reconstruct(weight, weight.clone() if out else None, array(p, q), array(m, n), 1.0)


def kronecker_reconstruct_backward(out, m, n, p, q):
    weight, a, b = array(m * p, n * q), array(p, q), array(m, n)
    d_a, d_b = a.clone(), b.clone()
    _core.kronecker_reconstruct_backward(d_a, d_b if out else None, weight, a, b, 1.0)
    return (d_a,) if weight.numel() == 0 else ()


def multiply(out, rows, depth, columns):
    _core.multiply(c := array(rows, columns), array(rows, depth), array(depth, columns))
    return (c,) if depth == 0 else ()


def rescale_reconstruct(out, d_out, d_in):
    weight = array(d_out, d_in)
    _core.rescale_reconstruct(weight.clone(), weight, array(d_out), array(d_in) if out else None, 1.0)


def rescale_backward(out, d_out, d_in):
    weight, row, column = array(d_out, d_in), array(d_out), array(d_in)
    d_row, d_column = row.clone(), column.clone()
    _core.rescale_backward(d_row if out else None, d_column, weight, weight.clone(), row, column, 1.0)
    return (d_column,) if weight.numel() == 0 else ()


def rescale_linear_backward(out, rows, d_out, d_in):
    weight, row, column = array(d_out, d_in), array(d_out), array(d_in)
    d_row, d_column = row.clone(), column.clone()
    dy, x = array(rows, d_out), array(rows, d_in)
    _core.rescale_linear_backward(d_row if out else None, d_column, dy, x, weight, row, column, 1.0)
    return (d_column,) if dy.numel() == 0 else ()


def toeplitz_reconstruct(out, d_out, d_in, terms):
    weight = array(d_out, d_in)
    left, right = array(terms, max(0, d_out + d_in - 1)), None
    _core.toeplitz_reconstruct(weight, weight.clone() if out else None, left, right, 1.0)


def toeplitz_reconstruct_backward(out, d_out, d_in, terms):
    weight, left = array(d_out, d_in), array(terms, max(0, d_out + d_in - 1))
    _core.toeplitz_reconstruct_backward(d_left := left.clone(), None, weight, left, None, 1.0)
    return (d_left,) if weight.numel() == 0 else ()


def toeplitz_forward(out, rows, d_out, d_in, terms):
    _core.toeplitz_forward(array(rows, d_out), array(rows, d_in), array(terms, max(0, d_out + d_in - 1)), None, 1.0)


def toeplitz_backward(out, rows, d_out, d_in, terms):
    dy, x, left = array(rows, d_out), array(rows, d_in), array(terms, max(0, d_out + d_in - 1))
    _core.toeplitz_backward(x.clone() if out else None, d_left := left.clone(), None, dy, x, left, None, 1.0)
    return (d_left,) if dy.numel() == 0 else ()


CALLS = [
    tucker_linear_forward,
    tucker_linear_backward,
    tucker_conv_forward,
    tucker_conv_backward,
    conv_weight_gradient,
    conv_input_gradient,
    tucker_reconstruct,
    tucker_reconstruct_backward,
    kronecker_forward,
    kronecker_backward,
    kronecker_reconstruct,
    kronecker_reconstruct_backward,
    multiply,
    rescale_reconstruct,
    rescale_backward,
    rescale_linear_backward,
    toeplitz_reconstruct,
    toeplitz_reconstruct_backward,
    toeplitz_forward,
    toeplitz_backward,
]


def every_call(call):
    """How many calls were taken; what a call returns are gradients that must be zero."""
    taken = 0
    sizes = call.__code__.co_argcount - 1 or 6
    for out, *chosen in itertools.product((False, True), *[SIZES] * sizes):
        print(call.__name__, out, chosen, flush=True)
        try:
            zero = call(out, *chosen)
        except (TooLargeError, ValueError, MemoryError):
            continue
        taken += 1
        assert all((gradient == 0).all() for gradient in zero or ()), chosen
    return taken


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_no_call_goes_through_the_rows_of_an_empty_array(call):
    try:
        run = subprocess.run([sys.executable, __file__, call.__name__], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"does not end: {(expired.stdout or b'').decode().splitlines()[-1:]}")
    assert run.returncode == 0, f"{run.stdout.splitlines()[-1:]}: {run.stderr}"
    assert int(run.stdout.splitlines()[-1]) > 0


if __name__ == "__main__":
    print(every_call(globals()[sys.argv[1]]))
