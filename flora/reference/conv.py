"""Twins around a stock convolution: padding in every mode, and the gradients of weight and input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def pad_input(x: Tensor, padding: Sequence[int], padding_mode: str) -> Tensor:
    """x (batch, channels, *in) padded by ``padding`` = (before, after) of each spatial mode, first mode first."""
    if not any(padding):
        return x
    pairs = [(padding[i], padding[i + 1]) for i in range(0, len(padding), 2)]
    flat = [p for pair in reversed(pairs) for p in pair]  # F.pad counts from the last mode
    return F.pad(x, flat, mode=PADDING_MODES[padding_mode])


def conv_weight_gradient(
    d_weight: Tensor,
    dy: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> None:
    """The weight gradient (d_out, d_in/groups, *k) of a convolution of x for dy, written to d_weight."""
    padded = pad_input(x.detach().to(d_weight.dtype), padding, padding_mode)
    with torch.enable_grad():
        weight = torch.zeros_like(d_weight).requires_grad_()
        y = CONV[weight.ndim - 2](padded, weight, None, tuple(stride), 0, tuple(dilation), groups)
        (grad,) = torch.autograd.grad(y, weight, dy.to(d_weight.dtype))
    d_weight.copy_(grad)


def conv_input_gradient(dx: Tensor, dy: Tensor, weight: Tensor, padding: Sequence[int]) -> None:
    """The input gradient of conv2d(x (batch, d_in, *in), weight (d_out, d_in, 3, 3)) of stride 1 for dy, written to dx.

    ``padding`` is as in `pad_input`, with zeros.
    """
    extents = [n + before + after for n, before, after in zip(dx.shape[2:], padding[::2], padding[1::2], strict=True)]
    padded = dy.new_zeros(*dx.shape[:2], *extents)
    for i in range(3):
        for j in range(3):
            seen = padded[:, :, i : i + dy.shape[2], j : j + dy.shape[3]]
            seen += torch.einsum("bohw,oc->bchw", dy, weight[:, :, i, j])
    top, left = padding[::2]
    dx.copy_(padded[:, :, top : top + dx.shape[2], left : left + dx.shape[3]])
