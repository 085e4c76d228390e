"""RLRR's form: W' = W + s·W ⊙ (row·column). Source: RLRR, arXiv 2403.19067."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora import _core, reference
from flora.forms.base import Form, Gradients, Tensors, outputs
from flora.ops import ConvOp, Op, rows


class RescaleForm(Form):
    """Tensors: row (d_out,) and column (d_in/groups,), each None for ones."""

    __slots__ = ()

    name = "rescale"
    of_weight = True

    @classmethod
    def places(cls, modes: int) -> int:
        return 2

    def delta(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        assert weight is not None
        row, column = tensors
        return reference.rescale_delta(weight, row, column, self.scale)

    def twin(self, op: Op, x: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        """s·row ⊙ op(column ⊙ x, W), each product in x's own dtype."""
        assert weight is not None
        row, column = tensors
        real = next(t for t in tensors if t is not None).dtype
        beyond = [1] * (weight.ndim - 2)
        if column is not None:
            groups = op.groups if isinstance(op, ConvOp) else 1
            x = (x * column.repeat(groups).view(-1, *beyond)).to(x.dtype)
        y: Tensor = self.scale * op.base(x, weight, None).to(real)
        return y if row is None else y * row.view(-1, *beyond)

    def effective(self, weight: Tensor, tensors: Tensors) -> Tensor:
        row, column = tensors
        out = torch.empty_like(weight, requires_grad=False)
        _core.rescale_reconstruct(out, weight, row, column, self.scale)
        return out

    def project(self, dw: Tensor, weight: Tensor | None, tensors: Tensors, needs: Sequence[bool]) -> Gradients:
        assert weight is not None
        row, column = tensors
        d_row, d_column = outputs(tensors, needs)
        if any(needs):
            _core.rescale_backward(d_row, d_column, dw, weight, row, column, self.scale)
        return d_row, d_column

    def gradients(
        self, op: Op, dy: Tensor, x: Tensor, weight: Tensor, tensors: Tensors, needs: Sequence[bool]
    ) -> Gradients:
        row, column = tensors
        d_row, d_column = outputs(tensors, needs)
        if any(needs):
            _core.rescale_linear_backward(d_row, d_column, rows(dy), rows(x), weight, row, column, self.scale)
        return d_row, d_column

    def runs(self, op: Op, tensors: Tensors) -> tuple[str, ...]:
        return ("merged",) if isinstance(op, ConvOp) else ("merged", "hybrid")

    def cheapest(
        self, op: Op, x: Tensor, weight: Tensor, tensors: Tensors, grad: bool, possible: tuple[str, ...]
    ) -> str:
        """hybrid where it can be: the weight's gradient is taken to the vectors tile by tile and never written."""
        return "hybrid" if "hybrid" in possible and not weight.requires_grad else possible[-1]

    def base_gradient(self, dw: Tensor, tensors: Tensors) -> Tensor:
        row, column = tensors
        out = torch.empty_like(dw)
        _core.rescale_reconstruct(out, dw, row, column, self.scale)  # which is linear in the weight
        return out
