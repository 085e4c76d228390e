"""How an adapted layer computes: plans, dispatch and autograd, over any operation of `flora.ops` and any form.

fused
    y = op(x, W), then y += s·ΔW·x through the parameters, in place; the same for dx. One node keeps x and h.
hybrid
    W' = W + s·ΔW for the moment, y = op(x, W'); in backward W' is built again and the parameters' gradients are those
    of the fused plan. Nothing of the weight's size is kept.
merged
    as hybrid, but the weight gradient itself is formed and projected on the parameters.
separate
    y = op(x, W) + op(dropout(x), s·ΔW): what merged becomes when x is dropped.

Under ``torch.compile``, ``torch.export`` and FakeTensor a call becomes one of `flora.library`'s operators. Where the C
kernels cannot go (other devices, tensor subclasses, ``torch.func``, forward-mode AD, a dispatch mode) the same algebra
runs in plain PyTorch operations. A form (`flora.forms`) knows the algebra of its method, this file none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from flora import library
from flora.forms import Form, Parts, Tucker
from flora.ops import Op, dropout_factor, info, takes
from flora.passes import (
    NO_INPUT,
    Layout,
    add_to,
    autocast,
    blank,
    effective_backward,
    exact,
    fused_backward,
    layout,
    no_view,
    plain,
    plain_backward,
    resolve_plan,
    seed,
    separate,
    separate_backward,
    twin,
    twin_grads,
    weight_backward,
    with_effective,
)

__all__ = [
    "Parts",
    "Tucker",
    "adapted",
    "compute_dtype",
    "delta_weight",
    "effective_weight",
    "embedding_update",
    "exact",
    "info",
    "resolve_plan",
    "update",
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of factors and sums for a base of ``dtype``: float64 for float64, float32 for anything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Dispatch ----------------------------------------------------------------------------------------------------------


def _watched() -> bool:
    """Whether somebody follows the operations themselves: tracing, compiling, a dispatch mode, ``torch.func``, jvp."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _transformed(x: Tensor) -> bool:
    """Whether somebody follows the operations who cannot follow a node of this file that is made of them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or isinstance(x, FakeTensor)
    )


def _as_operator(x: Tensor, *rest: Tensor | None) -> bool:
    """Whether a watched call becomes one of `flora.library`'s operators: traced by those who take them, on a CPU.

    Elsewhere a compiler does better with plain operations, and ``torch.func`` and forward-mode AD need them.
    """
    if not (torch.compiler.is_compiling() or isinstance(x, FakeTensor)):
        return False
    if torch._C._functorch.get_dynamic_layer_stack_depth() > 0 or forward_ad._current_level >= 0:
        return False
    return all(t is None or (type(t) in _TRACED and t.device.type == "cpu") for t in (x, *rest))


_TRACED = (Tensor, nn.Parameter, FakeTensor)


# The plans ---------------------------------------------------------------------------------------------------------


def _by_twin(dy: Tensor) -> bool:
    """Whether a backward has to differentiate the twin: for create_graph, or a dy that C cannot see (batched, say)."""
    batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # is_grads_batched's kind of vmap
    return torch.is_grad_enabled() or batched or type(dy) is not Tensor or not dy.is_cpu or _watched()


def _exactly(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A backward without autocast, whatever it is called under: its forward's tensors were cast already."""

    def run(ctx: Any, dy: Tensor) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return backward(ctx, dy)
        with torch.autocast("cpu", enabled=False):
            return backward(ctx, dy)

    return run


