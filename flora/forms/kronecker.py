"""The Kronecker form: ΔW = B ⊗ A, applied as two small products. Source: SURM, arXiv 2406.17740, section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from flora.forms.base import Form, Tensors
from flora.ops import ConvOp, Op


class KroneckerForm(Form):
    """s·ΔW = s·(B ⊗ A). Tensors: A (p, q) and B (d_out/p, d_in/q); a convolution's weight is the matrix of its rows."""

    __slots__ = ("shape",)

    def __init__(self, scale: float, shape: tuple[int, ...]) -> None:
        super().__init__(scale)
        self.shape = shape

    def delta(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        a, b = tensors
        return self.scale * torch.kron(b, a).reshape(self.shape)

    def twin(self, op: Op, x: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        if isinstance(op, ConvOp):
            return super().twin(op, x, weight, tensors)
        a, b = tensors
        h = x.to(a.dtype).reshape(*x.shape[:-1], b.shape[1], a.shape[1]) @ a.mT  # (..., d_in/q, p)
        y: Tensor = self.scale * (b @ h).flatten(-2)
        return y
