"""Twins of the Toeplitz functions: ΔW = s·Σ_q L_q·R_q, every matrix given by its diagonals.

L_q is (d_out, inner) and R_q (inner, d_in); without R, ΔW = s·Σ_q L_q. Circulant, skew-circulant and symmetric Toeplitz
matrices are cases. Source: SURM, arXiv 2406.17740.
"""

from __future__ import annotations

import torch
from torch import Tensor


def toeplitz(diagonals: Tensor, rows: int, columns: int) -> Tensor:
    """The matrices (..., rows, columns) T[i, j] = t[i - j + columns - 1] of t (..., rows + columns - 1)."""
    device = diagonals.device
    number = torch.arange(rows, device=device)[:, None] - torch.arange(columns, device=device) + columns - 1
    return diagonals[..., number]


def toeplitz_delta(left: Tensor, right: Tensor | None, d_out: int, d_in: int, scale: float) -> Tensor:
    """s·Σ_q L_q·R_q (d_out, d_in) from left (terms, d_out + inner - 1) and right (terms, inner + d_in - 1).

    ``right=None``: s·Σ_q L_q from left (terms, d_out + d_in - 1).
    """
    if right is None:
        return scale * toeplitz(left.sum(0), d_out, d_in)
    inner = left.shape[-1] - d_out + 1
    return scale * (toeplitz(left, d_out, inner) @ toeplitz(right, inner, d_in)).sum(0)


def toeplitz_multiply(diagonals: Tensor, x: Tensor, rows: int) -> Tensor:
    """T·x by convolution: x (..., columns) to (..., rows), for diagonals (..., rows + columns - 1)."""
    columns, n = x.shape[-1], diagonals.shape[-1]
    if x.numel() == 0:  # which the transforms refuse
        return x.sum(-1, keepdim=True).expand(*x.shape[:-1], rows) * diagonals.sum()
    spectrum = torch.fft.rfft(diagonals) * torch.fft.rfft(x, n)
    y: Tensor = torch.fft.irfft(spectrum, n)  # what wraps around falls on the first columns - 1 places
    return y[..., columns - 1 : columns - 1 + rows]


def toeplitz_update(x: Tensor, left: Tensor, right: Tensor | None, d_out: int, scale: float) -> Tensor:
    """x·ΔWᵀ by convolutions: x (..., d_in) to (..., d_out), in the diagonals' dtype."""
    h = x.to(left.dtype).unsqueeze(-2)
    if right is not None:
        h = toeplitz_multiply(right, h, left.shape[-1] - d_out + 1)
    return scale * toeplitz_multiply(left, h, d_out).sum(-2)


def toeplitz_reconstruct(out: Tensor, weight: Tensor | None, left: Tensor, right: Tensor | None, scale: float) -> None:
    """out = weight + ΔW; the sum is rounded to out's dtype once."""
    with torch.no_grad():
        delta = toeplitz_delta(left, right, out.shape[0], out.shape[1], scale)
        out.copy_(delta if weight is None else weight.to(delta.dtype) + delta)


def toeplitz_reconstruct_backward(
    d_left: Tensor | None, d_right: Tensor | None, d_weight: Tensor, left: Tensor, right: Tensor | None, scale: float
) -> None:
    """The adjoint of `toeplitz_reconstruct`; None skips a gradient. Autograd does the algebra."""
    with torch.enable_grad():
        sources = [t.detach().requires_grad_() for t in (left, right) if t is not None]
        d_out, d_in = d_weight.shape
        delta = toeplitz_delta(sources[0], sources[1] if right is not None else None, d_out, d_in, scale)
        grads = torch.autograd.grad(delta, sources, d_weight.to(left.dtype))
    for out, grad in zip((d_left, d_right), grads, strict=False):
        if out is not None:
            out.copy_(grad)


def toeplitz_forward(y: Tensor, x: Tensor, left: Tensor, right: Tensor | None, scale: float) -> None:
    """y += x·ΔWᵀ in place. All axes of x and y but the last count rows."""
    with torch.no_grad():
        delta = toeplitz_delta(left, right, y.shape[-1], x.shape[-1], scale)
        y.copy_(y.to(left.dtype) + x.to(left.dtype) @ delta.mT)


def toeplitz_backward(
    dx: Tensor | None,
    d_left: Tensor | None,
    d_right: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    left: Tensor,
    right: Tensor | None,
    scale: float,
) -> None:
    """dx += dy·ΔW, and the gradients of left and right, written to their outputs; None skips one."""
    dyc = dy.to(left.dtype)
    if d_left is not None or d_right is not None:
        assert x is not None
        d_weight = dyc[None].flatten(0, -2).mT @ x.to(left.dtype)[None].flatten(0, -2)
        toeplitz_reconstruct_backward(d_left, d_right, d_weight, left, right, scale)
    if dx is not None:
        with torch.no_grad():
            dx.copy_(dx.to(left.dtype) + dyc @ toeplitz_delta(left, right, dy.shape[-1], dx.shape[-1], scale))
