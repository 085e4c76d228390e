"""How an adapted layer computes: the one file that calls `flora._core`.

A *stock operation* (`LinearOp`, `AddmmOp`, `ConvOp`) knows PyTorch's own product, its gradient, and the C kernels that
put a Tucker delta on top. The plans are written once, over any of them:

fused
    y = op(x, W), then y += s·ΔW·x through the factors, in place; the same for dx. One autograd node keeps x and h.
hybrid
    W' = W + s·ΔW for the moment, y = op(x, W'); in backward W' is built again and the factor gradients are the skinny
    products of the fused plan. Nothing of the weight's size is kept.
merged
    as hybrid, but the weight gradient itself is formed and projected on core and factors.
separate
    y = op(x, W) + op(dropout(x), s·ΔW): what merged becomes when W' cannot be rounded or x is dropped.

Where the C kernels cannot go (other devices, tensor subclasses, ``torch.func``, tracing, forward-mode AD) the same
algebra runs in plain PyTorch operations from `flora.reference`. Source of the algebra: FLoRA, arXiv 2405.14739, and
docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from flora import _core, reference
from flora.plan import choose_plan

info = _core.info
"""What the extension runs on: kernel level, thread pool, thread count, whether the exchange API is in use."""

_PLAIN = (Tensor, torch.nn.Parameter)
_BELOW_FLOAT32 = (torch.bfloat16, torch.float16)
_COMPUTE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


class Tucker(NamedTuple):
    """A Tucker delta's tensors: core (r_out, r_in, *r_k), factors in weight order (dim_m, r_m), and the scale."""

    core: Tensor
    factors: tuple[Tensor, ...]
    scale: float


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of factors and sums for a base of ``dtype``: float64 for float64, float32 for anything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Stock operations ----------------------------------------------------------------------------------------------------


