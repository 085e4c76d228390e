"""``torch.ops.flora``: what `flora.functional` becomes where operators are traced, not run.

Four operators are for use, and are what ``torch.compile`` and ``torch.export`` show of an adapted layer:

``flora::adapted``
    op(x, W, b) + s·ΔW·dropout(x). Without ``stride`` op is `torch.nn.functional.linear`, else the convolution of W's
    dimensions, whose ``padding`` holds (before, after) of each spatial mode.
``flora::update``
    s·ΔW·dropout(x) alone; ``shape`` is the weight's, which may be None unless the form needs it.
``flora::effective_weight``, ``flora::delta_weight``
    W + s·ΔW, and s·ΔW.

A delta is given by the name of its form (`flora.forms.FORMS`), its scale and the form's tensors: ``parameters`` holds
those that there are, ``given`` says of each one whether it is there. So a new method needs no operator of its own.

The first two are no more than a choice: they cast as autocast would, take the cheapest plan for the sizes that the
compiler expects, draw the seed of the dropout mask, and call ``flora::adapted_forward``, which has a backward,
``flora::adapted_backward``. All are functional. On a CPU they run the C kernels, elsewhere the same algebra in PyTorch.
Under ``torch.func`` everything is plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey
from torch.autograd import forward_ad

from flora.forms import FORMS, Form, Parts
from flora.forms.base import Tensors
from flora.ops import LINEAR, ConvOp, Op, dropout_factor
from flora.passes import (
    NO_INPUT,
    add_to,
    autocast,
    blank,
    effective_backward,
    exact,
    fused_backward,
    no_view,
    plain,
    plain_backward,
    resolve_plan,
    separate,
    separate_backward,
    twin,
    twin_grads,
    weight_backward,
    with_effective,
)

_FLORA: Any = torch.library.Library("flora", "DEF")  # type: ignore[no-untyped-call]
_DELTA = "Tensor[] parameters, bool[] given, str form, float scale"
_OPERATION = "int[] stride, int[] padding, int[] dilation, int groups, str padding_mode"
_ITS_DEFAULT = 'int[] stride=[], int[] padding=[], int[] dilation=[], int groups=1, str padding_mode="zeros"'

_FLORA.define(
    f"adapted(Tensor x, Tensor weight, Tensor? bias, {_DELTA}, {_ITS_DEFAULT}, "
    'str plan="auto", float dropout=0.0) -> Tensor'
)
_FLORA.define(
    f"update(Tensor x, Tensor? weight, SymInt[] shape, {_DELTA}, {_ITS_DEFAULT}, float dropout=0.0) -> Tensor"
)
_FLORA.define(f"effective_weight(Tensor weight, {_DELTA}) -> Tensor")
_FLORA.define(f"delta_weight(Tensor? weight, SymInt[] shape, {_DELTA}) -> Tensor")
_FLORA.define(
    f"adapted_forward(Tensor x, Tensor? weight, Tensor? bias, SymInt[] shape, {_DELTA}, {_OPERATION}, "
    "str plan, float dropout, Tensor? seed, bool keep) -> (Tensor y, Tensor h)"
)
_FLORA.define(
    f"adapted_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? h, SymInt[] shape, {_DELTA}, {_OPERATION}, "
    "str plan, float dropout, Tensor? seed, SymInt[] x_size, SymInt[] x_stride, bool[] needs) -> Tensor[]"
)
_FLORA.define(
    f"weight_backward(Tensor dw, Tensor? weight, SymInt[] shape, {_DELTA}, bool alone, bool[] needs) -> Tensor[]"
)


# What functional calls ---------------------------------------------------------------------------------------------


def knows(form: Form, x: Tensor, weight: Tensor | None, bias: Tensor | None, tensors: Tensors) -> bool:
    """Whether there are operators for this form, and kernels for these dtypes and layouts."""
    if FORMS.get(form.name) is not type(form) or x.layout is not torch.strided or x.is_nested or x.ndim == 0:
        return False
    same = all(t is None or t.dtype == x.dtype for t in (weight, bias))
    return same and _kernels(x, tensors)


def adapted(
    op: Op,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: Form,
    tensors: Tensors,
    plan: str,
    dropout: float,
) -> Tensor:
    """`flora.functional.adapted` as an operator."""
    y: Tensor = torch.ops.flora.adapted(x, weight, bias, *_encoded(form, tensors), *_operation(op), plan, dropout)
    return y


def update(
    op: Op, x: Tensor, weight: Tensor | None, shape: tuple[int, ...], form: Form, tensors: Tensors, dropout: float
) -> Tensor:
    """`flora.functional.update` as an operator."""
    weight = weight if form.of_weight else None
    y: Tensor = torch.ops.flora.update(x, weight, shape, *_encoded(form, tensors), *_operation(op), dropout)
    return y


def effective_weight(weight: Tensor, form: Form, tensors: Tensors) -> Tensor:
    """`flora.functional.effective_weight` as an operator."""
    w: Tensor = torch.ops.flora.effective_weight(weight, *_encoded(form, tensors))
    return w


def delta_weight(weight: Tensor | None, shape: tuple[int, ...], form: Form, tensors: Tensors) -> Tensor:
    """`flora.functional.delta_weight` as an operator."""
    w: Tensor = torch.ops.flora.delta_weight(weight if form.of_weight else None, shape, *_encoded(form, tensors))
    return w


def _encoded(form: Form, tensors: Tensors) -> tuple[list[Tensor], list[bool], str, float]:
    return [t for t in tensors if t is not None], [t is not None for t in tensors], form.name, form.scale


def _operation(op: Op) -> tuple[Sequence[int], Sequence[int], Sequence[int], int, str]:
    return tuple(op) if isinstance(op, ConvOp) else ((), (), (), 1, "zeros")  # type: ignore[return-value]


# What an operator is given -----------------------------------------------------------------------------------------


@dataclass
class _Call:
    """An operator's arguments as the passes take them."""

    op: Op
    form: Form
    tensors: list[Tensor | None]
    linear: bool

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        parameters: Sequence[Tensor],
        given: Sequence[bool],
        form: str,
        scale: float,
        stride: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilation: Sequence[int] = (),
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> _Call:
        if form not in FORMS:
            raise ValueError(f"flora has no form {form!r}; there are {sorted(FORMS)}")
        if sum(given) != len(parameters):
            raise ValueError(f"given says that there are {sum(given)} parameters, there are {len(parameters)}")
        places = FORMS[form].places(len(shape))
        if len(given) != places:
            raise ValueError(
                f"a {form} delta of a weight of {len(shape)} modes has {places} parameters, and given={list(given)} "
                f"is for {len(given)}"
            )
        tensors = _spread(parameters, given)
        op: Op = LINEAR
        if stride:
            op = ConvOp(tuple(stride), tuple(padding), tuple(dilation), groups, padding_mode)
        return cls(op, FORMS[form].of(scale, tuple(shape), tensors), tensors, not stride)

    def rows(self, t: Tensor | None) -> Tensor | None:
        """A linear layer's x, y and their gradients as rows (n, d), which is how the passes keep them."""
        return t.reshape(-1, t.shape[-1]) if self.linear and t is not None else t

    def kept(self, x: Tensor, y: Tensor, plan: str, keep: bool) -> Sequence[int] | None:
        """The shape of h, which the forward keeps for backward beside x; None if there is none."""
        if not keep or plan not in ("fused", "update") or not _kernels(x, self.tensors):
            return None
        of_x, of_y = self.rows(x), self.rows(y)
        assert of_x is not None and of_y is not None
        return self.form.kept(self.op, of_x, of_y, self.tensors)

    def base(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
        """What the update is added to: the base's output, or zeros."""
        if weight is None:
            return self.op.empty_output(x, shape[0], tuple(shape[2:]))
        y: Tensor = self.op.base(x, weight, bias)
        return y


def _spread(values: Sequence[Any], given: Sequence[bool], nothing: Any = None) -> list[Any]:
    """The values in the places that are given, ``nothing`` in the others."""
    found = iter(values)
    return [next(found) if there else nothing for there in given]


def _kernels(x: Tensor, tensors: Tensors) -> bool:
    """Whether C computes: an answer that a FakeTensor gives, too."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    known = x.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return known and x.device.type == "cpu" and all(t is None or t.dtype == wide for t in tensors)


def _transformed() -> bool:
    """Whether ``torch.func`` or forward-mode AD wants the operations themselves."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0 or forward_ad._current_level >= 0


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """No graph and no autocast; but a graph of one's own may be built inside, which PyTorch forbids its operators."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(DispatchKey, key))
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded),
        torch.no_grad(),
        exact(device.type),
    ):
        yield


def _memory_format(*tensors: Tensor | None) -> torch.memory_format:
    """That of a convolution's output: channels last if one of its inputs is."""
    for t in tensors:
        if t is not None and t.ndim in (4, 5) and not t.is_contiguous():
            last = torch.channels_last if t.ndim == 4 else torch.channels_last_3d
            if t.is_contiguous(memory_format=last):
                return last
    return torch.contiguous_format


def _laid(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient in the layout that its operator's fake has promised."""
    if gradient is None:
        return torch.zeros_like(like)
    if gradient.stride() == like.stride() and gradient.dtype == like.dtype:
        return gradient
    return torch.empty_like(like).copy_(gradient)


# The choice --------------------------------------------------------------------------------------------------------


@dataclass
class _Expected:
    """A tensor of the sizes that a compiler expects: what the cost model asks for."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize


def _expected(t: Tensor) -> Any:
    return _Expected(torch.Size(_hint(n) for n in t.shape), t.dtype, t.requires_grad)


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    from torch.fx.experimental.symbolic_shapes import optimization_hint  # slow to import, and there by then

    return optimization_hint(size, fallback=1024)


def _seed(dropout: float) -> Tensor | None:
    return torch.randint(2**62, (), device="cpu") if dropout > 0 else None


def _adapted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parameters: Sequence[Tensor],
    given: Sequence[bool],
    form: str,
    scale: float,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
    groups: int = 1,
    padding_mode: str = "zeros",
    plan: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    encoded = (parameters, given, form, scale, stride, padding, dilation, groups, padding_mode)
    call = _Call.of(weight.shape, *encoded)
    if _transformed():
        dropped = F.dropout(x, dropout) if dropout > 0 else x
        return add_to(call.op.base(x, weight, bias), twin(call.op, dropped, weight, call.form, call.tensors))
    learns = [t is not None and t.requires_grad for t in (x, weight, bias, *parameters)]
    grad = torch.is_grad_enabled() and any(learns)
    like = _expected(weight)
    hinted = _Call.of(like.shape, [_expected(t) for t in parameters], *encoded[1:])
    parts = Parts(hinted.form, tuple(hinted.tensors))
    plan = resolve_plan(call.op, _expected(x), like, parts, plan, dropout, grad)
    keep = grad and any(learns[3:])
    y: Tensor
    y, _ = torch.ops.flora.adapted_forward(x, weight, bias, weight.shape, *encoded, plan, dropout, _seed(dropout), keep)
    return y


def _update(
    x: Tensor,
    weight: Tensor | None,
    shape: Sequence[int],
    parameters: Sequence[Tensor],
    given: Sequence[bool],
    form: str,
    scale: float,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
    groups: int = 1,
    padding_mode: str = "zeros",
    dropout: float = 0.0,
) -> Tensor:
    (x,) = autocast(x)  # type: ignore[assignment]
    encoded = (parameters, given, form, scale, stride, padding, dilation, groups, padding_mode)
    call = _Call.of(shape, *encoded)
    y: Tensor
    if not _transformed() and "fused" in call.form.runs(call.op, call.tensors):
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in parameters)
        y, _ = torch.ops.flora.adapted_forward(x, None, None, shape, *encoded, "update", dropout, _seed(dropout), keep)
        return y
    dropped = F.dropout(x, dropout) if dropout > 0 else x
    return twin(call.op, dropped, weight, call.form, call.tensors).to(x.dtype)


# Forward and backward ----------------------------------------------------------------------------------------------


def _kept(call: _Call, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor | None:
    """What dropout multiplies x by, drawn in x's layout."""
    return None if seed is None else call.rows(dropout_factor(x, dropout, int(seed)))


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    *encoded: Any,
) -> tuple[Tensor, Tensor]:
    *encoded, plan, dropout, seed, keep = encoded  # type: ignore[assignment]
    call = _Call.of(shape, *encoded)
    op, form, tensors = call.op, call.form, call.tensors
    given, h = x.resolve_neg(), None
    with _alone(x.device):
        kept = _kept(call, given, dropout, seed)
        x = call.rows(given)  # type: ignore[assignment]
        if not _kernels(x, tensors):
            dropped = x if kept is None else x * kept
            y = twin(op, dropped, weight, form, tensors)
            y = y.to(x.dtype) if weight is None else add_to(op.base(x, weight, bias), y)
        elif plan in ("fused", "update"):
            base = call.base(x, weight, bias, shape)
            y, h = form.update_(op, base, x if kept is None else x * kept, tensors, want_h=keep)
        elif plan == "separate":
            assert weight is not None and kept is not None
            y = separate(op, x, weight, bias, form, tensors, kept)
        else:
            assert weight is not None
            y = with_effective(op, x, weight, bias, form, tensors)
        y = y.view(*given.shape[:-1], shape[0]) if call.linear else y
        y = y.contiguous(memory_format=_memory_format(given, weight))
        return no_view(y), tensors_like(x, tensors) if h is None else h


def tensors_like(x: Tensor, tensors: Tensors) -> Tensor:
    """Nothing, in the tensors' dtype."""
    some: Tensor = next(t for t in tensors if t is not None)
    return x.new_empty(0, dtype=some.dtype)


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], *encoded: Any
) -> tuple[Tensor, Tensor]:
    *encoded, plan, _, _, keep = encoded  # type: ignore[assignment]
    call = _Call.of(shape, *encoded)
    y = call.base(x, weight, bias, shape).to(x.dtype)
    y = torch.empty_like(y, memory_format=_memory_format(x, weight))
    extents = call.kept(x, y, plan, keep)
    nothing = tensors_like(x, call.tensors)
    return y, nothing if extents is None else nothing.new_empty(extents)


