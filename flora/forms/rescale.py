"""RLRR's form: W' = W + s·W ⊙ (row·column). Source: RLRR, arXiv 2403.19067, equation 6."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora import _core, reference
from flora.forms.base import Form, Gradients, Tensors


class RescaleForm(Form):
    """Tensors: row (d_out,) and column (d_in/groups,), each None for ones."""

    __slots__ = ()

    of_weight = True

    def delta(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        assert weight is not None
        row, column = tensors
        return reference.rescale_delta(weight, row, column, self.scale)

    def effective(self, weight: Tensor, tensors: Tensors) -> Tensor:
        row, column = tensors
        out = torch.empty_like(weight, requires_grad=False)
        _core.rescale_reconstruct(out, weight, row, column, self.scale)
        return out

    def project(self, dw: Tensor, weight: Tensor | None, tensors: Tensors, needs: Sequence[bool]) -> Gradients:
        assert weight is not None
        row, column = tensors
        d_row, d_column = (torch.empty_like(t) if need else None for t, need in zip(tensors, needs, strict=True))
        if any(needs):
            _core.rescale_backward(d_row, d_column, dw, weight, row, column, self.scale)
        return d_row, d_column

    def base_gradient(self, dw: Tensor, tensors: Tensors) -> Tensor:
        row, column = tensors
        out = torch.empty_like(dw)
        _core.rescale_reconstruct(out, dw, row, column, self.scale)  # which is linear in the weight
        return out
