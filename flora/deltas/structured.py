"""SURM's deltas: circulant, Toeplitz, low displacement rank and Kronecker matrices (arXiv 2406.17740).

All but the last are sums of products of Toeplitz matrices; what differs is how their parameters lie on the diagonals,
-(n - 1) to n - 1 from the upper right corner to the lower left, n = max(d_out, d_in).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flora.config import CirculantConfig, KroneckerConfig, LDRConfig, ToeplitzConfig
from flora.deltas.base import Site, WeightDelta, all_zero
from flora.forms import KroneckerForm, Parts, ToeplitzForm

TOEPLITZ_STD = 0.02  # of the authors' programs


class _OnDiagonals(WeightDelta):
    """A delta whose matrices are square of size n, cut to the weight's d_out rows and d_in columns."""

    def __init__(self, config: CirculantConfig | ToeplitzConfig | LDRConfig, site: Site) -> None:
        super().__init__(config, site)
        self.d_out, self.d_in = matrix_shape(site)
        self.n = max(self.d_out, self.d_in)

    def left(self, diagonals: Tensor) -> Tensor:
        """Of a matrix's diagonals (terms, 2n - 1) those of its first d_out rows."""
        return diagonals[..., : self.n + self.d_out - 1]

    def right(self, diagonals: Tensor) -> Tensor:
        """Of a matrix's diagonals (terms, 2n - 1) those of its first d_in columns."""
        return diagonals[..., self.n - self.d_in :]

    def form(self) -> ToeplitzForm:
        return ToeplitzForm(self.factor, tuple(self.shape))


class CirculantDelta(_OnDiagonals, config=CirculantConfig):
    """ΔW = s·C(a ⊙ b) of vectors a and b (n,), or s·C(a)."""

    def __init__(self, config: CirculantConfig, site: Site) -> None:
        super().__init__(config, site)
        self.a = site.parameter(self.n)
        if config.product:
            nn.init.normal_(self.a)
            self.b = site.parameter(self.n)

    def stuck(self) -> str | None:
        return "a and b are zero" if self.config.product and all_zero(self.a, self.b) else None

    def parts(self, weight: Tensor | None) -> Parts:
        c = self.a * self.b if self.config.product else self.a
        return Parts(self.form(), (self.right(self.left(periodic(c, 1)))[None], None))


class ToeplitzDelta(_OnDiagonals, config=ToeplitzConfig):
    """ΔW = s·T(b)·T(a), or s·T(a).

    Symmetric: vectors ``a`` and ``b`` (n,), T[i, j] = v[abs(i - j)]. Else the first columns ``a_col`` and ``b_col``
    (n,) and, without their corner, the first rows ``a_row`` and ``b_row`` (n - 1,).
    """

    def __init__(self, config: ToeplitzConfig, site: Site) -> None:
        super().__init__(config, site)
        for matrix in "ab" if config.product else "a":
            if config.symmetric:
                setattr(self, matrix, site.parameter(self.n))
            else:
                setattr(self, f"{matrix}_row", site.parameter(self.n - 1))
                setattr(self, f"{matrix}_col", site.parameter(self.n))
        if config.product:
            for name, parameter in self.named_parameters():
                if name.startswith("a"):
                    nn.init.normal_(parameter, std=TOEPLITZ_STD)

    def _diagonals(self, matrix: str) -> Tensor:
        if self.config.symmetric:
            return symmetric(getattr(self, matrix))
        return torch.cat([getattr(self, f"{matrix}_row").flip(0), getattr(self, f"{matrix}_col")])

    def stuck(self) -> str | None:
        return "both matrices are zero" if self.config.product and all_zero(*self.parameters()) else None

    def parts(self, weight: Tensor | None) -> Parts:
        a = self._diagonals("a")[None]
        if not self.config.product:
            return Parts(self.form(), (self.right(self.left(a)), None))
        return Parts(self.form(), (self.left(self._diagonals("b")[None]), self.right(a)))


class LDRDelta(_OnDiagonals, config=LDRConfig):
    """ΔW = s·Σ_i C(circulant_i)·S(skew_i), both (terms, n); S is skew-circulant."""

    def __init__(self, config: LDRConfig, site: Site) -> None:
        super().__init__(config, site)
        self.circulant = site.parameter(config.terms, self.n)
        self.skew = site.parameter(config.terms, self.n)
        nn.init.normal_(self.skew, std=TOEPLITZ_STD)

    def stuck(self) -> str | None:
        return "circulant and skew are zero" if all_zero(self.circulant, self.skew) else None

    @property
    def size(self) -> str:
        return terms_of(self.skew)

    def parts(self, weight: Tensor | None) -> Parts:
        left, right = periodic(self.circulant, 1), periodic(self.skew, -1)
        return Parts(self.form(), (self.left(left), self.right(right)))


class KroneckerDelta(WeightDelta, config=KroneckerConfig):
    """ΔW = s·(B ⊗ A): ``a`` (rows, columns) of a block, ``b`` (d_out/rows, d_in/columns)."""

    def __init__(self, config: KroneckerConfig, site: Site) -> None:
        super().__init__(config, site)
        d_out, d_in = matrix_shape(site)
        rows, columns = config.block_shape((d_out, d_in), site.name)
        self.a = site.parameter(rows, columns)
        self.b = site.parameter(d_out // rows, d_in // columns)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def stuck(self) -> str | None:
        return "a and b are zero" if all_zero(self.a, self.b) else None

    @property
    def size(self) -> str:
        return block_of(self.a)

    def parts(self, weight: Tensor | None) -> Parts:
        return Parts(KroneckerForm(self.factor, tuple(self.shape)), (self.a, self.b))


def matrix_shape(site: Site) -> tuple[int, int]:
    """The shape of a weight as a matrix, (d_out, d_in/groups·k…).

    Raises ValueError, naming the module, for a weight that is a vector.
    """
    if len(site.shape) < 2:
        raise ValueError(f"{site.label}: a structured matrix needs a weight of two modes or more, not {site.shape}")
    return site.shape[0], math.prod(site.shape[1:])


def terms_of(vectors: Tensor) -> str:
    return f"{len(vectors)} {'term' if len(vectors) == 1 else 'terms'}"


def block_of(a: Tensor) -> str:
    return f"A {a.shape[0]}×{a.shape[1]}"


def periodic(first_column: Tensor, sign: int) -> Tensor:
    """The diagonals (..., 2n - 1) of the circulant (sign 1) or skew-circulant (-1) matrix with a first column."""
    return torch.cat([sign * first_column[..., 1:], first_column], -1)


def symmetric(v: Tensor) -> Tensor:
    """The diagonals (2n - 1,) of the symmetric Toeplitz matrix with a first column."""
    return torch.cat([v[1:].flip(0), v])