def _backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, shape: Sequence[int], *encoded: Any
) -> list[Tensor]:
    *encoded, plan, dropout, seed, size, stride, needs = encoded  # type: ignore[assignment]
    call = _Call.of(shape, *encoded)
    op, form, tensors = call.op, call.form, call.tensors
    needs = [*needs[:3], *_spread(needs[3:], encoded[1], False)]
    given, dy = dy, dy.resolve_neg()
    with _alone(dy.device):
        like = blank((size, stride, dy.dtype), dy.device) if x is None else x.resolve_neg()
        kept = _kept(call, like, dropout, seed)
        like, dy = call.rows(like), call.rows(dy)  # type: ignore[assignment]
        source = None if x is None else like
        if not _kernels(dy, tensors):
            assert source is not None
            found = plain_backward(op, form, needs, dy, source, weight, tensors, kept)
        elif plan == "update":
            assert source is not None
            dx = torch.zeros_like(like, memory_format=torch.contiguous_format) if needs[0] else None
            dropped = source if kept is None else source * kept
            learned = form.update_backward(op, dx, dy, dropped, h, tensors, needs[3:])
            found = (dx if dx is None or kept is None else dx * kept, None, None, *learned)
        else:
            assert weight is not None
            if plan == "fused":
                found = fused_backward(op, form, needs, dy, source, like, weight, h, tensors, kept)
            elif plan == "separate":
                assert source is not None and kept is not None
                found = separate_backward(op, form, needs, dy, source, weight, tensors, kept)
            else:
                assert source is not None
                found = effective_backward(op, form, plan == "hybrid", needs, dy, source, weight, tensors)
        dx, dw, db, *d_tensors = found
        out = []
        if needs[0]:
            assert dx is not None
            out.append(dx.reshape(size).contiguous(memory_format=_memory_format(given, weight)))
        if needs[1]:
            assert weight is not None
            out.append(_laid(dw, weight))
        if needs[2]:
            assert db is not None
            out.append(db)
        out += [_laid(d, t) for d, t, need in zip(d_tensors, tensors, needs[3:], strict=True) if need and t is not None]
        return out


