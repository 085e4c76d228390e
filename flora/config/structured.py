"""Configurations of SURM's structured matrices (arXiv 2406.17740). The formulas are in docs/methods.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flora.config.base import DeltaConfig, is_int


@dataclass(frozen=True, kw_only=True)
class CirculantConfig(DeltaConfig):
    """ΔW = s·C(c), C[i, j] = c[(i - j) mod n], n = max(d_out, d_in), cut to the weight's rows and columns.

    Args:
        product: True: c = a ⊙ b of two vectors, a ~ N(0, 1), b = 0. False: c = a alone, which starts at 0.
    """

    method: ClassVar[str] = "circulant"

    product: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._flags("product")


@dataclass(frozen=True, kw_only=True)
class ToeplitzConfig(DeltaConfig):
    """ΔW = s·T(b)·T(a), or s·T(a), T[i, j] depending on i - j alone; n = max(d_out, d_in), cut to the weight.

    Args:
        symmetric: True: T[i, j] = v[abs(i - j)], one vector v a matrix. False: a first column and a first row.
        product: True: two matrices, a ~ N(0, 0.02²), b = 0. False: T(a) alone, which starts at 0.
    """

    method: ClassVar[str] = "toeplitz"

    symmetric: bool = True
    product: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._flags("symmetric", "product")


@dataclass(frozen=True, kw_only=True)
class LDRConfig(DeltaConfig):
    """ΔW = s·Σ_i C(c_i)·S(s_i), circulant times skew-circulant: low displacement rank; cut to the weight.

    Args:
        terms: how many products are summed. c_i = 0, s_i ~ N(0, 0.02²) at the start.
    """

    method: ClassVar[str] = "ldr"

    terms: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("terms")

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> Sequence[Mapping[str, Any]]:
        return [{"terms": terms} for terms in range(1, max(max(shape) for shape in shapes) + 1)]


@dataclass(frozen=True, kw_only=True)
class KroneckerConfig(DeltaConfig):
    """ΔW = s·(B ⊗ A): a small matrix A in every place of another, weighted by its entries.

    Args:
        rank: r of the authors' shape, A (r, d_in/r) and B (d_out/r, r); it must divide both extents of the weight as a
            matrix (d_out, d_in/groups·k…). 16 if neither it nor ``block`` is given.
        block: the shape (rows, columns) of A instead; B is (d_out/rows, d_in/columns).

    A ~ kaiming_uniform(√5), B = 0. ``alpha`` needs a rank.
    """

    method: ClassVar[str] = "kronecker"
    ordered: ClassVar[bool] = False

    rank: int | None = None
    block: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.block is not None:
            self._fail("block", f"cannot be given together with rank={self.rank!r}")
        if self.rank is not None:
            self._set("rank", self._rank("rank", self.rank))
        elif self.block is not None:
            self._check_block()

    @property
    def resolved_rank(self) -> int | None:
        """``rank``, or 16 if neither it nor ``block`` is given; None with a block."""
        return 16 if self.rank is None and self.block is None else self.rank

    @property
    def resolved_scale(self) -> float:
        if self.alpha is not None:
            assert self.resolved_rank is not None
            return self.alpha / self.resolved_rank
        return super().resolved_scale

    def _check_block(self) -> None:
        block = self.block
        if not isinstance(block, Sequence) or len(block) != 2 or not all(is_int(n) and n > 0 for n in block):
            self._fail("block", "must be two positive ints, the rows and columns of A")
        self._set("block", tuple(int(n) for n in block))
        for name in ("alpha", "rank_pattern"):
            if getattr(self, name) is not None:
                self._fail(name, f"needs a rank, and there is block={self.block!r}")

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> Sequence[Mapping[str, Any]]:
        """Blocks that fit all shapes; the authors' shape has one parameter a row and column, whatever its rank."""
        rows = math.gcd(*(shape[0] for shape in shapes))
        columns = math.gcd(*(math.prod(shape[1:]) for shape in shapes))
        if self.alpha is not None or self.rank_pattern is not None:
            name = "alpha" if self.alpha is not None else "rank_pattern"
            self._fail(name, "needs a rank, and blocks are chosen here; give a scale")
        found = [
            {"rank": None, "block": (p, q)}
            for p in divisors(rows)
            for q in divisors(columns)
            if 1 < p * q < min(math.prod(shape) for shape in shapes)  # else A or B is a single number
        ]
        return found or [{"rank": None, "block": (1, 1)}]

    def block_shape(self, shape: Sequence[int], name: str = "") -> tuple[int, int]:
        """The shape of A for a weight of the matrix shape (d_out, d_in).

        Raises:
            ValueError: A does not fit; the message names the divisors that would.
        """
        d_out, d_in = shape
        where = f"{name}: " if name else ""
        rank = self.resolved_rank
        if rank is not None:
            common = [n for n in divisors(d_out) if d_in % n == 0]
            if rank not in common:
                raise ValueError(
                    f"{where}rank={rank} does not divide both extents of the {d_out}×{d_in} matrix; "
                    f"{', '.join(map(str, common))} would"
                )
            return rank, d_in // rank
        assert self.block is not None
        for extent, block, what in zip(shape, self.block, ("rows", "columns"), strict=True):
            if extent % block:
                raise ValueError(
                    f"{where}block={self.block}: {block} does not divide the {extent} {what} of the {d_out}×{d_in} "
                    f"matrix; {', '.join(map(str, divisors(extent)))} would"
                )
        return self.block[0], self.block[1]


def divisors(n: int) -> list[int]:
    """All of them, in order."""
    low = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]
