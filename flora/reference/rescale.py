"""Twins of the rescaling kernels, and their differentiable half.

W' = W ⊙ (1 + s·row·column): row (d_out) along the first mode of the weight, column (d_in / groups) along the second,
the same at every place of a kernel. Source: RLRR, arXiv 2403.19067.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rescale_gain(weight: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    """row·column in a shape that broadcasts against the weight; a vector that is None is ones."""
    beyond = [1] * (weight.ndim - 2)
    gain = weight.new_ones([1, 1, *beyond], dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if row is not None:
        gain = gain * row.view(-1, 1, *beyond)
    if column is not None:
        gain = gain * column.view(1, -1, *beyond)
    return gain


def rescale_delta(weight: Tensor, row: Tensor | None, column: Tensor | None, scale: float) -> Tensor:
    """s·W ⊙ (row·column): the delta weight, in the vectors' dtype."""
    gain = rescale_gain(weight, row, column)
    return scale * (weight.to(gain.dtype) * gain)


def rescale_reconstruct(out: Tensor, weight: Tensor, row: Tensor | None, column: Tensor | None, scale: float) -> None:
    """out = W + s·W ⊙ (row·column); the sum is rounded to out's dtype once."""
    with torch.no_grad():
        delta = rescale_delta(weight, row, column, scale)
        out.copy_(weight.to(delta.dtype) + delta)


def rescale_backward(
    d_row: Tensor | None,
    d_column: Tensor | None,
    d_weight: Tensor,
    weight: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    scale: float,
) -> None:
    """The adjoint of `rescale_reconstruct`: the gradient of out projected on row and column; None skips one."""
    with torch.no_grad():
        if d_row is not None:
            gain = rescale_gain(weight, None, column)
            of_row = d_weight.to(gain.dtype) * weight.to(gain.dtype) * gain
            d_row.copy_(scale * of_row.flatten(1).sum(1))
        if d_column is not None:
            gain = rescale_gain(weight, row, None)
            of_column = d_weight.to(gain.dtype) * weight.to(gain.dtype) * gain
            d_column.copy_(scale * of_column.transpose(0, 1).flatten(1).sum(1))


def rescale_linear_backward(
    d_row: Tensor | None,
    d_column: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    scale: float,
) -> None:
    """`rescale_backward` with dyᵀ·x for d_weight. All axes of dy and x but the last count rows."""
    with torch.no_grad():
        real = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dy, x = (t[None].flatten(0, -2).to(real) for t in (dy, x))
        rescale_backward(d_row, d_column, dy.mT @ x, weight, row, column, scale)
