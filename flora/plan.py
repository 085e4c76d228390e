"""Which plan is cheapest: a cost model in floating-point operations and bytes, with no table of special cases.

Costs are in units of one flop of the frozen layer's own product. Every plan also pays that product (and in training its
input gradient), so only what comes on top is counted. The four constants below are ratios between speeds of one
machine and vary little from one to the next.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

SKINNY = 1.6
"""Cost of a flop in a product with the rank as one extent, against one of a large product."""

BYTE = 6.0
"""Flops of a large product in the time in which one byte comes from or goes to memory."""

GROUPED = 6.0
"""Cost of a flop in a grouped convolution, whose loops have little to share."""

CALL = 2.0e5
"""Flops in the time of one more operation: a tensor allocated, a kernel started."""


@lru_cache(maxsize=4096)
def choose_plan(
    shape: tuple[int, ...],
    ranks: tuple[int, ...],
    groups: int,
    pixels_in: int,
    pixels_out: int,
    itemsize: int,
    grad: bool,
) -> str:
    """The cheapest of "fused", "hybrid" and "merged" for one call.

    ``shape`` is the weight's (d_out, d_in/groups, *k), ``ranks`` the core's; pixels (or rows) are counted over the
    whole batch, before and after the layer; ``itemsize`` is an activation's in bytes; ``grad`` whether anything learns.
    """
    d_out, width, *kernel = shape
    r_out, r_in = ranks[:2]
    taps = prod(kernel)
    d_in = width * groups
    size = d_out * width * taps

    project = 2 * pixels_in * d_in * r_in
    convolve = 2 * pixels_out * groups * r_in * r_out * taps
    expand = 2 * pixels_out * d_out * r_out
    skinny = SKINNY * (project + convolve + expand)
    traffic = BYTE * itemsize * (pixels_in * d_in + 2 * pixels_out * d_out)
    build = SKINNY * 2 * size * r_out + BYTE * 2 * itemsize * size + CALL

    fused = skinny + traffic
    hybrid = merged = build
    if grad:
        # dk and dh again, three parameter gradients, dx; h is kept, k is computed a second time
        of_parameters = 2 * skinny + SKINNY * convolve
        reads = BYTE * itemsize * (pixels_in * d_in + pixels_out * d_out)
        fused += of_parameters + SKINNY * project + reads + BYTE * itemsize * 2 * pixels_in * d_in
        hybrid += build + of_parameters + SKINNY * project + reads
        weight_gradient = 2 * pixels_out * size * (1.0 if groups == 1 else max(1.0, GROUPED / width))
        merged += 2 * build + weight_gradient + reads
    costs = {"fused": fused, "hybrid": hybrid, "merged": merged}
    return min(costs, key=costs.__getitem__)
