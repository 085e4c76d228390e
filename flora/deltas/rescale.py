"""RLRR's delta: rows and columns of the frozen weight rescaled, the bias shifted (arXiv 2403.19067)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flora.config import RescaleConfig
from flora.deltas.base import Delta, Site
from flora.forms import Parts, RescaleForm
from flora.ops import Op


class RescaleDelta(Delta, config=RescaleConfig):
    """ΔW = s·W ⊙ (row·column) with ``row`` (d_out,) and ``column`` (d_in/groups,); ``shift`` (d_out,) on the bias."""

    def __init__(self, config: RescaleConfig, site: Site) -> None:
        super().__init__(config, site)
        d_out, *rest = site.shape
        self.row = site.parameter(d_out) if config.rows else None
        self.column = site.parameter(rest[0]) if config.columns else None
        self.shift = site.parameter(d_out) if config.bias else None
        reference = config.init == "reference"
        if self.row is not None and reference:
            nn.init.kaiming_uniform_(self.row[:, None])
        if self.column is not None and (reference or config.rows):
            nn.init.kaiming_uniform_(self.column[None])

    @property
    def of_bias_alone(self) -> bool:
        return self.row is None and self.column is None

    def parts(self, weight: Tensor | None) -> Parts:
        return Parts(RescaleForm(self.factor), (self.row, self.column))

    def bias_update(self) -> Tensor | None:
        if self.shift is None or self.strength == 1:
            return self.shift
        return self.strength * self.shift

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
