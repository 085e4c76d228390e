"""RLRR's form: W' = W + s·W ⊙ (row·column). Source: RLRR, arXiv 2403.19067, equation 6."""

from __future__ import annotations

from torch import Tensor

from flora.forms.base import Form, Tensors


class RescaleForm(Form):
    """Tensors: row (d_out,) and column (d_in/groups,), each None for ones; both None for no update of W."""

    __slots__ = ()

    of_weight = True

    def delta(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        assert weight is not None
        gain = self._gain(weight, tensors)
        return weight.to(gain.dtype) * gain

    def base_gradient(self, dw: Tensor, tensors: Tensors) -> Tensor:
        gain = self._gain(dw, tensors)
        return dw.to(gain.dtype) * (1 + gain)

    def _gain(self, weight: Tensor, tensors: Tensors) -> Tensor:
        """s·row·column, of a shape that broadcasts over the weight's."""
        row, column = tensors
        gain: Tensor | float = self.scale
        if row is not None:
            gain = gain * row.reshape(-1, *[1] * (weight.ndim - 1))
        if column is not None:
            gain = gain * column.reshape(-1, *[1] * (weight.ndim - 2))
        assert isinstance(gain, Tensor)
        return gain
