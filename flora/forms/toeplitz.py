"""The Toeplitz family's form: sums of products of Toeplitz matrices, of which circulant and skew-circulant are cases.

A Toeplitz matrix (rows, columns) is given by its diagonals t (rows + columns - 1,): T[i, j] = t[i - j + columns - 1].
Products with it are convolutions. Source: SURM, arXiv 2406.17740, section 3, and docs/methods.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flora.forms.base import Form, Tensors
from flora.ops import ConvOp, Op


class ToeplitzForm(Form):
    """s·ΔW = s·Σ_q L_q·R_q, cut to the weight: L_q (d_out, n), R_q (n, d_in), n = max(d_out, d_in); or s·Σ_q L_q.

    Tensors: the diagonals left (terms, d_out + n - 1) and right (terms, n + d_in - 1); or left (terms, d_out + d_in -
    1) and None. A convolution's weight is the matrix (d_out, d_in/groups·k…).
    """

    __slots__ = ("shape",)

    def __init__(self, scale: float, shape: tuple[int, ...]) -> None:
        super().__init__(scale)
        self.shape = shape

    def _extents(self) -> tuple[int, int]:
        d_out, d_in = self.shape[0], 1
        for extent in self.shape[1:]:
            d_in *= extent
        return d_out, d_in

    def delta(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        left: Tensor = tensors[0]
        eye = torch.eye(self._extents()[1], dtype=left.dtype, device=left.device)
        return self._apply(eye, tensors).mT.reshape(self.shape)

    def twin(self, op: Op, x: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        if isinstance(op, ConvOp):
            return super().twin(op, x, weight, tensors)
        return self._apply(x.to(tensors[0].dtype), tensors)

    def _apply(self, x: Tensor, tensors: Tensors) -> Tensor:
        """s·ΔW·x of x (..., d_in)."""
        left, right = tensors
        d_out, d_in = self._extents()
        x = x.unsqueeze(-2)
        if right is not None:
            x = multiply(right, x, max(d_out, d_in))
        y: Tensor = self.scale * multiply(left, x, d_out).sum(-2)
        return y


def multiply(diagonals: Tensor, x: Tensor, rows: int) -> Tensor:
    """T·x of x (..., columns) by convolution: (..., rows), for diagonals (..., rows + columns - 1)."""
    columns, n = x.shape[-1], diagonals.shape[-1]
    # What wraps around falls on the first columns - 1 places, which are cut off.
    spectrum: Any = torch.fft.rfft(diagonals) * torch.fft.rfft(x, n)
    y: Tensor = torch.fft.irfft(spectrum, n)[..., columns - 1 : columns - 1 + rows]
    return y
