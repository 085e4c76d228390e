"""Targets whose structure is known: 4-D weights that one parametrisation or another was made for, and some for none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.study.decompositions import along, multiply

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Synthetic:
    """A kind of target: what it is, and how one is drawn, float64 of norm 1."""

    name: str
    title: str
    draw: Draw

    def target(self, shape: Sequence[int], seed: int) -> Tensor:
        """The same for the same shape and seed."""
        drawn = self.draw(tuple(shape), torch.Generator().manual_seed(seed))
        return drawn.div_(drawn.norm())


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """N(0, 1) in every entry: no structure at all."""
    return torch.randn(tuple(shape), dtype=torch.float64, generator=generator)


def of_ranks(*ranks: int) -> Draw:
    """A core of N(0, 1) with these multilinear ranks, and orthonormal factors."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        factors = [_orthonormal(dim, rank, generator) for dim, rank in zip(shape, ranks, strict=True)]
        return multiply(normal(ranks, generator), factors)

    return draw


def noisy(draw: Draw, share: float) -> Draw:
    """Another target, and N(0, 1) with ``share`` of its norm on top."""

    def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        clean, noise = draw(shape, generator), normal(shape, generator)
        return clean.add_(noise, alpha=share * float(clean.norm() / noise.norm()))

    return drawn


def of_matrix_rank(rank: int) -> Draw:
    """A product of the matrices (d_out, rank) and (rank, d_in·taps), both N(0, 1)."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return (normal((shape[0], rank), generator) @ normal((rank, _size(shape[1:])), generator)).view(shape)

    return draw


def falling(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Full multilinear ranks, in orthonormal bases in which entries (i, j, …), from 1, are N(0, 1/(i·j·…)²)."""
    core = normal(shape, generator)
    for mode, extent in enumerate(shape):
        weights = 1 / torch.arange(1, extent + 1, dtype=torch.float64)
        core = core * along(weights, mode, len(shape))
    return multiply(core, [_orthonormal(dim, dim, generator) for dim in shape])


def kronecker(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """B ⊗ A of the matrix (d_out, d_in·taps), A with 8 rows and a fourth of the columns, both N(0, 1)."""
    columns = _size(shape[1:])
    b, a = normal((shape[0] // 8, 4), generator), normal((8, columns // 4), generator)
    product: Tensor = torch.kron(b, a)
    return product.view(shape)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(normal((rows, columns), generator)).Q
    return basis


def _size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


SYNTHETIC = (
    Synthetic("tucker", "multilinear rank (8, 8, 2, 2)", of_ranks(8, 8, 2, 2)),
    Synthetic("tucker-2", "multilinear rank (8, 8, 3, 3)", of_ranks(8, 8, 3, 3)),
    Synthetic("noisy", "multilinear rank (8, 8, 2, 2) with noise of half its norm", noisy(of_ranks(8, 8, 2, 2), 0.5)),
    Synthetic("matrix", "matrix rank 4", of_matrix_rank(4)),
    Synthetic("falling", "every rank full, entries falling as 1/i along each mode", falling),
    Synthetic("kronecker", "a Kronecker product", kronecker),
    Synthetic("normal", "independent entries", normal),
)