def _fake_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, shape: Sequence[int], *encoded: Any
) -> list[Tensor]:
    parameters, (size, _, needs) = encoded[0], encoded[-3:]
    out = []
    if needs[0]:
        out.append(torch.empty_like(dy.new_empty(size), memory_format=_memory_format(dy, weight)))
    if needs[1]:
        assert weight is not None
        out.append(torch.empty_like(weight))
    if needs[2]:
        out.append(dy.new_empty(shape[0]))
    return out + [torch.empty_like(t) for t, need in zip(parameters, needs[3:], strict=True) if need]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, shape, parameters, given, *rest = inputs
    *encoded, plan, _, seed, keep = rest
    call = _Call.of(shape, parameters, given, *encoded)
    flat = ctx.needs_input_grad  # of the inputs with the parameters one by one
    needs = (*flat[:3], *flat[4 : 4 + len(parameters)])
    with_h = call.kept(x, output[0], plan, keep) is not None
    of_input = plan != "fused" or not with_h or needs[1] or call.form.keeps_input(_spread(needs[3:], given, False))
    ctx.save_for_backward(
        x if of_input else None, weight, bias if needs[2] else None, output[1] if with_h else None, seed, *parameters
    )
    ctx.rest, ctx.needs, ctx.x_size, ctx.x_stride = (shape, given, *rest), needs, x.shape, x.stride()
    ctx.nothing = [[] if isinstance(i, (list, tuple)) and not i else None for i in inputs]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, weight, bias, h, seed, *parameters = ctx.saved_tensors
    shape, given, *encoded, plan, dropout, _seed, _keep = ctx.rest
    nothing, needs = ctx.nothing, ctx.needs
    if dy is None:
        return (None, None, None, nothing[3], [None] * len(parameters), *nothing[5:])
    if torch.is_grad_enabled():
        if x is None:
            raise RuntimeError(NO_INPUT)
        call = _Call.of(shape, parameters, given, *encoded)
        kept = None if seed is None else dropout_factor(x, dropout, int(seed))

        def build(x: Tensor, weight: Tensor | None, bias: Tensor | None, *parameters: Tensor) -> Tensor:
            tensors = _spread(parameters, given)
            if weight is not None:
                return plain(call.op, x, weight, bias, call.form, tensors, kept)
            return twin(call.op, x if kept is None else x * kept, None, call.form, tensors).to(x.dtype)

        found = twin_grads(build, (x, weight, bias, *parameters), needs, dy)
    else:
        some = torch.ops.flora.adapted_backward(
            dy, x, weight, h, shape, parameters, given, *encoded, plan, dropout, seed, ctx.x_size, ctx.x_stride, needs
        )
        found = _spread(some, needs)
    return (*found[:3], nothing[3], list(found[3:]), *nothing[5:])


