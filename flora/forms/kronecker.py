"""The Kronecker form: ΔW = B ⊗ A, applied as two small products. Source: SURM, arXiv 2406.17740."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from flora import _core, reference
from flora.forms.base import Gradients, Tensors, outputs
from flora.forms.matrix import MatrixForm
from flora.ops import ConvOp, Op, rows
from flora.plan import choose_kronecker_plan


class KroneckerForm(MatrixForm):
    """s·ΔW = s·(B ⊗ A). Tensors: A (p, q) and B (d_out/p, d_in/q).

    h (rows, d_in/q·p) is what backward needs: x as (rows, d_in/q, q) times Aᵀ.
    """

    __slots__ = ()

    name = "kronecker"
    in_half = True

    @classmethod
    def places(cls, modes: int) -> int:
        return 2

    def delta(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        a, b = tensors
        return reference.kronecker_delta(a, b, self.scale).reshape(self.shape)

    def twin(self, op: Op, x: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        if isinstance(op, ConvOp):
            return super().twin(op, x, weight, tensors)
        a, b = tensors
        return reference.kronecker_update(x, a, b, self.scale)

    def lookup(self, ids: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        a, b = tensors
        of_b, of_a = F.embedding(ids // len(a), b), F.embedding(ids % len(a), a)
        rows: Tensor = self.scale * (of_b.unsqueeze(-1) * of_a.unsqueeze(-2)).flatten(-2)
        return rows

    def reconstruct(self, out: Tensor, weight: Tensor | None, tensors: Tensors) -> None:
        a, b = tensors
        _core.kronecker_reconstruct(out, weight, a, b, self.scale)

    def project(self, dw: Tensor, weight: Tensor | None, tensors: Tensors, needs: Sequence[bool]) -> Gradients:
        (a, b), (d_a, d_b) = tensors, outputs(tensors, needs)
        if any(needs):
            _core.kronecker_reconstruct_backward(d_a, d_b, dw.reshape(self.extents), a, b, self.scale)
        return d_a, d_b

    def keeps_input(self, needs: Sequence[bool]) -> bool:
        return needs[0]  # A; B has h

    def update_(self, op: Op, y: Tensor, x: Tensor, tensors: Tensors, want_h: bool) -> tuple[Tensor, Tensor | None]:
        a, b = tensors
        y, x = op.writable(y), rows(x)
        h = a.new_empty(self.kept(op, x, y, tensors)) if want_h else None
        _core.kronecker_forward(rows(y), h, x, a, b, self.scale)
        return y, h

    def kept(self, op: Op, x: Tensor, y: Tensor, tensors: Tensors) -> tuple[int, ...]:
        a, b = tensors
        return *x.shape[:-1], b.shape[1] * a.shape[0]

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
        (a, b), (d_a, d_b) = tensors, outputs(tensors, needs)
        dx, x = None if dx is None else rows(dx), None if x is None else rows(x)
        _core.kronecker_backward(dx, d_a, d_b, rows(dy), x, h, a, b, self.scale)
        return d_a, d_b

    def cheapest(
        self, op: Op, x: Tensor, weight: Tensor, tensors: Tensors, grad: bool, possible: tuple[str, ...]
    ) -> str:
        a, b = tensors
        _, inside, _ = op.pixels(x, weight)
        return choose_kronecker_plan(tuple(a.shape), tuple(b.shape), inside, x.element_size(), grad, possible)
