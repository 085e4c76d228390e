"""Structural distortion: how far an approximation ΔŴ is from a target ΔW, as a whole and in each of its modes.

ΔW_(m) is the unfolding of ΔW along mode m, a matrix with the mode's extent for its rows. None of these figures changes
if the basis of any mode is rotated in both, or both are multiplied by a number:

- error: ‖ΔŴ - ΔW‖ / ‖ΔW‖, Frobenius norms;
- spectrum of mode m: ‖σ(ΔŴ_(m)) - σ(ΔW_(m))‖ / ‖ΔW‖, the singular values in falling order. It is never above the error
  (Mirsky's inequality);
- subspace of mode m: 1 - mean cos² of the principal angles between the leading directions of the mode, which are the
  fewest leading left singular vectors of ΔW_(m) that hold `SHARE` of ‖ΔW‖², and as many of ΔŴ_(m). Directions that ΔŴ
  lacks, as its rank is below their number, count as orthogonal;
- cosine: ⟨ΔŴ, ΔW⟩ / (‖ΔŴ‖·‖ΔW‖), of which √(1 - cosine²) is the error after the best scalar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.deltas.tucker import leading_vectors

SHARE = 0.5
"""Of ‖ΔW‖², the part that the leading directions of a mode hold. Were it more, they would be most of the directions of
many a target, and any matrix of full rank would have them."""

_ZERO = 1e-6  # of the largest singular value: below it a direction is none


@dataclass(frozen=True)
class Mode:
    """The singular values of one unfolding, falling, and its left singular vectors (dim, len(values))."""

    values: Tensor
    vectors: Tensor

    @property
    def leading(self) -> int:
        """How many leading directions hold `SHARE` of the whole."""
        held = self.values.square().cumsum(0)
        return int((held < SHARE * held[-1]).sum()) + 1


def modes(tensor: Tensor) -> list[Mode | None]:
    """Each mode of a tensor, in its order; None for one of extent 1, which has no structure."""
    if sum(extent > 1 for extent in tensor.shape) == 2:  # a matrix, both of whose sides come from one decomposition
        first, second = (m for m, extent in enumerate(tensor.shape) if extent > 1)
        u, s, vh = torch.linalg.svd(tensor.reshape(tensor.shape[first], -1), full_matrices=False)
        found: list[Mode | None] = [None] * tensor.ndim
        found[first], found[second] = Mode(s, u), Mode(s, vh.mT)
        return found
    return [None if extent == 1 else _mode(unfolding(tensor, m)) for m, extent in enumerate(tensor.shape)]


def _mode(matrix: Tensor) -> Mode:
    vectors, values = leading_vectors(matrix, min(matrix.shape))
    return Mode(values, vectors)


def unfolding(tensor: Tensor, mode: int) -> Tensor:
    """The matrix (extent of the mode, all others)."""
    return tensor.movedim(mode, 0).flatten(1)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one shape; 0 if one of them is 0."""
    norms = float(a.norm() * b.norm())
    return float((a * b).sum()) / norms if norms else 0.0


@dataclass(frozen=True)
class Distortion:
    """The figures of one approximation; None for modes of extent 1."""

    error: float
    spectra: tuple[float | None, ...]
    subspaces: tuple[float | None, ...]


class Reference:
    """A target, decomposed once. Raises ValueError for one that is 0 or not finite."""

    def __init__(self, target: Tensor) -> None:
        self.target = target.detach().to(torch.float64)
        self.norm = float(self.target.norm())
        if not 0 < self.norm < float("inf"):
            raise ValueError(f"a target of the norm {self.norm} has no structure")
        self.modes = modes(self.target)

    def distortion(self, approximation: Tensor, own: Sequence[Mode | None] | None = None) -> Distortion:
        """Of an approximation of the target's shape; ``own``: its `modes`, if they are known."""
        approximation = approximation.detach().to(torch.float64)
        own = modes(approximation) if own is None else own
        return Distortion(
            float((approximation - self.target).norm()) / self.norm,
            tuple(
                None if a is None or b is None else self._spectrum(a, b) for a, b in zip(own, self.modes, strict=True)
            ),
            tuple(None if a is None or b is None else _subspace(a, b) for a, b in zip(own, self.modes, strict=True)),
        )

    def scaled(self, approximation: Tensor) -> Distortion:
        """Of an approximation times the number that brings it closest to the target."""
        approximation = approximation.detach().to(torch.float64)
        square = float(approximation.square().sum())
        factor = float((approximation * self.target).sum()) / square if square else 0.0
        return self.distortion(factor * approximation)

    def _spectrum(self, own: Mode, mode: Mode) -> float:
        return float((own.values - mode.values).norm()) / self.norm


def _subspace(own: Mode, mode: Mode) -> float:
    count = mode.leading
    there = own.values[:count] > _ZERO * own.values[0]
    overlap = mode.vectors[:, :count].mT @ own.vectors[:, :count][:, there]
    return max(0.0, 1 - float(overlap.square().sum()) / count)
