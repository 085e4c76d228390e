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

Where the C kernels cannot go (other devices, tensor subclasses, ``torch.func``, tracing, forward-mode AD) the same
algebra runs in plain PyTorch operations. A form (`flora.forms`) knows the algebra of its method, this file none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from flora.forms import Form, Parts, Tucker
from flora.forms.base import Gradients, Tensors
from flora.ops import Op, dropout_factor, info, takes
from flora.plan import DROPPING, NO_HYBRID, PLANS

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

_BELOW_FLOAT32 = (torch.bfloat16, torch.float16)


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


def _autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this device now, if it is on."""
    if device != "cpu" and not torch.amp.is_autocast_available(device):
        return None
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _autocast(x: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast would do to a stock call's arguments; the parameters keep theirs."""
    dtype = _autocast_dtype(x.device.type)
    if dtype is None:
        return (x, *rest)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *rest)
    )


def exact(device: str) -> AbstractContextManager[Any]:
    """A context in which the twins compute in the parameters' dtype, which autocast would narrow."""
    return nullcontext() if _autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _twin(op: Op, x: Tensor, weight: Tensor | None, form: Form, tensors: Tensors) -> Tensor:
    """s·ΔW·x in plain PyTorch, in the parameters' dtype."""
    with exact(x.device.type):
        return form.twin(op, x, weight, tensors)


def _add_to(y: Tensor, update: Tensor) -> Tensor:
    """y + update, rounded once to y's dtype."""
    return (y.to(update.dtype) + update).to(y.dtype)


# The plans ---------------------------------------------------------------------------------------------------------


