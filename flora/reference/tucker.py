"""Twins of the Tucker kernels, and their differentiable halves.

Notation as in docs/methods.md: core G (r_out, r_in, *k), factors U_out (d_out, r_out), U_in (d_in / groups, r_in), one
U_k (k, r_k) for each kernel mode, scale s. Source: FLoRA, arXiv 2405.14739.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.reference.conv import CONV, pad_input

# The differentiable halves -----------------------------------------------------------------------------------------


def linear_update(x: Tensor, u_in: Tensor, core: Tensor | None, u_out: Tensor, scale: float) -> Tensor:
    """s·(x·U_in·Gᵀ)·U_outᵀ: x (..., d_in) to (..., d_out), in the factors' dtype. ``core=None`` is the identity."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]) if x.ndim != 2 else x
    k = F.linear(rows.to(u_in.dtype), u_in.mT)
    if core is not None:
        k = F.linear(k, core)
    return (scale * F.linear(k, u_out)).view(*x.shape[:-1], u_out.shape[0])


def conv_project(x: Tensor, u_in: Tensor | None, groups: int) -> Tensor:
    """The 1×1 convolution of every group's channels by U_inᵀ: (batch, d_in, *in) to (batch, groups·r_in, *in)."""
    if u_in is None:
        return x
    return _pointwise(x.to(u_in.dtype), u_in.mT.repeat(groups, 1), groups)


