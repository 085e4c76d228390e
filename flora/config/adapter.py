"""The configuration of SURM's adapter: a structured matrix after a module (arXiv 2406.17740, docs/methods.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from flora.config.base import DeltaConfig, Rank, is_int
from flora.config.structured import divisors

KINDS = ("circulant", "toeplitz", "kronecker", "ldr")

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "relu": lambda x: x.clamp(min=0),  # its slope at 0, where every block starts, is 1; that of F.relu is 0
    "silu": F.silu,
    "tanh": lambda x: x.tanh(),
}


@dataclass(frozen=True, kw_only=True)
class StructuredAdapterConfig(DeltaConfig):
    """A block after a module: out = y + s·act(M·dropout(y)) + b, y the module's output, M square and structured.

    Args:
        kind: M is "circulant", C(a ⊙ b); "toeplitz", T(a ⊙ b), one symmetric matrix; "kronecker", (B ⊗ A)ᵀ of square
            factors; "ldr", Σ_i C(c_i)·S(s_i). All start at M = 0.
        activation: "identity", "gelu", "relu", "silu" or "tanh": act(0) = 0, so that out = y at the start.
        bias: b, which starts at 0.
        norm_before: a LayerNorm of its own on what the block is given: M·dropout(norm(y)).
        norm_after: a LayerNorm of its own on what it adds, before b: s·norm(act(…)).
        rank: of "kronecker": A is (rank, rank), B (n/rank, n/rank), n the width of the module's output, which it must
            divide. 16 if not given.
        terms: of "ldr": how many products are summed. 2 if not given.

    Any module may be named whose output is a tensor, or has one as its first element; "all" means Linear layers and
    convolutions. The block acts on channels: the last axis, for convolutions the second. ``plan`` has no meaning here.
    """

    method: ClassVar[str] = "structured_adapter"
    ordered: ClassVar[bool] = False
    of_output: ClassVar[bool] = True

    kind: str = "circulant"
    activation: str = "gelu"
    bias: bool = True
    norm_before: bool = False
    norm_after: bool = False
    rank: int | None = None
    terms: int | None = None

    def __post_init__(self) -> None:
        self._one_of("kind", KINDS)
        for name, kind, default in (("rank", "kronecker", 16), ("terms", "ldr", 2)):
            if kind == self.kind and getattr(self, name) is None:
                self._set(name, default)
            elif kind != self.kind and getattr(self, name) is not None:
                self._fail(name, f"has no meaning for kind={self.kind!r}")
        if self.kind != "kronecker" and self.rank_pattern is not None:
            self._fail("rank_pattern", f"has no meaning for kind={self.kind!r}")
        super().__post_init__()
        if self.rank is not None:
            self._set("rank", self._rank("rank", self.rank))
        if self.terms is not None:
            self._positive("terms")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            self._fail(
                "activation",
                f"must be one of {', '.join(ACTIVATIONS)}: only where act(0) = 0 a block starts as nothing",
            )
        self._flags("bias", "norm_before", "norm_after")
        if self.plan != "auto":
            self._fail("plan", "has no meaning for a block, which has no weight to build")

    def _rank(self, name: str, value: Any) -> Rank:
        if not is_int(value) or value < 1:
            self._fail(name, "must be a positive int", value)
        return int(value)

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> Sequence[Mapping[str, Any]]:
        widths = [shape[0] for shape in shapes]
        if self.kind == "kronecker":
            return [{"rank": rank} for rank in divisors(math.gcd(*widths))]
        return [{"terms": terms} for terms in range(1, max(widths) + 1)] if self.kind == "ldr" else ({},)

    def block_size(self, width: int, name: str = "") -> int:
        """The r of "kronecker" for an output of a width. ValueError, naming module and divisors, if it does not fit."""
        assert self.rank is not None
        if width % self.rank:
            where = f"{name}: " if name else ""
            raise ValueError(
                f"{where}rank={self.rank} does not divide the width {width} of the output; "
                f"{', '.join(map(str, divisors(width)))} would"
            )
        return self.rank
