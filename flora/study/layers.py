"""The kinds of layers that updates belong to, and which of a network's layers stand for the others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

KINDS = ("pointwise", "depthwise", "full", "linear")
"""A convolution by single points, one of each channel alone, any other, and a matrix."""


def kind(shape: Sequence[int]) -> str:
    """Of a weight (d_out, d_in/groups, k…), which of `KINDS`. Raises ValueError for one that is no matrix or kernel."""
    if len(shape) < 2:
        raise ValueError(f"a weight of the shape {tuple(shape)} is no matrix and no kernel")
    if len(shape) == 2:
        return "linear"
    if math.prod(shape[2:]) == 1:
        return "pointwise"
    return "depthwise" if shape[1] == 1 else "full"


def chosen(shapes: Mapping[str, Sequence[int]], each: Mapping[str, int], largest: int) -> list[str]:
    """Names of so many layers of each kind, spread evenly over the network's depth; those with more than ``largest``
    entries are passed over. Layers are in the order of the numbers in their names."""
    names = sorted((name for name, shape in shapes.items() if math.prod(shape) <= largest), key=in_depth)
    found = []
    for one in KINDS:
        alike = [name for name in names if kind(shapes[name]) == one]
        count = min(each[one], len(alike))
        found += [alike[(2 * i + 1) * len(alike) // (2 * count)] for i in range(count)]
    return found


def in_depth(name: str) -> list[tuple[bool, int | str]]:
    """By which names sort as a reader would: block 2 before block 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name) if part]