def _twin_grads(
    build: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """The gradients of build(*inputs), each None unless needed, with a graph of their own if grad mode is on.

    Aliases stand in for the inputs: where one input was computed from another (a layer that is applied twice), the path
    between them is the engine's to walk, not ours.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        if not create_graph:
            aliases = [None if a is None else a.detach().requires_grad_(n) for a, n in zip(aliases, needs, strict=True)]
        y = build(*aliases)
        wanted = [a for a, need in zip(aliases, needs, strict=True) if need and a is not None]
        found = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=create_graph, allow_unused=True))
    return [next(found) if need and a is not None else None for a, need in zip(aliases, needs, strict=True)]


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
            ctx.seed = _seed()
            dropped = x * dropout_factor(x, dropout, ctx.seed)
        y, h = form.update_(op, op.base(x, weight, bias), dropped, tensors, want_h=any(needs[6:]))
        of_input = needs[4] or form.keeps_input(needs[6:])
        ctx.x_like = None if of_input and dropout == 0 else _layout(x)
        ctx.save_for_backward(x if of_input else None, weight, bias if needs[5] else None, h, *tensors)
        return _no_view(y)

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        source, weight, bias, h, *tensors = ctx.saved_tensors
        op, form, needs = ctx.op, ctx.form, ctx.needs_input_grad[3:]
        by_twin = _by_twin(dy)
        if source is None and by_twin:
            raise RuntimeError(
                "create_graph (or a batched gradient) needs the layer's input, which is not kept while neither its "
                "factor nor the weight learns"
            )
        kept = dropout_factor(_blank(ctx.x_like), ctx.dropout, ctx.seed) if ctx.dropout > 0 else None
        x = _blank(ctx.x_like) if source is None else source  # a blank's shape and layout are all that matters
        if by_twin:

            def twin(x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor | None) -> Tensor:
                delta = form.twin(op, x if kept is None else x * kept, weight, tensors)
                return _add_to(op.base(x, weight, bias), delta)

            return None, None, None, *_twin_grads(twin, (x, weight, bias, *tensors), needs, dy)
        dx, dw, db = op.base_backward(dy, x, weight, needs[:3])
        dw = None if dw is None else dw.to(weight.dtype)
        if dx is None and not any(needs[3:]):
            return None, None, None, dx, dw, db, *[None] * len(needs[3:])
        if kept is None:
            dx = None if dx is None else op.writable(dx)
            return None, None, None, dx, dw, db, *form.update_backward(op, dx, dy, source, h, tensors, needs[3:])
        d_dropped = None if dx is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
        dropped = None if source is None else source * kept
        d_tensors = form.update_backward(op, d_dropped, dy, dropped, h, tensors, needs[3:])
        if dx is not None and d_dropped is not None:
            dx = dx + d_dropped * kept
        return None, None, None, dx, dw, db, *d_tensors


_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def _layout(x: Tensor) -> _Layout:
    """What a dropout mask is drawn by. Kept for backward, as a saved-tensor hook may return x with other strides."""
    return x.shape, x.stride(), x.dtype


def _blank(layout: _Layout) -> Tensor:
    shape, stride, dtype = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")


def _no_view(y: Tensor) -> Tensor:
    """A product's new output without the mark of a view, as which `F.linear` returns some: a node's output that has it
    cannot be written to, as an activation in place does."""
    return y.data if y._is_view() else y


def _seed() -> int:
    return int(torch.randint(2**62, (), device="cpu"))


def _dropped(x: Tensor, dropout: float) -> Tensor:
    """Dropout on a tensor that C may see: one stream of masks, with gradients and without."""
    return x * dropout_factor(x, dropout, _seed()) if dropout > 0 else x


def _with_effective(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, tensors: Tensors) -> Tensor:
    """op(x, W + s·ΔW, b); below float32 computed in float32, so that nothing is rounded but the result."""
    if weight.dtype not in _BELOW_FLOAT32:
        return op.base(x, form.effective(weight, tensors), bias)
    with exact("cpu"):
        effective = form.effective(weight.float(), tensors)
        return op.base(x.float(), effective, None if bias is None else bias.float()).to(x.dtype)


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
        return _no_view(_with_effective(op, x, weight, bias, form, tensors))

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, *tensors = ctx.saved_tensors
        op, form, needs = ctx.op, ctx.form, ctx.needs_input_grad[3:]
        if _by_twin(dy):

            def twin(x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor | None) -> Tensor:
                y: Tensor = op.base(x, _add_to(weight, form.delta(weight, tensors)), bias)
                return y

            return None, None, None, *_twin_grads(twin, (x, weight, bias, *tensors), needs, dy)
        effective = form.effective(weight, tensors) if needs[0] else weight
        of_delta = any(needs[3:])
        formed = needs[1] or (of_delta and not ctx.hybrid)
        dx, dw, db = op.base_backward(dy, x, effective, (needs[0], formed, needs[2]))
        if not of_delta:
            d_tensors: Gradients = (None,) * len(needs[3:])
        elif ctx.hybrid:
            d_tensors = form.gradients(op, dy, x, weight, tensors, needs[3:])
        else:
            d_tensors = form.project(dw, weight, tensors, needs[3:])
        d_weight = form.base_gradient(dw, tensors).to(weight.dtype) if needs[1] and dw is not None else None
        return None, None, None, dx, d_weight, db, *d_tensors


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
        ctx.op, ctx.form, ctx.dropout, ctx.seed, ctx.x_like = op, form, dropout, _seed(), _layout(x)
        ctx.save_for_backward(x, weight, bias if ctx.needs_input_grad[5] else None, *tensors)
        return _no_view(_separate(op, x, weight, bias, form, tensors, dropout, ctx.seed))

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, *tensors = ctx.saved_tensors
        op, form, needs = ctx.op, ctx.form, ctx.needs_input_grad[3:]
        kept = dropout_factor(_blank(ctx.x_like), ctx.dropout, ctx.seed)
        if _by_twin(dy):

            def twin(x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor | None) -> Tensor:
                delta = form.delta(weight, tensors)
                return _add_to(op.base(x, weight, bias), op.base((x * kept).to(delta.dtype), delta, None))

            return None, None, None, *_twin_grads(twin, (x, weight, bias, *tensors), needs, dy)
        dx, dw, db = op.base_backward(dy, x, weight, needs[:3])
        of_delta = any(needs[3:]) or (needs[1] and form.of_weight)
        delta = form.alone(weight, tensors)
        wanted = (needs[0], of_delta, False)
        d_dropped, d_delta, _ = op.base_backward(dy.to(delta.dtype), (x * kept).to(delta.dtype), delta, wanted)
        if dx is not None:
            dx = _add_to(dx, d_dropped * kept)
        if dw is not None and form.of_weight:
            dw = dw + (form.base_gradient(d_delta, tensors) - d_delta)
        d_tensors = form.project(d_delta, weight, tensors, needs[3:]) if of_delta else (None,) * len(needs[3:])
        return None, None, None, dx, None if dw is None else dw.to(weight.dtype), db, *d_tensors


def _separate(
    op: Op,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: Form,
    tensors: Tensors,
    dropout: float,
    seed: int,
) -> Tensor:
    dropped = x * dropout_factor(x, dropout, seed)
    delta = form.alone(weight, tensors)
    with exact("cpu"):
        added = op.base(dropped.to(delta.dtype), delta, None)
    return _add_to(op.base(x, weight, bias), added)


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
        d_weight = dw if needs[0] and not ctx.alone else None
        if _by_twin(dw):
            grads = _twin_grads(lambda w, *t: form.delta(w, t), (weight, *tensors), needs, dw)
            through = grads[0]
        else:
            through = form.base_gradient(dw, tensors) - dw if needs[0] and form.of_weight else None
            grads = [through, *form.project(dw, weight, tensors, needs[1:])]
        if through is not None:
            d_weight = through if d_weight is None else d_weight + through
        return None, None, d_weight, *grads[1:]


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

            def twin(x: Tensor, *tensors: Tensor | None) -> Tensor:
                update: Tensor = form.twin(op, x, None, tensors)
                return update.to(x.dtype)

            return None, None, None, *_twin_grads(twin, (x, *tensors), needs, dy)
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        return None, None, None, dx, *form.update_backward(op, dx, dy, x, h, tensors, needs[1:])


def _direct(node: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``node.apply`` without its preparations for ``torch.func``, under which no node of this file runs."""
    apply: Callable[..., Any] = super(torch.autograd.Function, node).apply  # type: ignore[misc]
    return apply


_NODES = {
    "fused": _direct(_Fused),
    "hybrid": _direct(_Effective),
    "merged": _direct(_Effective),
    "separate": _direct(_Separate),
}


# What layers call --------------------------------------------------------------------------------------------------


def resolve_plan(
    op: Op, x: Tensor, weight: Tensor, parts: Parts | Tucker, plan: str, dropout: float, grad: bool
) -> str:
    """The plan that runs: ``plan`` itself, or for "auto" the cheapest by `flora.plan` of those that are possible.

    hybrid and merged need the same x for W and ΔW: with dropout hybrid becomes fused and merged becomes separate. Below
    float32, where W + s·ΔW is multiplied in float32, hybrid becomes fused, too. Where no learning parameter, nor W,
    needs x, fused keeps its h alone and the others x: there "auto" takes merged only if it is the cheapest of all, and
    fused for hybrid, preferring memory to a little time. A plan that the form cannot run becomes one that it can.
    """
    form, tensors = parts.form, parts.tensors
    there = form.runs(op, tensors)
    if plan == "auto":
        possible: tuple[str, ...] = DROPPING if dropout > 0 else NO_HYBRID if weight.dtype in _BELOW_FLOAT32 else PLANS
        if len(there) < len(PLANS):
            possible = tuple(p for p in possible if p in there or (p == "separate" and "merged" in there))
        plan = form.cheapest(op, x, weight, tensors, grad, possible)
        if plan == "hybrid" and grad and "fused" in there and not weight.requires_grad:
            learns = [t is not None and t.requires_grad for t in tensors]
            return plan if form.keeps_input(learns) else "fused"
        return plan
    if plan == "hybrid" and (dropout > 0 or weight.dtype in _BELOW_FLOAT32):
        plan = "fused"
    if plan not in there:
        plan = there[0]
    return "separate" if plan == "merged" and dropout > 0 else plan


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
        x, weight, bias = _autocast(x, weight, bias)  # type: ignore[assignment]
    form, tensors = parts.form, parts.tensors
    if _watched() or not takes(x, weight, bias, tensors):
        if x.layout is torch.strided and not x.is_nested:
            dropped = F.dropout(x, dropout) if dropout > 0 else x
            return _add_to(op.base(x, weight, bias), _twin(op, dropped, weight, form, tensors))
        if dropout == 0:  # sparse or nested: whatever the stock operation takes
            return op.base(x, effective_weight(weight, parts), bias)
        delta = delta_weight(weight, parts).to(weight.dtype)
        return op.base(x, weight, bias) + op.base(F.dropout(x, dropout), delta, None)
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
        return _separate(op, x, weight, bias, form, tensors, dropout, _seed())
    if plan == "fused":
        return form.update_(op, op.base(x, weight, bias), _dropped(x, dropout), tensors, want_h=False)[0]
    return _with_effective(op, x, weight, bias, form, tensors)


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
    (x,) = _autocast(x)  # type: ignore[assignment]
    form, tensors = parts.form, parts.tensors
    if _watched() or not takes(x, None, None, tensors):
        return _twin(op, F.dropout(x, dropout) if dropout > 0 else x, weight, form, tensors).to(x.dtype)
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
    with exact(weight.device.type):
        return _add_to(weight, form.delta(weight, tensors))


def delta_weight(weight: Tensor | None, parts: Parts | Tucker) -> Tensor:
    """s·ΔW alone, differentiable, in the parameters' dtype; ``weight`` may be None unless the form needs it."""
    form, tensors = parts.form, parts.tensors
    some = next(t for t in tensors if t is not None)
    if not _watched() and takes(some, None, None, tensors):
        out: Tensor = _Combined.apply(form, True, weight, *tensors)  # type: ignore[no-untyped-call]
        return out
    with exact(some.device.type):
        return form.delta(weight, tensors)


def embedding_update(ids: Tensor, weight: Tensor, parts: Parts | Tucker, padding_idx: int | None) -> Tensor:
    """The rows s·ΔW[ids]: ids (...) to (..., dim), in the parameters' dtype; that of ``padding_idx`` is left out."""
    with exact(ids.device.type):
        rows = parts.form.lookup(ids, weight, parts.tensors)
    return rows if padding_idx is None else rows.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
