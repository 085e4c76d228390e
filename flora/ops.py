"""The stock operations, and the C kernels that put a Tucker delta on them: the one file that calls `flora._core`.

A stock operation knows PyTorch's own product (`base`, `base_backward`), the update through the factors, in place, in C
(`update_`, `update_backward`), and the same in plain PyTorch operations (`twin`). Nothing here builds a graph.

h is the projected input that backward needs: x·U_in (rows, r_in), for a convolution padded and channels last.
Source of the algebra: FLoRA, arXiv 2405.14739, and docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flora import _core, reference
from flora.plan import PLANS, choose_plan

info = _core.info
"""What the extension runs on: kernel level, thread pool, thread count, whether the exchange API is in use."""

takes = _core.takes
"""Whether the kernels can work on (x, weight, bias, core, factors): plain CPU tensors of dtypes that go together."""


PlanCall = tuple[tuple[int, ...], tuple[int, ...], int, int, int, int, bool]


class Tucker(NamedTuple):
    """A Tucker delta's tensors: core (r_out, r_in, *r_k), factors in weight order (dim_m, r_m), and the scale."""

    core: Tensor
    factors: tuple[Tensor, ...]
    scale: float


class LinearOp:
    """`torch.nn.functional.linear`: x (..., d_in), weight (d_out, d_in), y (..., d_out)."""

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def base_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (x, weight, bias), each None unless ``needs`` it."""
        # A matmul of a strided batch may copy the weight for every image in it.
        dx = (dy if dy.ndim == 2 else dy.contiguous()) @ weight if needs[0] else None
        if not (needs[1] or needs[2]):
            return dx, None, None
        rows = dy.reshape(-1, dy.shape[-1])
        dw = rows.mT @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        return dx, dw, rows.sum(0) if needs[2] else None

    def writable(self, y: Tensor) -> Tensor:
        """y in a layout that the kernels write: contiguous rows."""
        return y.contiguous()

    def update_(self, y: Tensor, x: Tensor, tucker: Tucker, want_h: bool) -> tuple[Tensor, Tensor | None]:
        """y += s·ΔW·x in C; returns y (a copy if it was not writable) and h for backward."""
        core, (u_out, u_in), scale = tucker
        y, x = self.writable(y), _rows(x)
        h = u_in.new_empty(*x.shape[:-1], u_in.shape[1]) if want_h else None
        _core.tucker_linear_forward(_rows(y), h, x, u_in, core, u_out, scale)
        return y, h

    def update_backward(
        self,
        dx: Tensor | None,
        dy: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        tucker: Tucker,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """dx += … in C (in place), and the gradients of (core, u_out, u_in), each None unless ``needs`` it."""
        core, (u_out, u_in), scale = tucker
        d_core = torch.empty_like(core) if needs[0] else None
        d_u_out = torch.empty_like(u_out) if needs[1] else None
        d_u_in = torch.empty_like(u_in) if needs[2] else None
        dx_rows, x = None if dx is None else _rows(dx), None if x is None else _rows(x)
        _core.tucker_linear_backward(dx_rows, d_u_in, d_core, d_u_out, _rows(dy), x, h, u_in, core, u_out, scale)
        return d_core, d_u_out, d_u_in

    def twin(self, x: Tensor, tucker: Tucker) -> Tensor:
        """s·ΔW·x in plain PyTorch, differentiable, in the factors' dtype."""
        u_out, u_in = tucker.factors
        return reference.linear_update(x, u_in, tucker.core, u_out, tucker.scale)

    def empty_output(self, x: Tensor, d_out: int) -> Tensor:
        """Zeros of the output's shape, in x's dtype: where an update alone is accumulated."""
        return x.new_zeros(*x.shape[:-1], d_out)

    def plan_call(self, x: Tensor, weight: Tensor, core: Tensor, grad: bool) -> PlanCall:
        """The arguments of `flora.plan.plan_costs` for this call."""
        rows = x.numel() // (x.shape[-1] or 1)
        return weight.shape, core.shape, 1, rows, rows, x.element_size(), grad

    def plan(self, x: Tensor, weight: Tensor, core: Tensor, grad: bool, possible: tuple[str, ...] = PLANS) -> str:
        return choose_plan(*self.plan_call(x, weight, core, grad), possible)


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
        in_c = needs[1] and self.groups > 1 and weight.shape[1] <= FEW_CHANNELS
        dw = None
        if in_c:
            dw = x.new_empty(weight.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
            _core.conv_weight_gradient(dw, dy, x, *self)
            needs = (needs[0], False, needs[2])
            if not any(needs):
                return None, dw, None
        padding, extra = _split_padding(self.padding, self.padding_mode)
        zero = (0,) * len(padding)
        dx, dw_torch, db = _convolution_backward(
            dy,
            self._pad(x, extra),
            weight,
            weight.shape[:1],
            self.stride,
            padding,
            self.dilation,
            False,
            zero,
            self.groups,
            needs,
        )
        if needs[0] and extra is not None:
            with torch.enable_grad():  # the graph of the padding alone
                source = x.detach().requires_grad_()
                padded = self._pad(source, extra)
            (dx,) = torch.autograd.grad(padded, source, dx)
        return dx, dw if in_c else dw_torch, db

    def writable(self, y: Tensor) -> Tensor:
        """y in a layout that the kernels write: unit stride along the channels or the last spatial mode."""
        unit = y.stride(1) == 1 or y.stride(-1) == 1 or y.numel() == 0 or y.shape[1] == 1 or y.shape[-1] == 1
        return y if unit else y.contiguous()

    def update_(self, y: Tensor, x: Tensor, tucker: Tucker, want_h: bool) -> tuple[Tensor, Tensor | None]:
        """y += s·ΔW * x in C; returns y and, for backward, h: the projected and padded input, channels last."""
        y = self.writable(y)
        core, factors, scale = tucker
        h = None
        if want_h:
            pads = zip(x.shape[2:], self.padding[::2], self.padding[1::2], strict=True)
            h = core.new_empty(x.shape[0], *(sum(p) for p in pads), self.groups * core.shape[1])
        _core.tucker_conv_forward(y, h, x, core, factors, scale, *self)
        return y, h

    def update_backward(
        self,
        dx: Tensor | None,
        dy: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        tucker: Tucker,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """dx += … in C (in place), and the gradients of (core, u_out, u_in, *u_k), each None unless ``needs`` it."""
        core, factors, scale = tucker
        d_core = torch.empty_like(core) if needs[0] else None
        d_factors = [torch.empty_like(u) if need else None for u, need in zip(factors, needs[1:], strict=True)]
        _core.tucker_conv_backward(dx, d_core, d_factors, dy, x, h, core, factors, scale, *self)
        return d_core, *d_factors

    def twin(self, x: Tensor, tucker: Tucker) -> Tensor:
        """s·ΔW * x in plain PyTorch, differentiable, in the factors' dtype."""
        u_out, u_in, *u_k = tucker.factors
        expanded = reference.reconstruct(tucker.core, (None, None, *u_k), 1.0)
        return reference.conv_update(x, u_in, expanded, u_out, tucker.scale, *self)

    def empty_output(self, x: Tensor, d_out: int, kernel: Sequence[int]) -> Tensor:
        """Zeros of the output's shape, contiguous, in x's dtype."""
        out = []
        for i, extent in enumerate(x.shape[2:]):
            reach = self.dilation[i] * (kernel[i] - 1) + 1
            out.append((extent + self.padding[2 * i] + self.padding[2 * i + 1] - reach) // self.stride[i] + 1)
        return x.new_zeros(x.shape[0], d_out, *out)

    def plan_call(self, x: Tensor, weight: Tensor, core: Tensor, grad: bool) -> PlanCall:
        """The arguments of `flora.plan.plan_costs` for this call."""
        return _conv_call(self, x.shape, weight.shape, core.shape, x.element_size(), grad)

    def plan(self, x: Tensor, weight: Tensor, core: Tensor, grad: bool, possible: tuple[str, ...] = PLANS) -> str:
        return choose_plan(*self.plan_call(x, weight, core, grad), possible)


_CONV = (F.conv1d, F.conv2d, F.conv3d)
_convolution_backward = torch.ops.aten.convolution_backward.default


@lru_cache(maxsize=1024)
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
def _conv_call(
    op: ConvOp, x: tuple[int, ...], weight: tuple[int, ...], core: tuple[int, ...], itemsize: int, grad: bool
) -> PlanCall:
    inside = outside = x[0]
    for i, extent in enumerate(x[2:]):
        reach = op.dilation[i] * (weight[2 + i] - 1) + 1
        inside *= extent
        outside *= max(0, extent + op.padding[2 * i] + op.padding[2 * i + 1] - reach) // op.stride[i] + 1
    return weight, core, op.groups, inside, outside, itemsize, grad


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


FEW_CHANNELS = 8
"""Up to so many input channels a group, a convolution's weight gradient is formed in C: PyTorch's takes many times the
forward's time for them, and for more it is a matrix product, which PyTorch does well."""


def zero_output(op: Op, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    if isinstance(op, ConvOp):
        return op.empty_output(x, factors[0].shape[0], [f.shape[0] for f in factors[2:]])
    return op.empty_output(x, factors[0].shape[0])


# Weights -----------------------------------------------------------------------------------------------------------


def reconstruct(weight: Tensor | None, tucker: Tucker) -> Tensor:
    """W + s·ΔW, a new tensor of W's dtype and layout (s·ΔW alone: in the factors' dtype, contiguous), in C."""
    core, factors = tucker.core, tucker.factors
    if weight is None:
        out = core.new_empty([f.shape[0] for f in factors])
        _core.tucker_reconstruct(out, None, core, factors, tucker.scale)
        return out
    out = torch.empty_like(weight, requires_grad=False)  # in W's own layout, channels_last and transposed included
    _core.tucker_reconstruct(out, weight, core, factors, tucker.scale)
    return out


def project(dw: Tensor, tucker: Tucker, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradient of W' projected on (core, *factors), each None unless ``needs`` it, in C."""
    core, factors = tucker.core, tucker.factors
    outs = [torch.empty_like(t) if need else None for t, need in zip((core, *factors), needs, strict=True)]
    if any(needs):
        _core.tucker_reconstruct_backward(outs[0], tuple(outs[1:]), dw, core, factors, tucker.scale)
    return tuple(outs)


# Dropout -----------------------------------------------------------------------------------------------------------


def dropout_factor(x: Tensor, dropout: float, seed: int) -> Tensor:
    """What dropout multiplies x by, 0 or 1 / (1 - dropout), in x's shape and dtype; a function of seed and layout."""
    factor = torch.full_like(x, 1 / (1 - dropout), requires_grad=False)
    _core.drop(factor.as_strided((factor.numel(),), (1,)), dropout, seed)  # dense, in whichever order x has
    return factor


# The boundary ------------------------------------------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    """t (..., d) as the kernels count its rows: itself where its strides allow, else a contiguous copy (n, d)."""
    return t if t.ndim == 2 or (t.ndim < 6 and t.is_contiguous()) else t.reshape(-1, t.shape[-1])
