"""Twins of the Kronecker kernels, and their differentiable halves.

ΔW = s·B ⊗ A with A (p, q) and B (m, n): entry (o·p + t, i·q + j) is s·B[o, i]·A[t, j]. A row of x is (n, q), a row of y
(m, p). Source: SURM, arXiv 2406.17740.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kronecker_project(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """H = X·Aᵀ, x (..., n·q) to (..., n, p), in A's dtype."""
    return x.to(a.dtype).reshape(*x.shape[:-1], b.shape[1], a.shape[1]) @ a.mT


def kronecker_update(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """s·(B ⊗ A)·x without the product: x (..., n·q) to (..., m·p), in A's dtype."""
    return scale * (b @ kronecker_project(x, a, b)).flatten(-2)


def kronecker_delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """s·B ⊗ A (m·p, n·q): the delta weight."""
    return scale * torch.kron(b, a)


def kronecker_forward(y: Tensor, h: Tensor | None, x: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """y += s·(B ⊗ A)·x in place; h (..., n·p) = X·Aᵀ if given. All axes of x, y and h but the last count rows."""
    with torch.no_grad():
        if h is not None:
            h.copy_(kronecker_project(x, a, b).flatten(-2))
        y.copy_(y.to(a.dtype) + kronecker_update(x, a, b, scale))


def kronecker_backward(
    dx: Tensor | None,
    d_a: Tensor | None,
    d_b: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> None:
    """dx += dH·A, and the gradients of A and B, written to their outputs; None skips one."""
    with torch.no_grad():
        dyc = dy[None].flatten(0, -2).to(a.dtype)
        dyc = dyc.reshape(len(dyc), b.shape[0], a.shape[0])
        dh = scale * (b.mT @ dyc)
        if d_b is not None and h is None:
            assert x is not None
            h = kronecker_project(x[None].flatten(0, -2), a, b)
        if d_b is not None:
            assert h is not None
            d_b.copy_(scale * torch.einsum("rmp,rnp->mn", dyc, h.reshape(len(dyc), b.shape[1], a.shape[0])))
        if d_a is not None:
            assert x is not None
            d_a.copy_(torch.einsum("rnp,rnq->pq", dh, x.to(a.dtype).reshape(len(dyc), b.shape[1], a.shape[1])))
        if dx is not None:
            dx.copy_(dx.to(a.dtype) + (dh @ a).view(dx.shape))


def kronecker_reconstruct(out: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, scale: float) -> None:
    """out = weight + s·B ⊗ A; the sum is rounded to out's dtype once."""
    with torch.no_grad():
        delta = kronecker_delta(a, b, scale)
        out.copy_(delta if weight is None else weight.to(delta.dtype) + delta)


def kronecker_reconstruct_backward(
    d_a: Tensor | None, d_b: Tensor | None, d_weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> None:
    """The adjoint of `kronecker_reconstruct`: d_weight (m·p, n·q) projected on A and B; None skips one."""
    with torch.no_grad():
        dw = scale * d_weight.to(a.dtype).reshape(b.shape[0], a.shape[0], b.shape[1], a.shape[1])
        if d_a is not None:
            d_a.copy_(torch.einsum("mpnq,mn->pq", dw, b))
        if d_b is not None:
            d_b.copy_(torch.einsum("mpnq,pq->mn", dw, a))
