"""RLRR's delta: rows and columns of the frozen weight rescaled, the bias shifted (arXiv 2403.19067)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flora.config import RescaleConfig
from flora.deltas.base import Site, WeightDelta, all_zero
from flora.forms import DenseForm, Parts, RescaleForm
from flora.ops import Op

NORM_STD = 0.02  # of the authors' programs


class RescaleDelta(WeightDelta, config=RescaleConfig):
    """ΔW = s·W ⊙ (row·column) with ``row`` (d_out,) and ``column`` (d_in/groups,); ``shift`` (d_out,) on the bias.

    On a normalisation y = x̂ ⊙ W + bias becomes y·(1 + s·row) + shift, with ``row`` and ``shift`` of W's shape, no
    ``column``, and a ``shift`` only where the layer has a place for a bias.
    """

    of_weight = True

    def __init__(self, config: RescaleConfig, site: Site) -> None:
        super().__init__(config, site)
        self.norm_offset = site.norm_offset
        extent = site.shape if self.of_norm else site.shape[:1]
        shifts = config.bias and (site.has_bias or not self.of_norm)
        self.row = site.parameter(*extent) if config.rows else None
        self.column = site.parameter(site.shape[1]) if config.columns and not self.of_norm else None
        self.shift = site.parameter(*extent) if shifts else None
        if self.of_norm:
            self._init_norm()
            return
        reference = config.init == "reference"
        if self.row is not None and reference:
            nn.init.kaiming_uniform_(self.row[:, None])
        if self.column is not None and (reference or config.rows):
            nn.init.kaiming_uniform_(self.column[None])

    def _init_norm(self) -> None:
        if self.config.init == "reference":
            for parameter in (self.row, self.shift):
                if parameter is not None:
                    nn.init.normal_(parameter, std=NORM_STD)

    @property
    def of_norm(self) -> bool:
        return self.norm_offset is not None

    @property
    def of_bias_alone(self) -> bool:
        return self.row is None and self.column is None

    def stuck(self) -> str | None:
        both = self.shift is None and self.row is not None and self.column is not None
        return "row and column are zero" if both and all_zero(self.row, self.column) else None

    def parts(self, weight: Tensor | None) -> Parts:
        if self.norm_offset is None:
            return Parts(RescaleForm(self.factor), (self.row, self.column))
        assert weight is not None and self.row is not None
        return Parts(DenseForm(self.factor), ((weight.to(self.row.dtype) + self.norm_offset) * self.row,))

    def bias_update(self, bias: Tensor | None) -> Tensor | None:
        shift = self.shift if self.shift is None or self.strength == 1 else self.strength * self.shift
        if not self.of_norm or self.row is None or bias is None:
            return shift
        of_row = self.factor * self.row * bias.to(self.row.dtype)
        return of_row if shift is None else of_row + shift

    # Of the bias alone: the weight is as it was ---------------------------------------------------------------------

    def adapted(self, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        if self.of_bias_alone:
            return op.base(x, weight, bias)
        return super().adapted(op, x, weight, bias, dropout)

    def update(self, op: Op, x: Tensor, weight: Tensor | None, dropout: float) -> Tensor:
        return x.new_zeros(()) if self.of_bias_alone else super().update(op, x, weight, dropout)

    def effective_weight(self, weight: Tensor) -> Tensor:
        return weight if self.of_bias_alone else super().effective_weight(weight)

    def alone(self, weight: Tensor | None) -> Tensor:
        if not self.of_bias_alone:
            return super().alone(weight)
        assert self.shift is not None
        return torch.zeros(self.shape, dtype=self.shift.dtype, device=self.shift.device)