def _no_grads(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError("the backward operators of flora have no derivative: for a second one, do not compile the first")


# The weight alone --------------------------------------------------------------------------------------------------


def _effective_weight(weight: Tensor, *encoded: Any) -> Tensor:
    call = _Call.of(weight.shape, *encoded)
    with _alone(weight.device):
        if _kernels(weight, call.tensors):
            return _laid(call.form.effective(weight, call.tensors), weight)
        return _laid(add_to(weight, call.form.delta(weight, call.tensors)), weight)


def _delta_weight(weight: Tensor | None, shape: Sequence[int], *encoded: Any) -> Tensor:
    call = _Call.of(shape, *encoded)
    some: Tensor = encoded[0][0]
    with _alone(some.device):
        compute = call.form.alone if some.is_cpu else call.form.delta
        return compute(weight, call.tensors).contiguous()


def _weight_backward(dw: Tensor, weight: Tensor | None, shape: Sequence[int], *encoded: Any) -> list[Tensor]:
    *encoded, alone, needs = encoded  # type: ignore[assignment]
    call, given = _Call.of(shape, *encoded), encoded[1]
    needs = [needs[0], *_spread(needs[1:], given, False)]
    with _alone(dw.device):
        if dw.is_cpu:
            found = weight_backward(call.form, alone, needs, dw.resolve_neg(), weight, call.tensors)
        else:
            found = tuple(twin_grads(lambda w, *t: call.form.delta(w, t), (weight, *call.tensors), needs, dw))
            if needs[0] and not alone:
                found = (dw if found[0] is None else dw + found[0], *found[1:])
        likes = (weight if weight is not None else dw, *call.tensors)
        out = [_laid(d, t) for d, t, need in zip(found, likes, needs, strict=True) if need and t is not None]
        return [d.clone() if d is dw else d for d in out]


def _fake_weight_backward(dw: Tensor, weight: Tensor | None, shape: Sequence[int], *encoded: Any) -> list[Tensor]:
    parameters, needs = encoded[0], encoded[-1]
    likes = (weight if weight is not None else dw, *parameters)
    return [torch.empty_like(t) for t, need in zip(likes, needs, strict=True) if need]


def _keep_weight(alone: bool) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, *rest = inputs
        shape, rest = (rest[0], rest[1:]) if alone else (weight.shape, rest)
        parameters, *rest = rest
        of_weight = FORMS[rest[1]].of_weight
        ctx.save_for_backward(weight if of_weight or not alone else None, *parameters)
        flat, first = ctx.needs_input_grad, 2 if alone else 1
        ctx.needs, ctx.rest = (flat[0], *flat[first : first + len(parameters)]), (shape, *rest)

    return keep


def _weight_grads(alone: bool) -> Callable[[Any, Tensor], tuple[Any, ...]]:
    def grads(ctx: Any, dw: Tensor) -> tuple[Any, ...]:
        weight, *parameters = ctx.saved_tensors
        shape, given, form, scale = ctx.rest
        needs = ctx.needs
        if torch.is_grad_enabled():
            call = _Call.of(shape, parameters, given, form, scale)

            def build(weight: Tensor | None, *parameters: Tensor) -> Tensor:
                delta = call.form.delta(weight, _spread(parameters, given))
                return delta if alone or weight is None else add_to(weight, delta)

            found = twin_grads(build, (weight, *parameters), needs, dw)
        else:
            some = torch.ops.flora.weight_backward(dw, weight, shape, parameters, given, form, scale, alone, needs)
            found = _spread(some, needs)
        return found[0], *([None] if alone else []), list(found[1:]), None, None, None

    return grads


# Under torch.func ---------------------------------------------------------------------------------------------------


def _plain_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], *encoded: Any
) -> tuple[Tensor, Tensor]:
    encoded, dropout = encoded[:-4], encoded[-3]
    if weight is None:
        y = _update(x, None, shape, *encoded, dropout=dropout)  # type: ignore[misc]
    else:
        y = _adapted(x, weight, bias, *encoded, dropout=dropout)  # type: ignore[misc]
    return y, tensors_like(x, encoded[0])