class _Fused(torch.autograd.Function):
    """y = op(x, W, b) + s·ΔW·x through the parameters.

    Keeps what the form asks for, and x if W learns. A dropout mask is drawn again from its seed, never kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Op,
        form: Form,
        dropout: float,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.op, ctx.form, ctx.dropout = op, form, dropout
        dropped = x
        if dropout > 0:
            ctx.seed = seed()
            dropped = x * dropout_factor(x, dropout, ctx.seed)
        y, h = form.update_(op, op.base(x, weight, bias), dropped, tensors, want_h=any(needs[6:]))
        of_input = needs[4] or form.keeps_input(needs[6:])
        ctx.x_like = None if of_input and dropout == 0 else layout(x)
        ctx.save_for_backward(x if of_input else None, weight, bias if needs[5] else None, h, *tensors)
        return no_view(y)

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        source, weight, bias, h, *tensors = ctx.saved_tensors
        op, form, needs = ctx.op, ctx.form, ctx.needs_input_grad[3:]
        by_twin = _by_twin(dy)
        if source is None and by_twin:
            raise RuntimeError(NO_INPUT)
        kept = dropout_factor(blank(ctx.x_like), ctx.dropout, ctx.seed) if ctx.dropout > 0 else None
        x = blank(ctx.x_like) if source is None else source  # a blank's shape and layout are all that matters
        if by_twin:

            def build(x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor | None) -> Tensor:
                return plain(op, x, weight, bias, form, tensors, kept)

            return None, None, None, *twin_grads(build, (x, weight, bias, *tensors), needs, dy)
        return None, None, None, *fused_backward(op, form, needs, dy, source, x, weight, h, tensors, kept)


def _dropped(x: Tensor, dropout: float) -> Tensor:
    """Dropout from one stream of masks, with gradients and without."""
    return x * dropout_factor(x, dropout, seed()) if dropout > 0 else x


class _Effective(torch.autograd.Function):
    """y = op(x, W + s·ΔW, b): plans hybrid and merged. W' is built for the moment, here and again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Op,
        form: Form,
        hybrid: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.op, ctx.form, ctx.hybrid = op, form, hybrid
        ctx.save_for_backward(x, weight, bias, *tensors)
        return no_view(with_effective(op, x, weight, bias, form, tensors))

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, *tensors = ctx.saved_tensors
        op, form, needs = ctx.op, ctx.form, ctx.needs_input_grad[3:]
        if _by_twin(dy):

            def build(x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor | None) -> Tensor:
                y: Tensor = op.base(x, add_to(weight, form.delta(weight, tensors)), bias)
                return y

            return None, None, None, *twin_grads(build, (x, weight, bias, *tensors), needs, dy)
        return None, None, None, *effective_backward(op, form, ctx.hybrid, needs, dy, x, weight, tensors)


class _Separate(torch.autograd.Function):
    """y = op(x, W, b) + op(dropout(x), s·ΔW), the second in the parameters' dtype.

    Keeps x alone: the mask is drawn again from its seed, s·ΔW built again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Op,
        form: Form,
        dropout: float,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.op, ctx.form, ctx.dropout, ctx.seed, ctx.x_like = op, form, dropout, seed(), layout(x)
        ctx.save_for_backward(x, weight, bias if ctx.needs_input_grad[5] else None, *tensors)
        return no_view(separate(op, x, weight, bias, form, tensors, dropout_factor(x, dropout, ctx.seed)))

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, *tensors = ctx.saved_tensors
        op, form, needs = ctx.op, ctx.form, ctx.needs_input_grad[3:]
        kept = dropout_factor(blank(ctx.x_like), ctx.dropout, ctx.seed)
        if _by_twin(dy):

            def build(x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor | None) -> Tensor:
                delta = form.delta(weight, tensors)
                return add_to(op.base(x, weight, bias), op.base((x * kept).to(delta.dtype), delta, None))

            return None, None, None, *twin_grads(build, (x, weight, bias, *tensors), needs, dy)
        return None, None, None, *separate_backward(op, form, needs, dy, x, weight, tensors, kept)


class _Combined(torch.autograd.Function):
    """W' = W + s·ΔW, or s·ΔW ``alone``; W may be None then, unless the form needs it."""

    @staticmethod
    def forward(ctx: Any, form: Form, alone: bool, weight: Tensor | None, *tensors: Tensor | None) -> Tensor:
        ctx.form, ctx.alone = form, alone
        ctx.save_for_backward(weight if form.of_weight else None, *tensors)
        if alone:
            return form.alone(weight, tensors)
        assert weight is not None
        return form.effective(weight, tensors)

    @staticmethod
    @_exactly
    def backward(ctx: Any, dw: Tensor) -> Any:
        weight, *tensors = ctx.saved_tensors
        form, needs = ctx.form, ctx.needs_input_grad[2:]
        if not _by_twin(dw):
            return None, None, *weight_backward(form, ctx.alone, needs, dw, weight, tensors)
        grads = twin_grads(lambda w, *t: form.delta(w, t), (weight, *tensors), needs, dw)
        if needs[0] and not ctx.alone:
            grads[0] = dw if grads[0] is None else dw + grads[0]
        return None, None, *grads