class LinearOp:
    """`torch.nn.functional.linear`: x (..., d_in), weight (d_out, d_in), y (..., d_out)."""

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def base_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (x, weight, bias), each None unless ``needs`` it."""
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dy @ weight if needs[0] else None
        dw = rows.mT @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        db = rows.sum(0) if needs[2] else None
        return dx, dw, db

    def update_(self, y: Tensor, x: Tensor, tucker: Tucker, want_h: bool) -> tuple[Tensor, Tensor | None]:
        """y += s·ΔW·x in C; returns y (moved to a contiguous one if it had to be) and h for backward."""
        u_out, u_in = tucker.factors
        y = y.contiguous()
        rows = _rows(x)
        h = u_in.new_empty(rows.shape[0], u_in.shape[1]) if want_h else None
        _core.tucker_linear_forward(
            y.view(-1, y.shape[-1]), h, rows, u_in.detach(), tucker.core.detach(), u_out.detach(), tucker.scale
        )
        return y, h

    def update_backward(
        self,
        dx: Tensor | None,
        dy: Tensor,
        x: Tensor,
        h: Tensor | None,
        tucker: Tucker,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """dx += … in C (in place), and the gradients of (core, u_out, u_in), each None unless ``needs`` it."""
        core = tucker.core
        u_out, u_in = tucker.factors
        d_core, d_u_out, d_u_in = (
            torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
            for t, need in zip((core, u_out, u_in), needs, strict=True)
        )
        _core.tucker_linear_backward(
            None if dx is None else dx.view(-1, dx.shape[-1]),
            d_u_in,
            d_core,
            d_u_out,
            _rows(dy),
            _rows(x),
            h,
            u_in.detach(),
            core.detach(),
            u_out.detach(),
            tucker.scale,
        )
        return d_core, d_u_out, d_u_in

    def twin(self, x: Tensor, tucker: Tucker) -> Tensor:
        """s·ΔW·x in plain PyTorch, differentiable, in the factors' dtype."""
        u_out, u_in = tucker.factors
        return reference.linear_update(x, u_in, tucker.core, u_out, tucker.scale)

    def empty_output(self, x: Tensor, d_out: int) -> Tensor:
        """Zeros of the output's shape, in x's dtype: where an update alone is accumulated."""
        return x.new_zeros(*x.shape[:-1], d_out)

    def plan(self, x: Tensor, weight: Tensor, tucker: Tucker, grad: bool) -> str:
        rows = x.numel() // max(1, x.shape[-1])
        return choose_plan(tuple(weight.shape), tuple(tucker.core.shape), 1, rows, rows, x.element_size(), grad)


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

    def _pad(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """x with whatever padding the convolution itself cannot do, and the symmetric padding left for it."""
        before, after = self.padding[::2], self.padding[1::2]
        if self.padding_mode != "zeros":
            return reference.pad_input(x, self.padding, self.padding_mode), [0] * len(before)
        if before == after:
            return x, list(before)
        # As PyTorch does for an even kernel under padding="same": the longer side is padded, the rest is the layer's.
        common = [min(pair) for pair in zip(before, after, strict=True)]
        extra = [p - c for pair, c in zip(zip(before, after, strict=True), common, strict=True) for p in pair]
        return reference.pad_input(x, extra, "zeros"), common

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded, padding = self._pad(x)
        conv = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        return conv(padded, weight, bias, self.stride, padding, self.dilation, self.groups)

    def base_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (x, weight, bias), each None unless ``needs`` it."""
        if not any(needs):
            return None, None, None
        with torch.enable_grad():  # the graph of the padding alone, where there is one
            source = x.detach().requires_grad_(needs[0])
            padded, padding = self._pad(source)
        zero = [0] * len(self.stride)
        dx, dw, db = torch.ops.aten.convolution_backward(
            dy,
            padded.detach(),
            weight,
            [weight.shape[0]],
            self.stride,
            padding,
            self.dilation,
            False,
            zero,
            self.groups,
            list(needs),
        )
        if needs[0] and padded is not source:
            (dx,) = torch.autograd.grad(padded, source, dx)
        return dx, dw, db

    def update_(self, y: Tensor, x: Tensor, tucker: Tucker, want_h: bool) -> tuple[Tensor, Tensor | None]:
        """y += s·ΔW * x in C; returns y and, for backward, h: the projected and padded input, channels last."""
        y, x = _conv_layout(y), _resolved(x)
        u_out, u_in = tucker.factors[:2]
        h = None
        if want_h:
            pads = zip(x.shape[2:], self.padding[::2], self.padding[1::2], strict=True)
            h = u_in.new_empty(x.shape[0], *(sum(p) for p in pads), self.groups * u_in.shape[1])
        _core.tucker_conv_forward(
            y, h, x, u_in.detach(), _expand_core(tucker), u_out.detach(), tucker.scale, *self._arguments()
        )
        return y, h

    def update_backward(
        self,
        dx: Tensor | None,
        dy: Tensor,
        x: Tensor,
        h: Tensor | None,
        tucker: Tucker,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """dx += … in C (in place), and the gradients of (core, u_out, u_in, *u_k), each None unless ``needs`` it."""
        u_out, u_in, *u_k = (f.detach() for f in tucker.factors)
        expanded = _expand_core(tucker)
        of_kernel = any(needs[3:])
        d_expanded = torch.empty_like(expanded) if needs[0] or of_kernel else None
        d_u_out = torch.empty_like(u_out) if needs[1] else None
        d_u_in = torch.empty_like(u_in) if needs[2] else None
        _core.tucker_conv_backward(
            dx,
            d_u_in,
            d_expanded,
            d_u_out,
            _resolved(dy),
            _resolved(x),
            h,
            u_in,
            expanded,
            u_out,
            tucker.scale,
            *self._arguments(),
        )
        d_core = torch.empty_like(tucker.core) if needs[0] else None
        d_k = [torch.empty_like(u) if need else None for u, need in zip(u_k, needs[3:], strict=True)]
        if d_expanded is not None:
            factors = (None, None, *u_k)
            _core.tucker_reconstruct_backward(
                d_core, (None, None, *d_k), d_expanded, tucker.core.detach(), factors, 1.0
            )
        return d_core, d_u_out, d_u_in, *d_k

    def _arguments(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups, self.padding_mode

    def twin(self, x: Tensor, tucker: Tucker) -> Tensor:
        """s·ΔW * x in plain PyTorch, differentiable, in the factors' dtype."""
        u_out, u_in, *u_k = tucker.factors
        expanded = reference.reconstruct(tucker.core, (None, None, *u_k), 1.0)
        return reference.conv_update(x, u_in, expanded, u_out, tucker.scale, *self._arguments())

    def empty_output(self, x: Tensor, d_out: int, kernel: Sequence[int]) -> Tensor:
        """Zeros of the output's shape and x's memory format, in x's dtype."""
        out = []
        for i, extent in enumerate(x.shape[2:]):
            reach = self.dilation[i] * (kernel[i] - 1) + 1
            out.append((extent + self.padding[2 * i] + self.padding[2 * i + 1] - reach) // self.stride[i] + 1)
        return x.new_zeros(x.shape[0], d_out, *out)

    def plan(self, x: Tensor, weight: Tensor, tucker: Tucker, grad: bool) -> str:
        inside = outside = x.shape[0]
        for i, extent in enumerate(x.shape[2:]):
            reach = self.dilation[i] * (weight.shape[2 + i] - 1) + 1
            inside *= extent
            outside *= max(0, extent + self.padding[2 * i] + self.padding[2 * i + 1] - reach) // self.stride[i] + 1
        shape, ranks = tuple(weight.shape), tuple(tucker.core.shape)
        return choose_plan(shape, ranks, self.groups, inside, outside, x.element_size(), grad)


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


# The boundary --------------------------------------------------------------------------------------------------------


def _resolved(t: Tensor) -> Tensor:
    """t with a lazy negation carried out, and without its graph: the kernels see storage only."""
    return t.detach().resolve_neg()


def _rows(t: Tensor) -> Tensor:
    """t (..., d) as rows (n, d): a view where its strides allow one, else a contiguous copy."""
    return _resolved(t).reshape(-1, t.shape[-1])


def _conv_layout(y: Tensor) -> Tensor:
    """y in a layout the kernels write: unit stride along the channels or the last spatial mode."""
    unit = y.stride(1) == 1 or y.stride(-1) == 1 or y.numel() == 0 or y.shape[1] == 1 or y.shape[-1] == 1
    return y if unit else y.contiguous()


def _expand_core(tucker: Tucker) -> Tensor:
    """The core with its kernel modes expanded: (r_out, r_in, *k)."""
    core, kernel_factors = tucker.core.detach(), [f.detach() for f in tucker.factors[2:]]
    out = core.new_empty(*core.shape[:2], *(f.shape[0] for f in kernel_factors))
    _core.tucker_reconstruct(out, None, core, (None, None, *kernel_factors), 1.0)
    return out


def _runs_in_c(*tensors: Tensor | None) -> bool:
    """Whether the C kernels may see these tensors: plain CPU tensors, and nobody watching the operations."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if forward_ad._current_level >= 0:
        return False
    return all(t is None or (type(t) in _PLAIN and t.device.type == "cpu") for t in tensors)


def _dtypes_fit(x: Tensor, weight: Tensor | None, tucker: Tucker) -> bool:
    compute = _COMPUTE.get(x.dtype)
    return (
        compute is not None
        and (weight is None or weight.dtype == x.dtype)
        and tucker.core.dtype == compute
        and all(f.dtype == compute for f in tucker.factors)
    )


def _autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this device now, if it is on."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    return torch.get_autocast_dtype(device)


def _autocast(x: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast would do to a stock call's arguments; the factors keep their dtype."""
    dtype = _autocast_dtype(x.device.type)
    if dtype is None:
        return (x, *rest)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *rest)
    )