def _plain_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, shape: Sequence[int], *encoded: Any
) -> list[Tensor]:
    parameters, given, *encoded, _, dropout, _, _, _, needs = encoded  # type: ignore[assignment]
    if x is None:
        raise RuntimeError(NO_INPUT)
    if dropout > 0:
        raise RuntimeError("a backward with dropout cannot be batched: its mask belongs to one forward")

    def build(x: Tensor, weight: Tensor | None, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        return _plain_forward(x, weight, bias, shape, parameters, given, *encoded, "", 0.0, None, False)[0]

    bias = dy.new_zeros(shape[0]) if needs[2] else None
    found = torch.func.vjp(build, x, weight, bias, *parameters)[1](dy)
    return [d for d, need in zip(found, needs, strict=True) if need]


def _plain_effective_weight(weight: Tensor, parameters: Sequence[Tensor], *rest: Any) -> Tensor:
    call = _Call.of(weight.shape, parameters, *rest)
    return add_to(weight, call.form.delta(weight, call.tensors))


def _plain_delta_weight(weight: Tensor | None, shape: Sequence[int], *encoded: Any) -> Tensor:
    call = _Call.of(shape, *encoded)
    return call.form.delta(weight, call.tensors)


def _plain_weight_backward(dw: Tensor, weight: Tensor | None, shape: Sequence[int], *encoded: Any) -> list[Tensor]:
    parameters, given, form, scale, alone, needs = encoded

    def build(weight: Tensor | None, *parameters: Tensor) -> Tensor:
        delta = _plain_delta_weight(weight, shape, parameters, given, form, scale)
        return delta if alone or weight is None else add_to(weight, delta)

    found = torch.func.vjp(build, weight, *parameters)[1](dw)
    return [d for d, need in zip(found, needs, strict=True) if need]


# Registration ------------------------------------------------------------------------------------------------------


def _register() -> None:
    every = "CompositeExplicitAutograd"
    for name, choose in (("adapted", _adapted), ("update", _update)):
        _FLORA.impl(name, choose, "Autograd")  # above whatever traces, which then sees the operators below
        _FLORA.impl(name, choose, every)  # in inference mode
        torch.library.register_fake(f"flora::{name}", choose, lib=_FLORA)
        _FLORA.impl(name, choose, "FuncTorchBatchedDecomposition")

    def fake_effective(weight: Tensor, *encoded: Any) -> Tensor:
        return torch.empty_like(weight)

    def fake_delta(weight: Tensor | None, shape: Sequence[int], parameters: Sequence[Tensor], *rest: Any) -> Tensor:
        return parameters[0].new_empty(shape)

    for name, run, fake, batched in (
        ("adapted_forward", _forward, _fake_forward, _plain_forward),
        ("adapted_backward", _backward, _fake_backward, _plain_backward),
        ("effective_weight", _effective_weight, fake_effective, _plain_effective_weight),
        ("delta_weight", _delta_weight, fake_delta, _plain_delta_weight),
        ("weight_backward", _weight_backward, _fake_weight_backward, _plain_weight_backward),
    ):
        _FLORA.impl(name, run, every)
        torch.library.register_fake(f"flora::{name}", fake, lib=_FLORA)
        _FLORA.impl(name, batched, "FuncTorchBatchedDecomposition")
    for name in ("adapted_backward", "weight_backward"):
        torch.library.register_autograd(f"flora::{name}", _no_grads, lib=_FLORA)
    for name, grads, keep in (
        ("adapted_forward", _grads, _keep_for_backward),
        ("effective_weight", _weight_grads(False), _keep_weight(False)),
        ("delta_weight", _weight_grads(True), _keep_weight(True)),
    ):
        torch.library.register_autograd(f"flora::{name}", grads, setup_context=keep, lib=_FLORA)


_register()