class _Update(torch.autograd.Function):
    """s·ΔW·x alone, through the parameters, in x's dtype."""

    @staticmethod
    def forward(ctx: Any, op: Op, form: Form, shape: tuple[int, ...], x: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.op, ctx.form = op, form
        y, h = form.update_(op, op.empty_output(x, shape[0], shape[2:]), x, tensors, want_h=True)
        ctx.save_for_backward(x, h, *tensors)
        return y

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, h, *tensors = ctx.saved_tensors
        op, form, needs = ctx.op, ctx.form, ctx.needs_input_grad[3:]
        if _by_twin(dy):

            def build(x: Tensor, *tensors: Tensor | None) -> Tensor:
                return twin(op, x, None, form, tensors).to(x.dtype)

            return None, None, None, *twin_grads(build, (x, *tensors), needs, dy)
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        return None, None, None, dx, *form.update_backward(op, dx, dy, x, h, tensors, needs[1:])


class _Plain(torch.autograd.Function):
    """y = op(x, W, b) + s·ΔW·x in plain PyTorch operations, on any device.

    Keeps x as it was given and nothing else: no copy of it in another dtype, neither a mask nor what it made of x. The
    update's skinny products are computed a second time in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Op,
        form: Form,
        dropout: float,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.op, ctx.form, ctx.dropout, ctx.x_like = op, form, dropout, layout(x)
        ctx.seed = seed() if dropout > 0 else 0
        ctx.save_for_backward(x, weight, bias if ctx.needs_input_grad[5] else None, *tensors)
        return plain(op, x, weight, bias, form, tensors, _kept(x, ctx.x_like, dropout, ctx.seed))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, *tensors = ctx.saved_tensors
        op, form, needs = ctx.op, ctx.form, ctx.needs_input_grad[3:]
        kept = _kept(x, ctx.x_like, ctx.dropout, ctx.seed)
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy) or _transformed(dy):

            def build(x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor | None) -> Tensor:
                return plain(op, x, weight, bias, form, tensors, kept)

            return None, None, None, *twin_grads(build, (x, weight, bias, *tensors), needs, dy)
        with exact(x.device.type):
            return None, None, None, *plain_backward(op, form, needs, dy, x, weight, tensors, kept)


def _kept(x: Tensor, layout: Layout, dropout: float, seed: int) -> Tensor | None:
    return dropout_factor(blank(layout, x.device), dropout, seed) if dropout > 0 else None


def _direct(node: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``node.apply`` without its preparations for ``torch.func``, under which no node of this file runs."""
    apply: Callable[..., Any] = super(torch.autograd.Function, node).apply  # type: ignore[misc]
    return apply


_NODES = {
    "fused": _direct(_Fused),
    "hybrid": _direct(_Effective),
    "merged": _direct(_Effective),
    "separate": _direct(_Separate),
    "plain": _direct(_Plain),
}


# What layers call --------------------------------------------------------------------------------------------------


def adapted(
    op: Op,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: Parts | Tucker,
    *,
    plan: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """op(x, W, b) + s·ΔW·dropout(x), with gradients for everything that asks for one.

    Parameters
    ----------
    x, weight, bias
        as the stock operation takes them: x (..., d_in) or (batch, d_in, *in), weight (d_out, d_in/groups, *k).
    parts
        a form and its tensors, in float32, or float64 for a float64 layer.
    plan
        "auto", "fused", "hybrid" or "merged".
    dropout
        probability with which an element of the delta's input is zeroed (the base sees all of x); 0 in evaluation.

    Returns a tensor of the stock operation's shape and dtype. Raises what the stock operation raises.
    """
    if not x.is_cpu or torch.is_autocast_enabled("cpu"):
        x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    form, tensors = parts.form, parts.tensors
    if _watched() or not takes(x, weight, bias, tensors):
        return _elsewhere(op, x, weight, bias, parts, plan, dropout)
    grad = torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or any(t is not None and t.requires_grad for t in tensors)
        or (bias is not None and bias.requires_grad)
    )
    plan = resolve_plan(op, x, weight, parts, plan, dropout, grad)
    if grad:
        apply, option = _NODES[plan], dropout if plan in ("fused", "separate") else plan == "hybrid"
        out: Tensor = apply(op, form, option, x, weight, bias, *tensors)
        return out
    if plan == "separate":
        return separate(op, x, weight, bias, form, tensors, dropout_factor(x, dropout, seed()))
    if plan == "fused":
        return form.update_(op, op.base(x, weight, bias), _dropped(x, dropout), tensors, want_h=False)[0]
    return with_effective(op, x, weight, bias, form, tensors)


def _elsewhere(
    op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts | Tucker, plan: str, dropout: float
) -> Tensor:
    """`adapted` where the kernels cannot be called."""
    form, tensors = parts.form, parts.tensors
    if _as_operator(x, weight, bias, *tensors) and library.knows(form, x, weight, bias, tensors):
        return library.adapted(op, x, weight, bias, form, tensors, plan, dropout)
    if x.layout is not torch.strided or x.is_nested:  # whatever the stock operation takes
        if dropout == 0:
            return op.base(x, effective_weight(weight, parts), bias)
        delta = delta_weight(weight, parts).to(weight.dtype)
        return op.base(x, weight, bias) + op.base(F.dropout(x, dropout), delta, None)
    if _transformed(x) or not all(t is None or type(t) in _TRACED for t in (x, weight, bias, *tensors)):
        dropped = F.dropout(x, dropout) if dropout > 0 else x
    else:
        learns = [t is not None and t.requires_grad for t in tensors]
        if torch.is_grad_enabled() and (weight.requires_grad or form.keeps_input(learns)):
            out: Tensor = _NODES["plain"](op, form, dropout, x, weight, bias, *tensors)
            return out
        # x is not kept then; of the mask a byte an element
        dropped = x if dropout == 0 else x.masked_fill(dropout_factor(x, dropout, seed()) == 0, 0) * (1 / (1 - dropout))
    return add_to(op.base(x, weight, bias), twin(op, dropped, weight, form, tensors))


def update(
    op: Op,
    x: Tensor,
    weight: Tensor | None,
    shape: tuple[int, ...],
    parts: Parts | Tucker,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """s·ΔW·dropout(x) alone, of the stock operation's output shape and x's dtype: for bases that hide their weight.

    ``weight`` may be None unless the form needs it; ``shape`` is the weight's.
    """
    (x,) = autocast(x)  # type: ignore[assignment]
    form, tensors = parts.form, parts.tensors
    if _watched() or not takes(x, None, None, tensors):
        if _as_operator(x, weight, *tensors) and library.knows(form, x, None, None, tensors):
            return library.update(op, x, weight, shape, form, tensors, dropout)
        watched = _transformed(x) or type(x) not in _TRACED
        x = F.dropout(x, dropout) if watched and dropout > 0 else x if watched else _dropped(x, dropout)
        return twin(op, x, weight, form, tensors).to(x.dtype)
    x = _dropped(x, dropout)
    if "fused" not in form.runs(op, tensors):
        delta = delta_weight(weight, parts)
        with exact("cpu"):
            return op.base(x.to(delta.dtype), delta, None).to(x.dtype)
    if torch.is_grad_enabled():
        out: Tensor = _Update.apply(op, form, shape, x, *tensors)  # type: ignore[no-untyped-call]
        return out
    return form.update_(op, op.empty_output(x, shape[0], shape[2:]), x, tensors, want_h=False)[0]


def effective_weight(weight: Tensor, parts: Parts | Tucker) -> Tensor:
    """W + s·ΔW (d_out, d_in/groups, *k), differentiable, in W's dtype."""
    form, tensors = parts.form, parts.tensors
    if not _watched() and takes(weight, None, None, tensors):
        out: Tensor = _Combined.apply(form, False, weight, *tensors)  # type: ignore[no-untyped-call]
        return out
    if _as_operator(weight, *tensors) and library.knows(form, weight, None, None, tensors):
        return library.effective_weight(weight, form, tensors)
    with exact(weight.device.type):
        return add_to(weight, form.delta(weight, tensors))


def delta_weight(weight: Tensor | None, parts: Parts | Tucker) -> Tensor:
    """s·ΔW alone, differentiable, in the parameters' dtype; ``weight`` may be None unless the form needs it."""
    form, tensors = parts.form, parts.tensors
    some = next(t for t in tensors if t is not None)
    if not _watched() and takes(some, None, None, tensors):
        out: Tensor = _Combined.apply(form, True, weight, *tensors)  # type: ignore[no-untyped-call]
        return out
    shape = getattr(form, "shape", None) if weight is None else weight.shape
    if shape is not None and _as_operator(some, weight, *tensors) and library.knows(form, some, None, None, tensors):
        return library.delta_weight(weight, shape, form, tensors)
    with exact(some.device.type):
        return form.delta(weight, tensors)


def embedding_update(ids: Tensor, weight: Tensor, parts: Parts | Tucker, padding_idx: int | None) -> Tensor:
    """The rows s·ΔW[ids]: ids (...) to (..., dim), in the parameters' dtype; that of ``padding_idx`` is left out."""
    with exact(ids.device.type):
        rows = parts.form.lookup(ids, weight, parts.tensors)
    return rows if padding_idx is None else rows.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
