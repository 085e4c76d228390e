"""The Toeplitz family's form: sums of products of Toeplitz matrices, of which circulant and skew-circulant are cases.

A Toeplitz matrix (rows, columns) is given by its diagonals t (rows + columns - 1,): T[i, j] = t[i - j + columns - 1].
Products with it are convolutions. Source: SURM, arXiv 2406.17740, and docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora import _core, reference
from flora.forms.base import Gradients, Tensors, outputs
from flora.forms.matrix import MatrixForm
from flora.ops import ConvOp, Op, rows
from flora.plan import choose_toeplitz_plan


class ToeplitzForm(MatrixForm):
    """s·ΔW = s·Σ_q L_q·R_q, cut to the weight: L_q (d_out, n), R_q (n, d_in), n = max(d_out, d_in); or s·Σ_q L_q.

    Tensors: the diagonals left (terms, d_out + n - 1) and right (terms, n + d_in - 1); or left (terms, d_out + d_in -
    1) and None.
    """

    __slots__ = ()

    name = "toeplitz"

    @classmethod
    def places(cls, modes: int) -> int:
        return 2

    def delta(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        left, right = tensors
        return reference.toeplitz_delta(left, right, *self.extents, self.scale).reshape(self.shape)

    def twin(self, op: Op, x: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        if isinstance(op, ConvOp):
            return super().twin(op, x, weight, tensors)
        left, right = tensors
        return reference.toeplitz_update(x, left, right, self.shape[0], self.scale)

    def lookup(self, ids: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        left, right = tensors
        d_out, d_in = self.extents
        columns = left.shape[-1] - d_out + 1
        rows = left[
            :, ids.unsqueeze(-1) + torch.arange(columns - 1, -1, -1, device=ids.device)
        ]  # (terms, ..., columns)
        if right is not None:  # times R, whose transpose has its diagonals in reverse
            flipped = right.flip(-1).reshape(len(right), *[1] * ids.ndim, -1)
            rows = reference.toeplitz_multiply(flipped, rows, d_in)
        found: Tensor = self.scale * rows.sum(0)
        return found

    def reconstruct(self, out: Tensor, weight: Tensor | None, tensors: Tensors) -> None:
        left, right = tensors
        _core.toeplitz_reconstruct(out, weight, left, right, self.scale)

    def project(self, dw: Tensor, weight: Tensor | None, tensors: Tensors, needs: Sequence[bool]) -> Gradients:
        (left, right), (d_left, d_right) = tensors, outputs(tensors, needs)
        if any(needs):
            _core.toeplitz_reconstruct_backward(d_left, d_right, dw.reshape(self.extents), left, right, self.scale)
        return d_left, d_right

    def update_(self, op: Op, y: Tensor, x: Tensor, tensors: Tensors, want_h: bool) -> tuple[Tensor, Tensor | None]:
        left, right = tensors
        y = op.writable(y)
        _core.toeplitz_forward(rows(y), rows(x), left, right, self.scale)
        return y, None

    def update_backward(
        self,
        op: Op,
        dx: Tensor | None,
        dy: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        tensors: Tensors,
        needs: Sequence[bool],
    ) -> Gradients:
        (left, right), (d_left, d_right) = tensors, outputs(tensors, needs)
        dx, x = None if dx is None else rows(dx), None if x is None else rows(x)
        _core.toeplitz_backward(dx, d_left, d_right, rows(dy), x, left, right, self.scale)
        return d_left, d_right

    def cheapest(
        self, op: Op, x: Tensor, weight: Tensor, tensors: Tensors, grad: bool, possible: tuple[str, ...]
    ) -> str:
        right = tensors[1]
        terms = 0 if right is None else len(right)
        _, inside, _ = op.pixels(x, weight)
        return choose_toeplitz_plan(*self.extents, terms, inside, x.element_size(), grad, possible)
