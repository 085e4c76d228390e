"""How an adapted layer computes: plans, dispatch and autograd, over any stock operation of `flora.ops`.

fused
    y = op(x, W), then y += s·ΔW·x through the factors, in place; the same for dx. One autograd node keeps x and h.
hybrid
    W' = W + s·ΔW for the moment, y = op(x, W'); in backward W' is built again and the factor gradients are the skinny
    products of the fused plan. Nothing of the weight's size is kept.
merged
    as hybrid, but the weight gradient itself is formed and projected on core and factors.
separate
    y = op(x, W) + op(dropout(x), s·ΔW): what merged becomes when x is dropped.

Where the C kernels cannot go (other devices, tensor subclasses, ``torch.func``, tracing, forward-mode AD) the same
algebra runs in plain PyTorch operations from `flora.reference`. Source of the algebra: FLoRA, arXiv 2405.14739, and
docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from flora import reference
from flora.ops import Op, Tucker, dropout_factor, info, project, reconstruct, takes, zero_output
from flora.plan import DROPPING, NO_HYBRID, PLANS

__all__ = [
    "Tucker",
    "adapted",
    "compute_dtype",
    "effective_weight",
    "embedding_update",
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
    """y = op(x, W, b) + s·ΔW·x through the factors.

    Keeps h, and x if the input's factor or W learns. A dropout mask is drawn again from its seed, never kept.
    """

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
        needs = ctx.needs_input_grad
        ctx.op, ctx.scale, ctx.dropout = op, scale, dropout
        dropped = x
        if dropout > 0:
            ctx.seed = _seed()
            dropped = x * dropout_factor(x, dropout, ctx.seed)
        y, h = op.update_(op.base(x, weight, bias), dropped, Tucker(core, factors, scale), want_h=any(needs[6:]))
        of_input = needs[4] or needs[8]  # W; factors[1], the input's
        ctx.x_like = None if of_input and dropout == 0 else _layout(x)
        ctx.save_for_backward(x if of_input else None, weight, bias if needs[5] else None, h, core, *factors)
        return y

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        source, weight, bias, h, core, *factors = ctx.saved_tensors
        op, tucker, needs = ctx.op, Tucker(core, tuple(factors), ctx.scale), ctx.needs_input_grad[3:]
        by_twin = _by_twin(dy)
        if source is None and by_twin:
            raise RuntimeError(
                "create_graph (or a batched gradient) needs the layer's input, which is not kept while neither its "
                "factor nor the weight learns"
            )
        kept = dropout_factor(_blank(ctx.x_like), ctx.dropout, ctx.seed) if ctx.dropout > 0 else None
        x = _blank(ctx.x_like) if source is None else source  # a blank's shape and layout are all that matters
        if by_twin:

            def twin(x: Tensor, weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
                delta = op.twin(x if kept is None else x * kept, Tucker(parts[0], parts[1:], ctx.scale))
                return _add_to(op.base(x, weight, bias), delta)

            return None, None, None, *_twin_grads(twin, (x, weight, bias, core, *factors), needs, dy)
        dx, dw, db = op.base_backward(dy, x, weight, needs[:3])
        dw = None if dw is None else dw.to(weight.dtype)
        if dx is None and not any(needs[3:]):
            return None, None, None, dx, dw, db, *[None] * len(needs[3:])
        if kept is None:
            dx = None if dx is None else op.writable(dx)
            return None, None, None, dx, dw, db, *op.update_backward(dx, dy, source, h, tucker, needs[3:])
        d_dropped = None if dx is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
        dropped = None if source is None else source * kept
        d_parts = op.update_backward(d_dropped, dy, dropped, h, tucker, needs[3:])
        if dx is not None and d_dropped is not None:
            dx = dx + d_dropped * kept
        return None, None, None, dx, dw, db, *d_parts


_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def _layout(x: Tensor) -> _Layout:
    """What a dropout mask is drawn by. Kept for backward, as a saved-tensor hook may return x with other strides."""
    return x.shape, x.stride(), x.dtype


def _blank(layout: _Layout) -> Tensor:
    shape, stride, dtype = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")


def _seed() -> int:
    return int(torch.randint(2**62, (), device="cpu"))


def _dropped(x: Tensor, dropout: float) -> Tensor:
    """Dropout on a tensor that C may see: one stream of masks, with gradients and without."""
    return x * dropout_factor(x, dropout, _seed()) if dropout > 0 else x


def _with_effective(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, tucker: Tucker) -> Tensor:
    """op(x, W + s·ΔW, b); below float32 computed in float32, so that nothing is rounded but the result."""
    if weight.dtype not in _BELOW_FLOAT32:
        return op.base(x, reconstruct(weight, tucker), bias)
    with _exact("cpu"):
        effective = reconstruct(weight.float(), tucker)
        return op.base(x.float(), effective, None if bias is None else bias.float()).to(x.dtype)


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
        return _with_effective(op, x, weight, bias, Tucker(core, factors, scale))

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, core, *factors = ctx.saved_tensors
        tucker = Tucker(core, tuple(factors), ctx.scale)
        needs = ctx.needs_input_grad[3:]
        if _by_twin(dy):

            def twin(x: Tensor, weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
                delta = reference.reconstruct(parts[0], parts[1:], ctx.scale)
                y: Tensor = ctx.op.base(x, _add_to(weight, delta), bias)
                return y

            return None, None, None, *_twin_grads(twin, (x, weight, bias, core, *factors), needs, dy)
        effective = reconstruct(weight, tucker) if needs[0] else weight
        of_delta = any(needs[3:])
        form = needs[1] or (of_delta and not ctx.hybrid)
        dx, dw, db = ctx.op.base_backward(dy, x, effective, (needs[0], form, needs[2]))
        if not of_delta:
            parts: tuple[Tensor | None, ...] = (None,) * len(needs[3:])
        elif ctx.hybrid:
            parts = ctx.op.update_backward(None, dy, x, None, tucker, needs[3:])
        else:
            parts = project(dw, tucker, needs[3:])
        return None, None, None, dx, dw.to(weight.dtype) if needs[1] and dw is not None else None, db, *parts


class _Separate(torch.autograd.Function):
    """y = op(x, W, b) + op(dropout(x), s·ΔW), the second in the factors' dtype.

    Keeps x alone: the mask is drawn again from its seed, s·ΔW built again.
    """

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
        ctx.op, ctx.scale, ctx.dropout, ctx.seed, ctx.x_like = op, scale, dropout, _seed(), _layout(x)
        ctx.save_for_backward(x, weight, bias if ctx.needs_input_grad[5] else None, core, *factors)
        return _separate(op, x, weight, bias, Tucker(core, factors, scale), dropout, ctx.seed)

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, core, *factors = ctx.saved_tensors
        op, tucker, needs = ctx.op, Tucker(core, tuple(factors), ctx.scale), ctx.needs_input_grad[3:]
        kept = dropout_factor(_blank(ctx.x_like), ctx.dropout, ctx.seed)
        if _by_twin(dy):

            def twin(x: Tensor, weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
                delta = reference.reconstruct(parts[0], parts[1:], ctx.scale)
                return _add_to(op.base(x, weight, bias), op.base((x * kept).to(delta.dtype), delta, None))

            return None, None, None, *_twin_grads(twin, (x, weight, bias, core, *factors), needs, dy)
        dx, dw, db = op.base_backward(dy, x, weight, needs[:3])
        of_delta = any(needs[3:])
        delta = reconstruct(None, tucker)
        wanted = (needs[0], of_delta, False)
        d_dropped, d_delta, _ = op.base_backward(dy.to(delta.dtype), (x * kept).to(delta.dtype), delta, wanted)
        if dx is not None:
            dx = _add_to(dx, d_dropped * kept)
        parts = project(d_delta, tucker, needs[3:]) if of_delta else (None,) * len(needs[3:])
        return None, None, None, dx, None if dw is None else dw.to(weight.dtype), db, *parts


def _separate(
    op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, tucker: Tucker, dropout: float, seed: int
) -> Tensor:
    dropped = x * dropout_factor(x, dropout, seed)
    delta = reconstruct(None, tucker)
    with _exact("cpu"):
        added = op.base(dropped.to(delta.dtype), delta, None)
    return _add_to(op.base(x, weight, bias), added)


class _Reconstruct(torch.autograd.Function):
    """W' = W + s·ΔW, or s·ΔW alone where W is None."""

    @staticmethod
    def forward(ctx: Any, scale: float, weight: Tensor | None, core: Tensor, *factors: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(core, *factors)
        return reconstruct(weight, Tucker(core, factors, scale))

    @staticmethod
    @_exactly
    def backward(ctx: Any, dw: Tensor) -> Any:
        core, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if _by_twin(dw):

            def twin(*parts: Tensor) -> Tensor:
                return reference.reconstruct(parts[0], parts[1:], ctx.scale)

            return None, dw if needs[0] else None, *_twin_grads(twin, (core, *factors), needs[1:], dw)
        parts = project(dw, Tucker(core, tuple(factors), ctx.scale), needs[1:])
        return None, dw if needs[0] else None, *parts


class _Update(torch.autograd.Function):
    """s·ΔW·x alone, through the factors, in x's dtype."""

    @staticmethod
    def forward(ctx: Any, op: Op, scale: float, x: Tensor, core: Tensor, *factors: Tensor) -> Tensor:
        tucker = Tucker(core, factors, scale)
        y, h = op.update_(zero_output(op, x, factors), x, tucker, want_h=True)
        ctx.op, ctx.scale = op, scale
        ctx.save_for_backward(x, h, core, *factors)
        return y

    @staticmethod
    @_exactly
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, h, core, *factors = ctx.saved_tensors
        tucker = Tucker(core, tuple(factors), ctx.scale)
        needs = ctx.needs_input_grad[2:]
        if _by_twin(dy):

            def twin(x: Tensor, *parts: Tensor) -> Tensor:
                update: Tensor = ctx.op.twin(x, Tucker(parts[0], parts[1:], ctx.scale))
                return update.to(x.dtype)

            return None, None, *_twin_grads(twin, (x, core, *factors), needs, dy)
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        return None, None, dx, *ctx.op.update_backward(dx, dy, x, h, tucker, needs[1:])


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


def resolve_plan(op: Op, x: Tensor, weight: Tensor, tucker: Tucker, plan: str, dropout: float, grad: bool) -> str:
    """The plan that runs: ``plan`` itself, or for "auto" the cheapest by `flora.plan` of those that are possible.

    hybrid and merged need the same x for W and ΔW: with dropout hybrid becomes fused and merged becomes separate. Below
    float32, where W + s·ΔW is multiplied in float32, hybrid becomes fused, too. Where neither the input's factor nor W
    learns, fused keeps h alone and the others x: there "auto" takes merged only if it is the cheapest of all, and fused
    for hybrid, preferring memory to a little time.
    """
    if plan == "auto":
        possible = DROPPING if dropout > 0 else NO_HYBRID if weight.dtype in _BELOW_FLOAT32 else PLANS
        plan = op.plan(x, weight, tucker.core, grad, possible)
        if plan == "hybrid" and grad and not (weight.requires_grad or tucker.factors[1].requires_grad):
            return "fused"
        return plan
    if plan == "hybrid" and (dropout > 0 or weight.dtype in _BELOW_FLOAT32):
        return "fused"
    return "separate" if plan == "merged" and dropout > 0 else plan


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
    if not x.is_cpu or torch.is_autocast_enabled("cpu"):
        x, weight, bias = _autocast(x, weight, bias)  # type: ignore[assignment]
    core, factors, scale = tucker
    if _watched() or not takes(x, weight, bias, (core, *factors)):
        if x.layout is torch.strided and not x.is_nested:
            return _add_to(op.base(x, weight, bias), _twin(op, F.dropout(x, dropout) if dropout > 0 else x, tucker))
        if dropout == 0:  # sparse or nested: whatever the stock operation takes
            return op.base(x, effective_weight(weight, tucker), bias)
        delta = effective_weight(None, tucker).to(weight.dtype)
        return op.base(x, weight, bias) + op.base(F.dropout(x, dropout), delta, None)
    grad = torch.is_grad_enabled() and (
        core.requires_grad
        or x.requires_grad
        or weight.requires_grad
        or any(f.requires_grad for f in factors)
        or (bias is not None and bias.requires_grad)
    )
    plan = resolve_plan(op, x, weight, tucker, plan, dropout, grad)
    if grad:
        apply, option = _NODES[plan], dropout if plan in ("fused", "separate") else plan == "hybrid"
        out: Tensor = apply(op, scale, option, x, weight, bias, core, *factors)
        return out
    if plan == "separate":
        return _separate(op, x, weight, bias, tucker, dropout, _seed())
    if plan == "fused":
        return op.update_(op.base(x, weight, bias), _dropped(x, dropout), tucker, want_h=False)[0]
    return _with_effective(op, x, weight, bias, tucker)


def update(op: Op, x: Tensor, tucker: Tucker, *, dropout: float = 0.0) -> Tensor:
    """s·ΔW·dropout(x) alone, of the stock operation's output shape and x's dtype: for bases that hide their weight."""
    (x,) = _autocast(x)  # type: ignore[assignment]
    if _watched() or not takes(x, None, None, (tucker.core, *tucker.factors)):
        return _twin(op, F.dropout(x, dropout) if dropout > 0 else x, tucker).to(x.dtype)
    x = _dropped(x, dropout)
    if torch.is_grad_enabled():
        out: Tensor = _Update.apply(op, tucker.scale, x, tucker.core, *tucker.factors)  # type: ignore[no-untyped-call]
        return out
    return op.update_(zero_output(op, x, tucker.factors), x, tucker, want_h=False)[0]


def effective_weight(weight: Tensor | None, tucker: Tucker) -> Tensor:
    """W + s·ΔW (d_out, d_in/groups, *k), differentiable, in W's dtype; for None s·ΔW alone in the factors' dtype."""
    if not _watched() and takes(tucker.core if weight is None else weight, None, None, (tucker.core, *tucker.factors)):
        out: Tensor = _Reconstruct.apply(  # type: ignore[no-untyped-call]
            tucker.scale, weight, tucker.core, *tucker.factors
        )
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
    with _exact(ids.device.type):
        return tucker.scale * (rows @ tucker.core @ u_dim.mT)
