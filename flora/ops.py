"""The stock operations that deltas are put on: PyTorch's own product or convolution, and its gradients.

Nothing here builds a graph of its own, and nothing knows a parametrisation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flora import _core, reference

info = _core.info
"""What the extension runs on: kernel level, thread pool, thread count, whether the exchange API is in use."""

OWN_PRODUCTS = (
    info()["outruns_mkl"]
    and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    and os.environ.get("FLORA_PRODUCTS") != "torch"
)
"""Whether large products of gradients are flora's: where PyTorch multiplies by MKL, on a CPU on which MKL is slower."""

OWN_CONVOLUTIONS = info()["isa"].startswith("v") and os.environ.get("FLORA_PRODUCTS") != "torch"
"""Whether input gradients of 3 × 3 convolutions are flora's, by minimal filtering: from AVX2 on."""

takes = _core.takes
"""Whether the kernels can work on (x, weight, bias, parameters): plain CPU tensors of dtypes that go together."""

_FLOAT = (torch.float32, torch.float64)


def _in_c(a: Tensor, b: Tensor) -> bool:
    """Whether a gradient of these two may be C's: a dispatch mode would not see it."""
    return torch._C._len_torch_dispatch_stack() == 0 and takes(a, b, None, ())


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) @ b (k, n) without a graph: by flora's own kernel where that is known to be the faster one.

    Only gradients are computed so: an adapted layer's output has to start as the frozen one's, bit for bit.
    """
    if (
        not OWN_PRODUCTS
        or a.dtype not in _FLOAT
        or a.shape[0] < 8
        or a.numel() * b.shape[1] < 1e6
        or torch.get_float32_matmul_precision() != "highest"
        or not _in_c(a, b)
    ):
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    _core.multiply(out, a, b)
    return out


class LinearOp:
    """`torch.nn.functional.linear`: x (..., d_in), weight (d_out, d_in), y (..., d_out)."""

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def base_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (x, weight, bias), each None unless ``needs`` it."""
        if not any(needs):
            return None, None, None
        rows = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])  # a matmul of a batch may copy the weight for each
        dx = multiply(rows, weight).view(*dy.shape[:-1], weight.shape[1]) if needs[0] else None
        dw = multiply(rows.mT, x.reshape(-1, x.shape[-1])) if needs[1] else None
        return dx, dw, rows.sum(0) if needs[2] else None

    def writable(self, y: Tensor) -> Tensor:
        """y in a layout that the kernels write: contiguous rows."""
        return y.contiguous()

    def empty_output(self, x: Tensor, d_out: int, kernel: Sequence[int] = ()) -> Tensor:
        """Zeros of the output's shape, in x's dtype."""
        return x.new_zeros(*x.shape[:-1], d_out)

    def pixels(self, x: Tensor, weight: Tensor) -> tuple[int, int, int]:
        """Groups, and how many rows there are before and after the layer."""
        rows = x.numel() // (x.shape[-1] or 1)
        return 1, rows, rows


class AddmmOp(LinearOp):
    """The linear layer of transformers' Conv1D, whose weight is (d_in, d_out); here it is handed over transposed."""

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ weight.mT if bias is None else torch.addmm(bias, rows, weight.mT)
        return y.view(*x.shape[:-1], weight.shape[0])


