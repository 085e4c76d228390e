"""What the forms of matrices share: a weight of any order is the matrix (d_out, d_in/groups·k…) of its rows."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from flora.forms.base import Form, Tensors
from flora.ops import ConvOp, Op
from flora.plan import PLANS


class MatrixForm(Form):
    """ΔW by a matrix; its kernels act on the rows of a Linear, and on a convolution it is merged.

    ``shape`` is the weight's, (d_out, d_in/groups, *k).
    """

    __slots__ = ("shape",)

    def __init__(self, scale: float, shape: tuple[int, ...]) -> None:
        super().__init__(scale)
        self.shape = shape

    @classmethod
    def of(cls, scale: float, shape: tuple[int, ...], tensors: Tensors) -> Self:
        return cls(scale, shape)

    @property
    def extents(self) -> tuple[int, int]:
        """(d_out, d_in/groups·k…)"""
        return self.shape[0], math.prod(self.shape[1:])

    @abstractmethod
    def reconstruct(self, out: Tensor, weight: Tensor | None, tensors: Tensors) -> None:
        """out = weight + s·ΔW in C, both of the matrix's extents."""

    def alone(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        out: Tensor = tensors[0].new_empty(self.extents)
        self.reconstruct(out, None, tensors)
        return out.view(self.shape)

    def effective(self, weight: Tensor, tensors: Tensors) -> Tensor:
        out = torch.empty_like(weight, requires_grad=False)
        if weight.ndim == 2:
            self.reconstruct(out, weight, tensors)
        elif weight.is_contiguous():
            self.reconstruct(out.flatten(1), weight.flatten(1), tensors)
        else:  # channels_last, where the rows of the matrix do not lie in a row
            delta = self.alone(None, tensors)
            out.copy_(weight.to(delta.dtype) + delta)
        return out

    def runs(self, op: Op, tensors: Tensors) -> tuple[str, ...]:
        return ("merged",) if isinstance(op, ConvOp) else PLANS
