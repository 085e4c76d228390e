"""The configuration of RLRR's rescaling (arXiv 2403.19067). The formulas are in docs/methods.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from flora.config.base import DeltaConfig


@dataclass(frozen=True, kw_only=True)
class RescaleConfig(DeltaConfig):
    """W' = W + s·W ⊙ (row·column), bias' = bias + shift; on a normalisation y' = y·(1 + s·row) + shift.

    Args:
        rows: a factor for each row of the weight, (d_out,).
        columns: a factor for each column, (d_in/groups,), the same for every place of a kernel.
        bias: a shift of the output, (d_out,), which starts at 0. A layer without a bias gets one when it is merged.
        init: "identity": row = 0 (columns alone: column = 0), so that W' = W at the start; "reference": the authors',
            row and column kaiming_uniform with a = 0, U(-b, b) with b = √(6/fan_in): √6 and √(6·groups/d_in).

    Rows alone are SSF's and the Hadamard adapter's rescaling, columns alone IA³'s. ``target_modules="all"`` means
    normalisation layers, too: there ``row`` has the shape of the weight (authors: ~ N(0, 0.02²)), there is no
    ``column``, and a ``shift`` (authors: ~ N(0, 0.02²)) only where the layer has a place for a bias, so not on RMSNorm.
    Embeddings, quantised layers and packed attention are refused.
    """

    method: ClassVar[str] = "rescale"
    of_norms: ClassVar[bool] = True

    rows: bool = True
    columns: bool = True
    bias: bool = True
    init: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._flags("rows", "columns", "bias")
        self._one_of("init", ("identity", "reference"))
        if not (self.rows or self.columns or self.bias):
            self._fail("rows", "columns and bias are all False: nothing could learn")

    def refuses(self, kind: str, module: nn.Module) -> str | None:
        if kind == "quantised":
            return "its weight must be there as plain numbers"
        if kind == "parameter" and self.bias:
            return "it has no bias that a shift could be added to (bias=False has no shift)"
        if kind == "embedding":
            return "its rows are looked up, not multiplied by"
        if kind == "attention":
            return "its packed projections are three matrices, not one; its out_proj can be named"
        if kind == "norm" and not self.rows and not (self.bias and "bias" in module._parameters):
            return f"with rows=False and bias={self.bias} nothing of it could learn"
        return None