class ConvOp(NamedTuple):
    """`torch.nn.functional.conv1d` to ``conv3d`` after padding: x (batch, d_in, *in), weight (d_out, d_in/groups, *k).

    ``padding`` holds (before, after) of each spatial mode, first mode first.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str = "zeros"

    def _pad(self, x: Tensor, extra: tuple[int, ...] | None) -> Tensor:
        return x if extra is None else reference.pad_input(x, extra, self.padding_mode)

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding, extra = _split_padding(self.padding, self.padding_mode)
        x = self._pad(x, extra)
        return _CONV[weight.ndim - 3](x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def base_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (x, weight, bias), each None unless ``needs`` it; that of the weight may be in float32."""
        if not any(needs):
            return None, None, None
        in_c = needs[1] and self.groups > 1 and weight.shape[1] <= FEW_CHANNELS and _in_c(dy, x)
        dw = None
        if in_c:
            dw = x.new_empty(weight.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
            _core.conv_weight_gradient(dw, dy, x, *self)
            needs = (needs[0], False, needs[2])
            if not any(needs):
                return None, dw, None
        padding, extra = _split_padding(self.padding, self.padding_mode)
        padded = self._pad(x, extra)
        dx = self._filtered(dy, padded, weight, padding) if needs[0] else None
        rest = (needs[0] and dx is None, *needs[1:])
        dw_torch = db = None
        if any(rest):
            zero = (0,) * len(padding)
            geometry = (self.stride, padding, self.dilation, False, zero, self.groups)
            dx_torch, dw_torch, db = _convolution_backward(dy, padded, weight, weight.shape[:1], *geometry, rest)
            dx = dx_torch if rest[0] else dx
        if needs[0] and extra is not None:
            with torch.enable_grad():  # the graph of the padding alone
                source = x.detach().requires_grad_()
                padded = self._pad(source, extra)
            (dx,) = torch.autograd.grad(padded, source, dx)
        return dx, dw if in_c else dw_torch if needs[1] else None, db

    def _filtered(self, dy: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor | None:
        """The input gradient by minimal filtering, in PyTorch's memory format; None where PyTorch is to compute it."""
        batch, channels, *extents = x.shape
        if (
            not OWN_CONVOLUTIONS
            or weight.shape[2:] != (3, 3)
            or (*self.stride, *self.dilation, self.groups) != (1, 1, 1, 1, 1)
            or min(channels, weight.shape[0]) < LEAST_CHANNELS
            or batch * prod(extents) < LEAST_PIXELS
            or dy.dtype not in _FLOAT
            or torch.backends.mkldnn.conv.fp32_precision not in ("none", "ieee")  # type: ignore[attr-defined]
            or not _in_c(dy, weight)
        ):
            return None
        last = is_channels_last(x) or is_channels_last(weight)
        dx = torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)
        height, width = padding
        _core.conv_input_gradient(dx, dy, weight, (height, height, width, width))
        return dx

    def writable(self, y: Tensor) -> Tensor:
        """y in a layout that the kernels write: unit stride along the channels or the last spatial mode."""
        unit = y.stride(1) == 1 or y.stride(-1) == 1 or y.numel() == 0 or y.shape[1] == 1 or y.shape[-1] == 1
        return y if unit else y.contiguous()

    def empty_output(self, x: Tensor, d_out: int, kernel: Sequence[int]) -> Tensor:
        """Zeros of the output's shape, contiguous, in x's dtype."""
        out = []
        for i, extent in enumerate(x.shape[2:]):
            reach = self.dilation[i] * (kernel[i] - 1) + 1
            out.append((extent + self.padding[2 * i] + self.padding[2 * i + 1] - reach) // self.stride[i] + 1)
        return x.new_zeros(x.shape[0], d_out, *out)

    def pixels(self, x: Tensor, weight: Tensor) -> tuple[int, int, int]:
        """Groups, and how many pixels there are before and after the layer, over the whole batch."""
        return _pixels(self, x.shape, weight.shape)


_CONV = (F.conv1d, F.conv2d, F.conv3d)
_convolution_backward = torch.ops.aten.convolution_backward.default


def _split_padding(padding: tuple[int, ...], mode: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The symmetric padding that the convolution itself does, and what has to be padded before it, if anything."""
    before, after = padding[::2], padding[1::2]
    if mode != "zeros":
        return (0,) * len(before), padding
    if before == after:
        return before, None
    # As PyTorch does for an even kernel under padding="same": the longer side is padded, the rest is the layer's.
    common = tuple(min(pair) for pair in zip(before, after, strict=True))
    extra = [p - c for *pair, c in zip(before, after, common, strict=True) for p in pair]
    return common, tuple(extra)


@lru_cache(maxsize=4096)
def _pixels(op: ConvOp, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, int, int]:
    inside = outside = x[0]
    for i, extent in enumerate(x[2:]):
        reach = op.dilation[i] * (weight[2 + i] - 1) + 1
        inside *= extent
        outside *= max(0, extent + op.padding[2 * i] + op.padding[2 * i + 1] - reach) // op.stride[i] + 1
    return op.groups, inside, outside


class NormOp(NamedTuple):
    """`torch.nn.functional.layer_norm`, ``rms_norm`` (which has no bias) or ``group_norm``, of weight and bias (d,)."""

    function: Callable[..., Tensor]
    extents: int | Sequence[int]
    """The normalised shape, or the number of groups."""
    eps: float | None

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        affine = (weight,) if self.function is F.rms_norm else (weight, bias)
        return self.function(x, self.extents, *affine, self.eps)


LINEAR = LinearOp()
ADDMM = AddmmOp()
Op = LinearOp | ConvOp


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """(before, after) of each spatial mode for PyTorch's padding="same": the longer half comes after."""
    pairs = []
    for k, d in zip(kernel, dilation, strict=True):
        total = d * (k - 1)
        pairs += [total // 2, total - total // 2]
    return tuple(pairs)


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch takes a tensor (n, c, h, w), which may have gaps, for one in channels_last."""
    least, channel = 0, x.stride(1)
    for mode in (1, 3, 2, 0):
        extent, step = x.shape[mode], x.stride(mode)
        if extent == 0 or step < least or (mode == 0 and least == channel):
            return False
        least = step * extent
    return channel != 0


LEAST_CHANNELS, LEAST_PIXELS = 16, 64
"""Minimal filtering is the faster way from so many channels on either side and so many pixels of the batch's input on:
with fewer pixels it mostly transforms the weight."""

FEW_CHANNELS = 8
"""Up to so many input channels a group, a convolution's weight gradient is formed in C: PyTorch's takes many times the
forward's time for them, and for more it is a matrix product, which PyTorch does well."""


# Dropout -----------------------------------------------------------------------------------------------------------


def dropout_factor(x: Tensor, dropout: float, seed: int) -> Tensor:
    """What dropout multiplies x by, 0 or 1 / (1 - dropout), in x's shape and dtype; a function of seed and layout."""
    factor = torch.full_like(x, 1 / (1 - dropout), requires_grad=False)
    if not x.is_cpu:
        if x.is_meta:
            return factor
        drawn = torch.empty_like(factor, dtype=torch.float32)
        drawn.bernoulli_(1 - dropout, generator=torch.Generator(x.device).manual_seed(seed))
        return factor.mul_(drawn)
    _core.drop(factor.as_strided((factor.numel(),), (1,)), dropout, seed)  # dense, in whichever order x has
    return factor


def rows(t: Tensor) -> Tensor:
    """t (..., d) as the kernels count its rows: itself where its strides allow, else a contiguous copy (n, d)."""
    return t if t.ndim == 2 or (t.ndim < 6 and t.is_contiguous()) else t.reshape(-1, t.shape[-1])
