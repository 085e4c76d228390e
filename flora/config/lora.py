"""Configurations of the low-rank family: LoRA, LoCon and LoRA-XS. The formulas are in docs/methods.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from flora.config.base import DeltaConfig, ranks_up_to
from flora.config.tucker import ModeRanksConfig


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(DeltaConfig):
    """LoRA (arXiv 2106.09685): ΔW = s·B·A, A (r, d_in) and B (d_out, r); B starts at 0, so that ΔW = 0.

    On a convolution A is (r, d_in/groups, k…), a convolution to r channels, and B one by 1×1, as in PEFT. In groups
    they share A, and the rows of B belong to their group: no rank is refused, on depthwise layers either.

    Args:
        rank: r, of every layer. It is never cut to a layer's extents, as s = alpha / r would be another then.
        tucker: on a convolution, LyCORIS's LoCon with Tucker-2: a 1×1 convolution to r channels, one of the kernel's
            size from r to r, and one by 1×1. Changes nothing about other layers.
        rank_stabilized: ΔW is multiplied by alpha / √r (rsLoRA, arXiv 2312.03732) instead of alpha / r.
    """

    method: ClassVar[str] = "lora"

    rank: int = 16
    tucker: bool = False
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("rank", self._rank("rank", self.rank))
        self._flags("tucker", "rank_stabilized")
        if self.rank_stabilized and self.alpha is None:
            self._fail("rank_stabilized", "needs alpha, for ΔW to be multiplied by alpha / √rank")

    @property
    def resolved_scale(self) -> float:
        if self.rank_stabilized and self.alpha is not None:
            return self.alpha / math.sqrt(self.rank)
        return super().resolved_scale

    def with_scale(self, scale: float) -> Self:
        return replace(self, scale=scale, alpha=None, rank_stabilized=False)

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> Sequence[Mapping[str, Any]]:
        return ranks_up_to(max(min(shape[0], math.prod(shape[1:])) for shape in shapes))

    def with_ranks(self, ranks: tuple[int, ...]) -> Self:
        if not ranks:
            self._fail("rank", "must be a positive int", ranks)
        return replace(self.with_scale(self.resolved_scale), rank=ranks[0])


@dataclass(frozen=True, kw_only=True)
class LoRAXSConfig(ModeRanksConfig):
    """LoRA-XS (arXiv 2405.17604): leading singular vectors of W as fixed factors, between which a small core learns.

    A convolution's factors are those of its HOSVD, the leading left singular vectors of the unfolding along each mode,
    and its core has the kernel's modes, too.

    Args:
        rank: as of `TuckerConfig`; an int is also cut to the number of singular vectors that an unfolding has.
        kernel_rank: as of `TuckerConfig`.
        singular_values: True: the input's factor is multiplied by the singular values that belong to it, as the
            authors' is. False: every factor is orthonormal.

    The core starts at 0, so that ΔW = 0; the authors draw it ~ N(0, 1e-5²).
    """

    method: ClassVar[str] = "lora-xs"

    singular_values: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._flags("singular_values")

    def refuses(self, kind: str, module: nn.Module) -> str | None:
        if kind == "quantised":
            return "its fixed factors are those of a weight that is there as plain numbers"
        return super().refuses(kind, module)

    def ranks(self, shape: Sequence[int], name: str = "") -> tuple[int, ...]:
        ranks = super().ranks(shape, name)
        if not isinstance(self.rank, int):
            return ranks
        size = math.prod(shape)
        return tuple(min(rank, size // dim) for rank, dim in zip(ranks, shape, strict=True))
