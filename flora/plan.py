"""Which plan is cheapest: a cost model in floating-point operations and bytes, with no table of special cases.

Costs are in units of one flop of the frozen layer's own product. Every plan also pays that product (and in training its
input gradient), so only what comes on top is counted. The constants are ratios between speeds of one machine and vary
little from one to the next; ``python -m benchmarks.plans`` compares the model with measurements, and fits them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from math import prod
from typing import NamedTuple

PLANS = ("fused", "hybrid", "merged")
NO_HYBRID = ("fused", "merged")
DROPPING = ("fused", "separate")
"""The plans that there are to choose from: all, those below float32, those with dropout."""


class Speeds(NamedTuple):
    """What things cost, in flops of a large product."""

    skinny: float
    """A flop in a product with the rank as one extent."""
    byte: float
    """A byte from or to memory."""
    grouped: float
    """A flop in a grouped convolution, whose loops have little to share."""
    call: float
    """One more operation: a tensor allocated, a kernel started."""
    transform: float
    """A Fourier transform of n points, as a multiple of n·log₂ n."""
    slide: float
    """An element of a product of two Toeplitz matrices from its neighbour; its adjoint takes six times as long."""


SPEEDS = Speeds(skinny=1.6, byte=6.0, grouped=6.0, call=2.0e5, transform=4.0, slide=10.0)


def plan_costs(
    shape: tuple[int, ...],
    ranks: tuple[int, ...],
    groups: int,
    pixels_in: int,
    pixels_out: int,
    itemsize: int,
    grad: bool,
    speeds: Speeds = SPEEDS,
    projects: bool = True,
) -> dict[str, float]:
    """The costs of "fused", "hybrid", "merged" and "separate" for one call.

    ``shape`` is the weight's (d_out, d_in/groups, *k), ``ranks`` the core's; pixels (or rows) are counted over the
    whole batch, before and after the layer; ``itemsize`` is an activation's in bytes; ``grad`` whether anything learns;
    ``projects`` whether there is a factor of the input, which the core's convolution of x itself costs no projection.
    """
    d_out, width, *kernel = shape
    r_out, r_in = ranks[:2]
    taps = prod(kernel)
    d_in = width * groups
    size = d_out * width * taps

    project = 2 * pixels_in * d_in * r_in if projects else 0
    convolve = 2 * pixels_out * groups * r_in * r_out * taps
    expand = 2 * pixels_out * d_out * r_out
    skinny = speeds.skinny * (project + convolve + expand)
    traffic = speeds.byte * itemsize * (pixels_in * d_in + 2 * pixels_out * d_out)
    build = speeds.skinny * 2 * size * r_out + speeds.byte * 2 * itemsize * size + speeds.call

    # A product of the layer's own extents: its weight gradient, say
    product = 2 * pixels_out * size * (1.0 if groups == 1 else max(1.0, speeds.grouped / width))

    fused = skinny + traffic
    hybrid = merged = build
    if grad:
        # dk and dh again, three parameter gradients, dx; h is kept, k is computed a second time
        of_parameters = 2 * skinny + speeds.skinny * convolve
        if not projects:  # k is kept by fused, hybrid computes it anew; but it has no dx
            of_parameters = 2 * skinny
        reads = speeds.byte * itemsize * (pixels_in * d_in + pixels_out * d_out)
        fused += of_parameters + speeds.skinny * project + reads + speeds.byte * itemsize * 2 * pixels_in * d_in
        hybrid += build + of_parameters + speeds.skinny * project + reads
        merged += 2 * build + product + reads
    if itemsize < 4:
        # The forward's product in float32, which costs another one at least, and x and y widened for it
        merged += product + speeds.byte * 4 * 2 * (pixels_in * d_in + pixels_out * d_out)
    # ΔW has a product of its own, in float32, and so has its dx
    separate = merged + (2 if grad else 1) * product
    return {"fused": fused, "hybrid": hybrid, "merged": merged, "separate": separate}


@lru_cache(maxsize=4096)
def choose_plan(
    shape: tuple[int, ...],
    ranks: tuple[int, ...],
    groups: int,
    pixels_in: int,
    pixels_out: int,
    itemsize: int,
    grad: bool,
    possible: tuple[str, ...] = PLANS,
    projects: bool = True,
) -> str:
    """The cheapest of the ``possible`` plans by `plan_costs`."""
    costs = plan_costs(shape, ranks, groups, pixels_in, pixels_out, itemsize, grad, projects=projects)
    return min(possible, key=costs.__getitem__)


@lru_cache(maxsize=4096)
def choose_toeplitz_plan(
    d_out: int,
    d_in: int,
    terms: int,
    rows: int,
    itemsize: int,
    grad: bool,
    possible: tuple[str, ...],
    speeds: Speeds = SPEEDS,
) -> str:
    """The cheapest plan for a sum of ``terms`` products of two Toeplitz matrices, 0 for a single matrix."""
    costs = toeplitz_costs(d_out, d_in, terms, rows, itemsize, grad, speeds)
    return min(possible, key=costs.__getitem__)


def toeplitz_costs(
    d_out: int, d_in: int, terms: int, rows: int, itemsize: int, grad: bool, speeds: Speeds = SPEEDS
) -> dict[str, float]:
    """As `plan_costs`, for Toeplitz matrices: transforms of rows, and an assembly of the weight along its diagonals."""
    size, product = d_out * d_in, 2 * rows * d_out * d_in
    points = max(2.0, (d_out + d_in) / 2 if terms == 0 else max(d_out, d_in))
    transform = speeds.transform * points * math.log2(points) * rows
    slide = speeds.slide * size * terms
    build = speeds.byte * 2 * itemsize * size + slide + speeds.call
    project = speeds.byte * itemsize * size + 6 * slide + speeds.call
    passes = speeds.byte * itemsize * rows * (d_in + 2 * d_out)
    fused = (2 + 2 * terms) * transform + passes
    hybrid = merged = build
    if grad:
        fused += (3 + 4 * terms) * transform + 2 * passes
        hybrid += build + (2 + 4 * terms) * transform + passes
        merged += build + product + project
    return _with_separate(fused, hybrid, merged, product, grad)


@lru_cache(maxsize=4096)
def choose_kronecker_plan(
    a: tuple[int, int],
    b: tuple[int, int],
    rows: int,
    itemsize: int,
    grad: bool,
    possible: tuple[str, ...],
    speeds: Speeds = SPEEDS,
) -> str:
    """The cheapest plan for ΔW = B ⊗ A with A and B of these shapes."""
    costs = kronecker_costs(a, b, rows, itemsize, grad, speeds)
    return min(possible, key=costs.__getitem__)


def kronecker_costs(
    a: tuple[int, int], b: tuple[int, int], rows: int, itemsize: int, grad: bool, speeds: Speeds = SPEEDS
) -> dict[str, float]:
    """As `plan_costs`, for two small products a row."""
    (p, q), (m, n) = a, b
    d_out, d_in = m * p, n * q
    size, product = d_out * d_in, 2 * rows * d_out * d_in
    skinny = speeds.skinny * 2 * rows * (d_in * p + d_out * n)
    build = speeds.byte * 2 * itemsize * size + speeds.call
    passes = speeds.byte * itemsize * rows * (d_in + 2 * d_out)
    fused = skinny + passes
    hybrid = merged = build
    if grad:
        fused += 2 * skinny + 2 * passes
        hybrid += build + 2 * skinny + passes
        merged += 3 * build + product
    return _with_separate(fused, hybrid, merged, product, grad)


def _with_separate(fused: float, hybrid: float, merged: float, product: float, grad: bool) -> dict[str, float]:
    """The costs by plan; separate runs the layer's products once more, with s·ΔW."""
    return {"fused": fused, "hybrid": hybrid, "merged": merged, "separate": merged + (2 if grad else 1) * product}
