"""The passes of each plan without autograd, which the nodes of `flora.functional` and the operators of `flora.library`
share. The plans are described in `flora.functional`; "plain" is the one for tensors that no kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flora.forms import Form, Parts, Tucker
from flora.forms.base import Gradients, Tensors
from flora.ops import Op
from flora.plan import DROPPING, NO_HYBRID, PLANS

BELOW_FLOAT32 = (torch.bfloat16, torch.float16)

NO_INPUT = (
    "create_graph (or a batched gradient) needs the layer's input, which is not kept while neither its factor nor the "
    "weight learns"
)
"""Why a backward that has to differentiate the twin cannot."""


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this device now, if it is on."""
    if device != "cpu" and not torch.amp.is_autocast_available(device):
        return None
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast would do to a stock call's arguments; the parameters keep theirs."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return (x, *rest)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *rest)
    )


def exact(device: str) -> AbstractContextManager[Any]:
    """A context in which the twins compute in the parameters' dtype, which autocast would narrow."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def add_to(y: Tensor, update: Tensor) -> Tensor:
    """y + update, rounded once to y's dtype."""
    return (y.to(update.dtype) + update).to(y.dtype)


def no_view(y: Tensor) -> Tensor:
    """A product's new output without the mark of a view, as which `F.linear` returns some: a node's output that has it
    cannot be written to, as an activation in place does."""
    return y.data if y._is_view() else y


def seed() -> int:
    return int(torch.randint(2**62, (), device="cpu"))


Layout = tuple[Sequence[int], Sequence[int], torch.dtype]


def layout(x: Tensor) -> Layout:
    """What a dropout mask is drawn by. Kept for backward, as a saved-tensor hook may return x with other strides."""
    return x.shape, x.stride(), x.dtype


