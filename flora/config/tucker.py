"""The configuration of FLoRA's delta, and what every configuration with a rank for each mode has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from flora.config.base import DeltaConfig, Rank, is_names, ranks_up_to

INITS = ("reference", "orthogonal", "hosvd")
PARTS = ("core", "factors", "out", "in", "kernel")


@dataclass(frozen=True, kw_only=True)
class ModeRanksConfig(DeltaConfig):
    """A configuration with a rank for each mode of the weight.

    Args:
        rank: an int gives the channel modes min(rank, dim); a tuple gives every mode, in weight order (out, in, k…),
            and is exact.
        kernel_rank: the kernel modes get min(kernel_rank, k), unless ``rank`` is a tuple.

    A parameter of a module that is no layer has no kernel: an int gives all of its modes min(rank, dim), so that a
    mixture's experts, unlike the taps of a kernel, need not be mixtures of few.
    """

    rank_by_mode: ClassVar[bool] = True

    rank: Rank = 16
    kernel_rank: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("rank", self._rank("rank", self.rank))
        self._positive("kernel_rank")

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> Sequence[Mapping[str, Any]]:
        return ranks_up_to(max(map(max, shapes)))

    def for_parameter(self, name: str) -> Self:
        own = super().for_parameter(name)
        return replace(own, kernel_rank=own.rank) if isinstance(own.rank, int) else own

    def with_ranks(self, ranks: tuple[int, ...]) -> Self:
        return replace(self.with_scale(self.resolved_scale), rank=ranks)

    def ranks(self, shape: Sequence[int], name: str = "") -> tuple[int, ...]:
        """The rank of every mode of a weight of the shape (out, in / groups, k…).

        Args:
            shape: the weight's, in flora's order.
            name: the module's, for the message.

        Raises:
            ValueError: a tuple of ranks that has not the weight's order or goes above a mode, or an empty mode.
        """
        where = f"{name}: " if name else ""
        if not all(shape):
            raise ValueError(f"{where}the weight's shape {tuple(shape)} has an empty mode")
        if isinstance(self.rank, int):
            wanted = [self.rank, self.rank, *[self.kernel_rank] * (len(shape) - 2)]
            return tuple(min(rank, dim) for rank, dim in zip(wanted, shape, strict=True))
        if len(self.rank) != len(shape):
            raise ValueError(f"{where}rank={self.rank} must have one entry a mode of the weight {tuple(shape)}")
        if any(rank > dim for rank, dim in zip(self.rank, shape, strict=True)):
            raise ValueError(f"{where}rank={self.rank} goes above a mode of the weight {tuple(shape)}")
        return self.rank


@dataclass(frozen=True, kw_only=True)
class TuckerConfig(ModeRanksConfig):
    """FLoRA's delta (arXiv 2405.14739): ΔW = s · G ×₁U_out ×₂U_in ×₃U_k1 …, of the weight's own order.

    Args:
        rank: an int gives the channel modes min(rank, dim); a tuple gives every mode, in weight order (out, in, k…),
            and is exact.
        kernel_rank: the kernel modes get min(kernel_rank, k), unless ``rank`` is a tuple. Of a parameter of a module
            that is no layer all modes get min(rank, dim): a mixture's experts are no kernel.
        init: how the factors start: "reference" (the authors', kaiming normal), "orthogonal" or "hosvd" (the leading
            singular vectors of the weight's unfoldings). The core starts at 0, so that ΔW = 0.
        trainable: which parts learn: "core", "factors" (all of them), or single modes "out", "in", "kernel". It must
            hold "core": while the core is 0, no factor has a gradient. Of a parameter of a module that is no layer
            "out", "in" and "kernel" are the first, the second and the other modes.
    """

    method: ClassVar[str] = "tucker"

    init: str = "reference"
    trainable: Sequence[str] = ("core", "factors")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("init", INITS)
        parts = (self.trainable,) if isinstance(self.trainable, str) else self.trainable
        if not is_names(parts) or not parts or not all(part in PARTS for part in parts):
            self._fail("trainable", f"must be some of {', '.join(PARTS)}")
        self._set("trainable", tuple(part for part in PARTS if part in parts))
        if "core" not in self.trainable:
            self._fail("trainable", 'lacks "core", which starts at 0: no factor could ever learn')

    def refuses(self, kind: str, module: nn.Module) -> str | None:
        if kind == "quantised" and self.init == "hosvd":
            return 'init="hosvd" needs its weight as plain numbers'
        return super().refuses(kind, module)
