"""Decompositions of a known tensor: HOOI of Tucker's, and the nearest Kronecker product, circulant and Toeplitz
matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora.deltas.tucker import leading_vectors
from flora.study.structure import unfolding

_MOST_SWEEPS = 100
_SETTLED = 1e-7  # the share of ‖X‖² by which a sweep that is the last one changes what the core holds


def multiply(tensor: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """tensor ×_0 M_0 ×_1 M_1 …, M_m (new extent, extent); None is the identity."""
    for mode, matrix in enumerate(matrices):
        if matrix is not None:
            tensor = torch.movedim(torch.tensordot(matrix, tensor, dims=([1], [mode])), 0, mode)
    return tensor


def along(vector: Tensor, mode: int, modes: int) -> Tensor:
    """A vector that multiplies or adds to a tensor of so many modes along one of them."""
    return vector.view([-1 if m == mode else 1 for m in range(modes)])


def hosvd(tensor: Tensor, ranks: Sequence[int | None]) -> list[Tensor | None]:
    """For each mode the leading left singular vectors (dim, rank) of the unfolding; None where the rank is.

    Source: De Lathauwer, De Moor and Vandewalle, "A multilinear singular value decomposition", 2000.
    """
    return [
        None if rank is None else leading_vectors(unfolding(tensor, mode), rank)[0] for mode, rank in enumerate(ranks)
    ]


def hooi(tensor: Tensor, ranks: Sequence[int | None]) -> tuple[Tensor, list[Tensor | None]]:
    """The core and orthonormal factors of a Tucker decomposition with these ranks, which least squares cannot improve
    in any one factor: higher-order orthogonal iteration from the `hosvd`. A rank that is None has the identity.

    Source: De Lathauwer, De Moor and Vandewalle, "On the best rank-1 and rank-(R1, …, RN) approximation", 2000.
    """
    factors = hosvd(tensor, ranks)
    whole, held = float(tensor.square().sum()), -1.0
    for _ in range(_MOST_SWEEPS):
        for mode, rank in enumerate(ranks):
            if rank is not None:
                others = [None if u is None or m == mode else u.mT for m, u in enumerate(factors)]
                factors[mode] = leading_vectors(unfolding(multiply(tensor, others), mode), rank)[0]
        core = multiply(tensor, [None if u is None else u.mT for u in factors])
        before, held = held, float(core.square().sum())
        if held - before <= _SETTLED * whole:
            break
    return core, factors


def held_by_ranks(tensor: Tensor) -> Tensor:
    """‖·‖² of the HOSVD truncated to every multilinear rank: entry [r_0 - 1, r_1 - 1, …], of the tensor's shape."""
    factors = hosvd(tensor, tensor.shape)
    held = multiply(tensor, [None if u is None else u.mT for u in factors]).square()
    for mode in range(tensor.ndim):
        held = held.cumsum(mode)
    return held


def nearest_kronecker(matrix: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A (rows, columns) and B with the least ‖matrix - B ⊗ A‖: the leading singular pair of the blocks as rows.

    Source: Van Loan and Pitsianis, "Approximation with Kronecker products", 1993.
    """
    blocks = in_blocks(matrix, rows, columns)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    b = (u[:, 0] * s[0]).view(matrix.shape[0] // rows, -1)
    return vh[0].view(rows, columns), b


def in_blocks(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The blocks (rows, columns) of a matrix as the rows of another, in which B ⊗ A is the outer product of B and A."""
    m, n = matrix.shape[0] // rows, matrix.shape[1] // columns
    return matrix.reshape(m, rows, n, columns).transpose(1, 2).reshape(m * n, rows * columns)


def nearest_circulant(matrix: Tensor) -> Tensor:
    """The first column (n,), n = max of the extents, of the nearest circulant matrix, cut to the extents."""
    rows, columns = matrix.shape
    n = max(rows, columns)
    return _means(matrix, (torch.arange(rows)[:, None] - torch.arange(columns)) % n, n)


def nearest_toeplitz(matrix: Tensor) -> Tensor:
    """The first column (n,), n = max of the extents, of the nearest symmetric Toeplitz matrix, cut to the extents."""
    rows, columns = matrix.shape
    return _means(matrix, (torch.arange(rows)[:, None] - torch.arange(columns)).abs(), max(rows, columns))


def displaced(matrix: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """First columns c_i and s_i, both (terms, n), of circulant C(c_i) and skew-circulant S(s_i) matrices whose products
    sum to a square matrix M, if that has no more than so many singular values in its displacement.

    With Z_f the cyclic shift whose corner is f, Z_1·M - M·Z_-1 is 2·Σ_i c_i·(the last row of S(s_i)), as the first
    factor commutes with Z_1 and the second with Z_-1; so its singular value decomposition gives both.
    """
    right = torch.cat([matrix[:, 1:], -matrix[:, :1]], 1)  # M·Z_-1
    u, s, vh = torch.linalg.svd(matrix.roll(1, 0) - right)
    root = s[:terms].sqrt()
    return (u[:, :terms] * root).mT / 2, (root[:, None] * vh[:terms]).flip(1)


def _means(matrix: Tensor, number: Tensor, n: int) -> Tensor:
    """Of the entries that have the same number, 0 to n - 1."""
    sums = matrix.new_zeros(n).index_add_(0, number.flatten(), matrix.flatten())
    return sums / number.flatten().bincount(minlength=n)