def blank(layout: Layout, device: torch.device | str = "cpu") -> Tensor:
    shape, stride, dtype = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def twin_grads(
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


# Which plan --------------------------------------------------------------------------------------------------------


def resolve_plan(op: Op, x: Any, weight: Tensor, parts: Parts | Tucker, plan: str, dropout: float, grad: bool) -> str:
    """The plan that runs: ``plan`` itself, or for "auto" the cheapest by `flora.plan` of those that are possible.

    hybrid and merged need the same x for W and ΔW: with dropout hybrid becomes fused and merged becomes separate. Below
    float32, where W + s·ΔW is multiplied in float32, hybrid becomes fused, too. Where no learning parameter, nor W,
    needs x, fused keeps its h alone and the others x: there "auto" takes merged only if it is the cheapest of all, and
    fused for hybrid, preferring memory to a little time. A plan that the form cannot run becomes one that it can.
    """
    form, tensors = parts.form, parts.tensors
    there = form.runs(op, tensors)
    if plan == "auto":
        possible: tuple[str, ...] = DROPPING if dropout > 0 else NO_HYBRID if weight.dtype in BELOW_FLOAT32 else PLANS
        if len(there) < len(PLANS):
            possible = tuple(p for p in possible if p in there or (p == "separate" and "merged" in there))
        plan = form.cheapest(op, x, weight, tensors, grad, possible)
        if plan == "hybrid" and grad and "fused" in there and not weight.requires_grad:
            learns = [t is not None and t.requires_grad for t in tensors]
            return plan if form.keeps_input(learns) else "fused"
        return plan
    if plan == "hybrid" and (dropout > 0 or weight.dtype in BELOW_FLOAT32):
        plan = "fused"
    if plan not in there:
        plan = there[0]
    return "separate" if plan == "merged" and dropout > 0 else plan


# fused -------------------------------------------------------------------------------------------------------------


def fused_backward(
    op: Op,
    form: Form,
    needs: Sequence[bool],
    dy: Tensor,
    x: Tensor | None,
    like: Tensor,
    weight: Tensor,
    h: Tensor | None,
    tensors: Tensors,
    kept: Tensor | None,
) -> Gradients:
    """Gradients of (x, weight, bias, *tensors). ``like`` has x's shape and layout, x itself may be None where neither a
    learning tensor nor W needs it; ``kept`` is what dropout multiplied x by."""
    dx, dw, db = op.base_backward(dy, like, weight, needs[:3])
    dw = None if dw is None else dw.to(weight.dtype)
    if dx is None and not any(needs[3:]):
        return dx, dw, db, *[None] * len(needs[3:])
    if kept is None:
        dx = None if dx is None else op.writable(dx)
        return dx, dw, db, *form.update_backward(op, dx, dy, x, h, tensors, needs[3:])
    d_dropped = None if dx is None else torch.zeros_like(like, memory_format=torch.contiguous_format)
    dropped = None if x is None else x * kept
    d_tensors = form.update_backward(op, d_dropped, dy, dropped, h, tensors, needs[3:])
    if dx is not None and d_dropped is not None:
        dx = dx + d_dropped * kept
    return dx, dw, db, *d_tensors


# hybrid and merged -------------------------------------------------------------------------------------------------


def with_effective(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, tensors: Tensors) -> Tensor:
    """op(x, W + s·ΔW, b); below float32 computed in float32, so that nothing is rounded but the result."""
    if weight.dtype not in BELOW_FLOAT32:
        return op.base(x, form.effective(weight, tensors), bias)
    with exact("cpu"):
        effective = form.effective(weight.float(), tensors)
        return op.base(x.float(), effective, None if bias is None else bias.float()).to(x.dtype)


def effective_backward(
    op: Op,
    form: Form,
    hybrid: bool,
    needs: Sequence[bool],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    tensors: Tensors,
) -> Gradients:
    """Gradients of (x, weight, bias, *tensors)."""
    effective = form.effective(weight, tensors) if needs[0] else weight
    of_delta = any(needs[3:])
    formed = needs[1] or (of_delta and not hybrid)
    dx, dw, db = op.base_backward(dy, x, effective, (needs[0], formed, needs[2]))
    if not of_delta:
        d_tensors: Gradients = (None,) * len(needs[3:])
    elif hybrid:
        d_tensors = form.gradients(op, dy, x, weight, tensors, needs[3:])
    else:
        d_tensors = form.project(dw, weight, tensors, needs[3:])  # type: ignore[arg-type]
    d_weight = form.base_gradient(dw, tensors).to(weight.dtype) if needs[1] and dw is not None else None
    return dx, d_weight, db, *d_tensors


# separate ----------------------------------------------------------------------------------------------------------


def separate(
    op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, tensors: Tensors, kept: Tensor
) -> Tensor:
    """op(x, W, b) + op(x·kept, s·ΔW)."""
    dropped = x * kept
    delta = form.alone(weight, tensors)
    with exact("cpu"):
        added = op.base(dropped.to(delta.dtype), delta, None)
    return add_to(op.base(x, weight, bias), added)


def separate_backward(
    op: Op,
    form: Form,
    needs: Sequence[bool],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    tensors: Tensors,
    kept: Tensor,
) -> Gradients:
    """Gradients of (x, weight, bias, *tensors)."""
    dx, dw, db = op.base_backward(dy, x, weight, needs[:3])
    of_delta = any(needs[3:]) or (needs[1] and form.of_weight)
    delta = form.alone(weight, tensors)
    wanted = (needs[0], of_delta, False)
    d_dropped, d_delta, _ = op.base_backward(dy.to(delta.dtype), (x * kept).to(delta.dtype), delta, wanted)
    if dx is not None and d_dropped is not None:
        dx = add_to(dx, d_dropped * kept)
    if dw is not None and form.of_weight and d_delta is not None:
        dw = dw + (form.base_gradient(d_delta, tensors) - d_delta)
    d_tensors: Gradients = (None,) * len(needs[3:])
    if of_delta:
        d_tensors = form.project(d_delta, weight, tensors, needs[3:])  # type: ignore[arg-type]
    return dx, None if dw is None else dw.to(weight.dtype), db, *d_tensors


# The weight alone --------------------------------------------------------------------------------------------------


def weight_backward(
    form: Form, alone: bool, needs: Sequence[bool], dw: Tensor, weight: Tensor | None, tensors: Tensors
) -> Gradients:
    """Gradients of (W, *tensors) from that of W + s·ΔW, or of s·ΔW ``alone``."""
    d_weight = dw if needs[0] and not alone else None
    if needs[0] and form.of_weight:
        through = form.base_gradient(dw, tensors) - dw
        d_weight = through if d_weight is None else d_weight + through
    return d_weight, *form.project(dw, weight, tensors, needs[1:])


# Plain PyTorch -----------------------------------------------------------------------------------------------------


def twin(op: Op, x: Tensor, weight: Tensor | None, form: Form, tensors: Tensors) -> Tensor:
    """s·ΔW·x in plain PyTorch: in the parameters' dtype, or in x's where the form takes half precision there."""
    with exact(x.device.type):
        return form.twin(op, x, weight, form.narrowed(tensors, x))


def plain(
    op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, form: Form, tensors: Tensors, kept: Tensor | None
) -> Tensor:
    """op(x, W, b) + s·ΔW·x·kept in plain PyTorch operations."""
    return add_to(op.base(x, weight, bias), twin(op, x if kept is None else x * kept, weight, form, tensors))


def plain_backward(
    op: Op,
    form: Form,
    needs: Sequence[bool],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    tensors: Tensors,
    kept: Tensor | None,
) -> Gradients:
    """Gradients of (x, weight, bias, *tensors) of `plain`, whose update is computed a second time; grad mode is off.

    Without a weight those of the update alone.
    """
    dx = dw = db = None
    if weight is not None:
        dx, dw, db = op.base_backward(dy, x, weight, needs[:3])
        dw = None if dw is None else dw.to(weight.dtype)
    of_weight = needs[1] and form.of_weight

    def build(x: Tensor, weight: Tensor | None, *tensors: Tensor | None) -> Tensor:
        return twin(op, x if kept is None else x * kept, weight, form, tensors)

    wanted = (needs[0], of_weight, *needs[3:])
    d_x, d_weight, *d_tensors = twin_grads(build, (x, weight, *tensors), wanted, dy)
    if d_x is not None:
        dx = d_x if dx is None else dx.add_(d_x)
    if dw is not None and d_weight is not None:
        dw = dw.add_(d_weight)
    return dx, dw, db, *d_tensors


__all__ = [
    "BELOW_FLOAT32",
    "NO_INPUT",
    "Layout",
    "add_to",
    "autocast",
    "autocast_dtype",
    "blank",
    "effective_backward",
    "exact",
    "fused_backward",
    "layout",
    "no_view",
    "plain",
    "plain_backward",
    "resolve_plan",
    "seed",
    "separate",
    "separate_backward",
    "twin",
    "twin_grads",
    "weight_backward",
    "with_effective",
]