def conv_update(
    x: Tensor,
    u_in: Tensor | None,
    core: Tensor,
    u_out: Tensor,
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    """Project, convolve with the (expanded) core, expand: the update of a convolution, in the factors' dtype."""
    h = pad_input(conv_project(x.to(core.dtype), u_in, groups), padding, padding_mode)
    return conv_expand(conv_core(h, core, stride, dilation, groups), u_out, scale, groups)


def conv_core(h: Tensor, core: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """The core's convolution of h (batch, groups·r_in, *padded), projected and padded: (batch, groups·r_out, *out)."""
    kernel = core.repeat(groups, *[1] * (core.ndim - 1))
    return CONV[core.ndim - 2](h, kernel, None, tuple(stride), 0, tuple(dilation), groups)


def conv_expand(k: Tensor, u_out: Tensor, scale: float, groups: int) -> Tensor:
    """The 1×1 convolution of every group by its rows of U_out: (batch, groups·r_out, *out) to (batch, d_out, *out)."""
    return scale * _pointwise(k, u_out, groups)


def _pointwise(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The 1×1 convolution of x (batch, channels, *in) by a matrix: it keeps x's layout, channels last or not."""
    modes = x.ndim - 2
    return CONV[modes](x, weight.view(*weight.shape, *[1] * modes), None, 1, 0, 1, groups)


def mode_product(tensor: Tensor, factor: Tensor, mode: int) -> Tensor:
    """tensor ×_mode factor, where factor is (dim, rank): replaces the extent ``rank`` of that mode by ``dim``."""
    return torch.movedim(torch.tensordot(tensor, factor, dims=([mode], [1])), -1, mode)


def reconstruct(core: Tensor, factors: Sequence[Tensor | None], scale: float) -> Tensor:
    """s·G ×_0 U_0 ×_1 U_1 …: the delta weight. A factor that is None is the identity."""
    out = core
    for mode in range(core.ndim - 1, -1, -1):
        factor = factors[mode]
        if factor is not None:
            out = mode_product(out, factor, mode)
    return scale * out


# The twins ---------------------------------------------------------------------------------------------------------


def tucker_linear_forward(
    y: Tensor, h: Tensor | None, x: Tensor, u_in: Tensor, core: Tensor | None, u_out: Tensor, scale: float
) -> None:
    """y += s·(x·U_in·Gᵀ)·U_outᵀ in place; h = x·U_in if given. All axes of x, y and h but the last count rows."""
    with torch.no_grad():
        if h is not None:
            h.copy_((x.to(u_in.dtype) @ u_in).view(h.shape))
        y.copy_(y.to(u_in.dtype) + linear_update(x, u_in, core, u_out, scale))


def tucker_linear_backward(
    dx: Tensor | None,
    d_u_in: Tensor | None,
    d_core: Tensor | None,
    d_u_out: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    u_in: Tensor,
    core: Tensor | None,
    u_out: Tensor,
    scale: float,
) -> None:
    """dx += dh·U_inᵀ, and the gradients of the factors and the core, written to their outputs; None skips one."""
    with torch.no_grad():
        dx, x, h = (None if t is None else t[None].flatten(0, -2) for t in (dx, x, h))
        dyc = dy[None].flatten(0, -2).to(u_in.dtype)
        dk = scale * (dyc @ u_out)
        dh = dk if core is None else dk @ core
        if (d_core is not None or d_u_out is not None) and h is None:
            assert x is not None
            h = x.to(u_in.dtype) @ u_in
        if d_u_out is not None:
            assert h is not None
            d_u_out.copy_(scale * (dyc.mT @ (h if core is None else h @ core.mT)))
        if d_core is not None:
            assert h is not None
            d_core.copy_(dk.mT @ h)
        if d_u_in is not None:
            assert x is not None
            d_u_in.copy_(x.to(u_in.dtype).mT @ dh)
        if dx is not None:
            dx.copy_(dx.to(u_in.dtype) + dh @ u_in.mT)


def tucker_conv_forward(
    y: Tensor,
    h: Tensor | None,
    x: Tensor,
    core: Tensor,
    factors: Sequence[Tensor | None],
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> None:
    """y += the convolution's update, in place.

    h (batch, *padded, groups·r_in) = the projected, padded input; without U_in the core's output (batch, *out,
    groups·r_out).
    """
    u_out, u_in, *u_k = factors
    assert u_out is not None
    with torch.no_grad():
        projected = pad_input(conv_project(x.to(core.dtype), u_in, groups), padding, padding_mode)
        expanded = reconstruct(core, [None, None, *u_k], 1.0)
        k = conv_core(projected, expanded, stride, dilation, groups)
        if h is not None:
            h.copy_((k if u_in is None else projected).movedim(1, -1))
        y.copy_(y.to(core.dtype) + conv_expand(k, u_out, scale, groups))


def tucker_conv_backward(
    dx: Tensor | None,
    d_core: Tensor | None,
    d_factors: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    core: Tensor,
    factors: Sequence[Tensor | None],
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> None:
    """dx += …, and the gradients of the core and of every factor; None skips one. Autograd does the algebra."""
    with torch.enable_grad():
        c = core.detach().requires_grad_()
        parts = [None if f is None else f.detach().requires_grad_() for f in factors]
        u_out, u_in, *u_k = parts
        assert u_out is not None
        if x is not None:
            xc = x.detach().to(core.dtype).requires_grad_()
        elif u_in is None:  # nothing that is asked for depends on the values of x
            assert dx is not None
            xc = dx.new_zeros(dx.shape, dtype=core.dtype).requires_grad_()
        else:
            assert d_factors[1] is None
            assert h is not None
            extent = [h.shape[1 + i] - padding[2 * i] - padding[2 * i + 1] for i in range(h.ndim - 2)]
            xc = h.new_zeros(h.shape[0], groups * u_in.shape[0], *extent).requires_grad_()
        projected = pad_input(conv_project(xc, u_in, groups), padding, padding_mode)
        if h is not None and u_in is not None:
            projected = _Valued.apply(projected, h)  # type: ignore[no-untyped-call]
        k = conv_core(projected, reconstruct(c, [None, None, *u_k], 1.0), stride, dilation, groups)
        if h is not None and u_in is None:
            k = _Valued.apply(k, h)  # type: ignore[no-untyped-call]
        update = conv_expand(k, u_out, scale, groups)
        outputs = [(dx, xc), (d_core, c), *zip(d_factors, parts, strict=True)]
        sources = [source for _, source in outputs if source is not None]
        grads = iter(torch.autograd.grad(update, sources, dy.to(core.dtype)))
    with torch.no_grad():
        for out, source in outputs:
            grad = None if source is None else next(grads)
            if out is not None and grad is not None:
                out.copy_(out.to(core.dtype) + grad if out is dx else grad)


class _Valued(torch.autograd.Function):
    """The values of the caller's h (…, channels) with the graph of the image that they were computed as."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, h: Tensor) -> Tensor:
        return h.movedim(-1, 1).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def tucker_reconstruct(
    out: Tensor, weight: Tensor | None, core: Tensor, factors: Sequence[Tensor | None], scale: float
) -> None:
    """out = weight + s·G ×_0 U_0 ×_1 U_1 …; the sum is rounded to out's dtype once."""
    with torch.no_grad():
        delta = reconstruct(core, factors, scale)
        out.copy_(delta if weight is None else weight.to(delta.dtype) + delta)


def tucker_reconstruct_backward(
    d_core: Tensor | None,
    d_factors: Sequence[Tensor | None],
    d_weight: Tensor,
    core: Tensor,
    factors: Sequence[Tensor | None],
    scale: float,
) -> None:
    """The adjoint of `tucker_reconstruct`: d_weight projected on the core and on every factor; None skips one."""
    with torch.enable_grad():
        sources = [core.detach().requires_grad_()]
        sources += [f.detach().requires_grad_() for f in factors if f is not None]
        rest = iter(sources[1:])
        delta = reconstruct(sources[0], [None if f is None else next(rest) for f in factors], scale)
        grads = torch.autograd.grad(delta, sources, d_weight.to(core.dtype))
    if d_core is not None:
        d_core.copy_(grads[0])
    of_factor = iter(grads[1:])
    for out, factor in zip(d_factors, factors, strict=True):
        grad = None if factor is None else next(of_factor)
        if out is not None:
            assert grad is not None
            out.copy_(grad)