def _exact(device: str) -> AbstractContextManager[Any]:
    """A context in which the twins compute in the factors' dtype, which autocast would narrow."""
    return nullcontext() if _autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _twin(op: Op, x: Tensor, tucker: Tucker) -> Tensor:
    """s·ΔW·x in plain PyTorch, in the factors' dtype."""
    with _exact(x.device.type):
        return op.twin(x, tucker)


def _add_to(y: Tensor, update: Tensor) -> Tensor:
    """y + update, rounded once to y's dtype."""
    return (y.to(update.dtype) + update).to(y.dtype)


# The plans -----------------------------------------------------------------------------------------------------------


class _Fused(torch.autograd.Function):
    """y = op(x, W, b) + s·ΔW·x through the factors; keeps x, h and (with dropout) one byte an element of x."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Op,
        scale: float,
        dropout: float,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        core: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout > 0 else (x, None)
        want_h = any(ctx.needs_input_grad[6:])
        y, h = op.update_(op.base(x, weight, bias), dropped, Tucker(core, factors, scale), want_h)
        ctx.op, ctx.scale, ctx.dropout = op, scale, dropout
        ctx.save_for_backward(x, weight, bias, h, mask, core, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, h, mask, core, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():  # create_graph: differentiate the twin
            keep = None if mask is None else mask.to(x.dtype) / (1 - ctx.dropout)
            y = ctx.op.base(x, weight, bias)
            y = _add_to(y, ctx.op.twin(x if keep is None else x * keep, Tucker(core, tuple(factors), ctx.scale)))
            return None, None, None, *_grads(y, (x, weight, bias, core, *factors), needs, dy)
        op, tucker = ctx.op, Tucker(core, tuple(factors), ctx.scale)
        dx, dw, db = op.base_backward(dy, x, weight, needs[:3])
        if mask is None:
            dx = None if dx is None else (dx.contiguous() if op is LINEAR or op is ADDMM else _conv_layout(dx))
            return None, None, None, dx, dw, db, *op.update_backward(dx, dy, x, h, tucker, needs[3:])
        keep = mask.to(x.dtype) / (1 - ctx.dropout)
        d_dropped = None if dx is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
        d_parts = op.update_backward(d_dropped, dy, x * keep, h, tucker, needs[3:])
        if dx is not None and d_dropped is not None:
            dx = dx + d_dropped * keep
        return None, None, None, dx, dw, db, *d_parts


class _Effective(torch.autograd.Function):
    """y = op(x, W + s·ΔW, b): plans hybrid and merged. W' is built for the moment, here and again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Op,
        scale: float,
        hybrid: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        core: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        ctx.op, ctx.scale, ctx.hybrid = op, scale, hybrid
        ctx.save_for_backward(x, weight, bias, core, *factors)
        return op.base(x, _reconstruct(weight, Tucker(core, factors, scale)), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, core, *factors = ctx.saved_tensors
        tucker = Tucker(core, tuple(factors), ctx.scale)
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            y = ctx.op.base(x, weight + reference.reconstruct(core, factors, ctx.scale).to(weight.dtype), bias)
            return None, None, None, *_grads(y, (x, weight, bias, core, *factors), needs, dy)
        effective = _reconstruct(weight, tucker) if needs[0] else weight
        of_delta = any(needs[3:])
        form = needs[1] or (of_delta and not ctx.hybrid)
        dx, dw, db = ctx.op.base_backward(dy, x, effective, (needs[0], form, needs[2]))
        if not of_delta:
            parts: tuple[Tensor | None, ...] = (None,) * len(needs[3:])
        elif ctx.hybrid:
            parts = ctx.op.update_backward(None, dy, x, None, tucker, needs[3:])
        else:
            parts = _project(dw, tucker, needs[3:])
        return None, None, None, dx, dw if needs[1] else None, db, *parts


class _Reconstruct(torch.autograd.Function):
    """W' = W + s·ΔW, or s·ΔW alone where W is None."""

    @staticmethod
    def forward(ctx: Any, scale: float, weight: Tensor | None, core: Tensor, *factors: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(core, *factors)
        return _reconstruct(weight, Tucker(core, factors, scale))

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> Any:  # type: ignore[override]
        core, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            delta = reference.reconstruct(core, factors, ctx.scale)
            return None, dw if needs[0] else None, *_grads(delta, (core, *factors), needs[1:], dw.to(delta.dtype))
        parts = _project(dw, Tucker(core, tuple(factors), ctx.scale), needs[1:])
        return None, dw if needs[0] else None, *parts


class _Update(torch.autograd.Function):
    """s·ΔW·x alone, through the factors, in x's dtype."""

    @staticmethod
    def forward(ctx: Any, op: Op, scale: float, x: Tensor, core: Tensor, *factors: Tensor) -> Tensor:
        tucker = Tucker(core, factors, scale)
        y, h = op.update_(_zero_output(op, x, factors), x, tucker, want_h=True)
        ctx.op, ctx.scale = op, scale
        ctx.save_for_backward(x, h, core, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, h, core, *factors = ctx.saved_tensors
        tucker = Tucker(core, tuple(factors), ctx.scale)
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            y = ctx.op.twin(x, tucker)
            return None, None, *_grads(y, (x, core, *factors), needs, dy.to(y.dtype))
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        return None, None, dx, *ctx.op.update_backward(dx, dy, x, h, tucker, needs[1:])


def _zero_output(op: Op, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    if isinstance(op, ConvOp):
        return op.empty_output(x, factors[0].shape[0], [f.shape[0] for f in factors[2:]])
    return op.empty_output(x, factors[0].shape[0])


def _grads(y: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor) -> list[Tensor | None]:
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return [next(grads) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)]


def _reconstruct(weight: Tensor | None, tucker: Tucker) -> Tensor:
    """W + s·ΔW, a new contiguous tensor of W's dtype (s·ΔW alone in the factors' dtype), in C."""
    core, factors = tucker.core.detach(), tuple(f.detach() for f in tucker.factors)
    if weight is None:
        out = core.new_empty([f.shape[0] for f in factors])
        _core.tucker_reconstruct(out, None, core, factors, tucker.scale)
        return out
    out = torch.empty_like(weight, memory_format=torch.contiguous_format, requires_grad=False)
    out.copy_(weight.detach())
    _core.tucker_reconstruct(out, out, core, factors, tucker.scale)
    return out


def _project(dw: Tensor, tucker: Tucker, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradient of W' projected on (core, *factors), each None unless ``needs`` it, in C."""
    core, factors = tucker.core.detach(), tuple(f.detach() for f in tucker.factors)
    outs = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((core, *factors), needs, strict=True)
    ]
    if any(needs):
        dw = _resolved(dw).contiguous()
        _core.tucker_reconstruct_backward(outs[0], tuple(outs[1:]), dw, core, factors, tucker.scale)
    return tuple(outs)


# What layers call ----------------------------------------------------------------------------------------------------


def resolve_plan(op: Op, x: Tensor, weight: Tensor, tucker: Tucker, plan: str, dropout: float, grad: bool) -> str:
    """The plan that runs: ``plan`` itself, or for "auto" the cheapest by `flora.plan`, within what dropout and dtype allow.

    hybrid and merged need W + s·ΔW in W's dtype without loss, and the same x for both: with dropout, or a base below
    float32, hybrid becomes fused and merged becomes separate.
    """
    if plan == "auto":
        plan = op.plan(x, weight, tucker, grad)
    if dropout > 0 or weight.dtype in _BELOW_FLOAT32 or x.dtype in _BELOW_FLOAT32:
        return {"hybrid": "fused", "merged": "separate"}.get(plan, plan)
    return plan


def adapted(
    op: Op,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tucker: Tucker,
    *,
    plan: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """op(x, W, b) + s·ΔW·dropout(x), with gradients for everything that asks for one.

    Parameters
    ----------
    x, weight, bias
        as the stock operation takes them: x (..., d_in) or (batch, d_in, *in), weight (d_out, d_in/groups, *k).
    tucker
        core and factors in float32, or float64 for a float64 layer.
    plan
        "auto", "fused", "hybrid" or "merged".
    dropout
        probability with which an element of the delta's input is zeroed (the base sees all of x); 0 in evaluation.

    Returns a tensor of the stock operation's shape and dtype. Raises what the stock operation raises.
    """
    x, weight, bias = _autocast(x, weight, bias)  # type: ignore[assignment]
    grad = torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or tucker.core.requires_grad
        or any(f.requires_grad for f in tucker.factors)
        or (bias is not None and bias.requires_grad)
    )
    direct = _runs_in_c(x, weight, bias, tucker.core, *tucker.factors) and _dtypes_fit(x, weight, tucker)
    plan = resolve_plan(op, x, weight, tucker, plan, dropout, grad) if direct else "fused"
    if not direct:
        return _add_to(op.base(x, weight, bias), _twin(op, F.dropout(x, dropout) if dropout > 0 else x, tucker))
    if plan == "separate":
        delta = effective_weight(None, tucker)
        source = F.dropout(x, dropout) if dropout > 0 else x
        return _add_to(op.base(x, weight, bias), op.base(source.to(delta.dtype), delta, None))
    if grad:
        node = _Fused if plan == "fused" else _Effective
        option = dropout if plan == "fused" else plan == "hybrid"
        out: Tensor = node.apply(op, tucker.scale, option, x, weight, bias, tucker.core, *tucker.factors)
        return out
    if plan == "fused":
        dropped = F.dropout(x, dropout) if dropout > 0 else x
        return op.update_(op.base(x, weight, bias), dropped, tucker, want_h=False)[0]
    return op.base(x, _reconstruct(weight, tucker), bias)


def update(op: Op, x: Tensor, tucker: Tucker, *, dropout: float = 0.0) -> Tensor:
    """s·ΔW·dropout(x) alone, of the stock operation's output shape and x's dtype: for bases that hide their weight."""
    if dropout > 0:
        x = F.dropout(x, dropout)
    (x,) = _autocast(x)  # type: ignore[assignment]
    if not (_runs_in_c(x, tucker.core, *tucker.factors) and _dtypes_fit(x, None, tucker)):
        return _twin(op, x, tucker).to(x.dtype)
    if torch.is_grad_enabled():
        out: Tensor = _Update.apply(op, tucker.scale, x, tucker.core, *tucker.factors)
        return out
    return op.update_(_zero_output(op, x, tucker.factors), x, tucker, want_h=False)[0]


def effective_weight(weight: Tensor | None, tucker: Tucker) -> Tensor:
    """W + s·ΔW (d_out, d_in/groups, *k), differentiable, in W's dtype; with ``weight=None`` s·ΔW in the factors' dtype."""
    fits = weight is None or weight.dtype in _COMPUTE and _COMPUTE[weight.dtype] == tucker.core.dtype
    if fits and _runs_in_c(weight, tucker.core, *tucker.factors):
        out: Tensor = _Reconstruct.apply(tucker.scale, weight, tucker.core, *tucker.factors)
        return out
    with _exact(tucker.core.device.type):
        delta = reference.reconstruct(tucker.core, tucker.factors, tucker.scale)
    return delta if weight is None else _add_to(weight, delta)


def embedding_update(ids: Tensor, tucker: Tucker, padding_idx: int | None) -> Tensor:
    """s·U₀[ids]·G·U₁ᵀ: ids (...) to (..., dim), in the factors' dtype; the row of ``padding_idx`` is left out.

    U₀ is (num, r₀) and U₁ (dim, r₁), the modes of the table in its own order.
    """
    u_num, u_dim = tucker.factors
    rows = F.embedding(ids, u_num)
    if padding_idx is not None:
        rows = rows.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
    return tucker.scale * (rows @ tucker.core @ u_dim.mT)
