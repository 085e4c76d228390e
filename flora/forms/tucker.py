"""FLoRA's form: core and factors run on activations by the C kernels.

h is the projected input that backward needs: x·U_in (rows, r_in), for a convolution padded and channels last. Without
U_in, where the core reads x itself, it is the core's output instead.
Source of the algebra: FLoRA, arXiv 2405.14739, and docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from flora import _core, reference
from flora.forms.base import Form, Gradients, Tensors, outputs
from flora.ops import ConvOp, Op, rows
from flora.plan import PLANS, choose_plan

PlanCall = tuple[tuple[int, ...], tuple[int, ...], int, int, int, int, bool]


class TuckerForm(Form):
    """Tensors: core (r_out, r_in, *r_k), then the factors in weight order (dim_m, r_m); a None is an identity.

    The core may be None on a matrix; on a convolution the factors of input and kernel may be. ``projects`` says whether
    there is one of the input.
    """

    __slots__ = ("projects",)

    name = "tucker"
    in_half = True

    def __init__(self, scale: float, projects: bool = True) -> None:
        self.scale = scale
        self.projects = projects

    @classmethod
    def of(cls, scale: float, shape: tuple[int, ...], tensors: Tensors) -> Self:
        return cls(scale, projects=len(tensors) < 3 or tensors[2] is not None)

    @classmethod
    def places(cls, modes: int) -> int:
        return 1 + modes

    def delta(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        core, *factors = _explicit(tensors)
        return reference.reconstruct(core, factors, self.scale)

    def twin(self, op: Op, x: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        core, u_out, u_in, *u_k = tensors
        if not isinstance(op, ConvOp):
            return reference.linear_update(x, u_in, core, u_out, self.scale)
        expanded = reference.reconstruct(core, (None, None, *u_k), 1.0)
        return reference.conv_update(x, u_in, expanded, u_out, self.scale, *op)

    def lookup(self, ids: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        core, u_num, u_dim = tensors
        rows = F.embedding(ids, u_num)
        if core is not None:
            rows = rows @ core
        out: Tensor = self.scale * (rows @ u_dim.mT)
        return out

    # On the weight --------------------------------------------------------------------------------------------------

    def alone(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        core, *factors = _explicit(tensors)
        out: Tensor = core.new_empty([n if u is None else len(u) for n, u in zip(core.shape, factors, strict=True)])
        _core.tucker_reconstruct(out, None, core, factors, self.scale)
        return out

    def effective(self, weight: Tensor, tensors: Tensors) -> Tensor:
        core, *factors = _explicit(tensors)
        out = torch.empty_like(weight, requires_grad=False)  # in W's own layout, channels_last and transposed included
        _core.tucker_reconstruct(out, weight, core, factors, self.scale)
        return out

    def project(self, dw: Tensor, weight: Tensor | None, tensors: Tensors, needs: Sequence[bool]) -> Gradients:
        outs = outputs(tensors, needs)
        if any(needs):
            core, *factors = _explicit(tensors)
            d_core, *d_factors = _explicit(outs) if tensors[0] is None else outs
            _core.tucker_reconstruct_backward(d_core, d_factors, dw, core, factors, self.scale)
        return outs

    # Through the factors --------------------------------------------------------------------------------------------

    def keeps_input(self, needs: Sequence[bool]) -> bool:
        return needs[2] if self.projects else any(needs)  # the others have h

    def update_(self, op: Op, y: Tensor, x: Tensor, tensors: Tensors, want_h: bool) -> tuple[Tensor, Tensor | None]:
        core, u_out, u_in, *_ = tensors
        y = op.writable(y)
        if not isinstance(op, ConvOp):
            x = rows(x)
            h = u_in.new_empty(self.kept(op, x, y, tensors)) if want_h else None
            _core.tucker_linear_forward(rows(y), h, x, u_in, core, u_out, self.scale)
            return y, h
        h = u_out.new_empty(self.kept(op, x, y, tensors)) if want_h else None
        _core.tucker_conv_forward(y, h, x, core, tensors[1:], self.scale, *op)
        return y, h

    def kept(self, op: Op, x: Tensor, y: Tensor, tensors: Tensors) -> tuple[int, ...]:
        _, u_out, u_in, *_ = tensors
        if not isinstance(op, ConvOp):
            return *x.shape[:-1], u_in.shape[1]
        if u_in is None:
            return x.shape[0], *y.shape[2:], op.groups * u_out.shape[1]
        pads = zip(x.shape[2:], op.padding[::2], op.padding[1::2], strict=True)
        return x.shape[0], *(sum(p) for p in pads), op.groups * u_in.shape[1]

    def update_backward(
        self,
        op: Op,
        dx: Tensor | None,
        dy: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        tensors: Tensors,
        needs: Sequence[bool],
    ) -> Gradients:
        outs = outputs(tensors, needs)
        if isinstance(op, ConvOp):
            core, *factors = tensors
            _core.tucker_conv_backward(dx, outs[0], outs[1:], dy, x, h, core, factors, self.scale, *op)
        else:
            core, u_out, u_in = tensors
            d_core, d_u_out, d_u_in = outs
            dx, x = None if dx is None else rows(dx), None if x is None else rows(x)
            _core.tucker_linear_backward(dx, d_u_in, d_core, d_u_out, rows(dy), x, h, u_in, core, u_out, self.scale)
        return outs

    # Which plan -----------------------------------------------------------------------------------------------------

    def runs(self, op: Op, tensors: Tensors) -> tuple[str, ...]:
        return PLANS

    def plan_call(self, op: Op, x: Tensor, weight: Tensor, tensors: Tensors, grad: bool) -> PlanCall:
        """The arguments of `flora.plan.plan_costs` for this call."""
        core, u_out, u_in, *_ = tensors
        if core is not None:
            ranks: tuple[int, ...] = core.shape
        else:
            ranks = u_out.shape[1], u_in.shape[1]
        return weight.shape, ranks, *op.pixels(x, weight), x.element_size(), grad

    def cheapest(
        self, op: Op, x: Tensor, weight: Tensor, tensors: Tensors, grad: bool, possible: tuple[str, ...]
    ) -> str:
        return choose_plan(*self.plan_call(op, x, weight, tensors, grad), possible, self.projects)


class Tucker(NamedTuple):
    """A Tucker delta: core (r_out, r_in, *r_k), factors in weight order (dim_m, r_m), and the scale. A None is an
    identity, as in `TuckerForm`."""

    core: Tensor | None
    factors: tuple[Tensor | None, ...]
    scale: float

    @property
    def form(self) -> TuckerForm:
        return TuckerForm.of(self.scale, (), self.tensors)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.core, *self.factors


def _explicit(tensors: Tensors) -> Tensors:
    """The tensors with a core: U_outᵀ's partner U_inᵀ stands in for one that is the identity."""
    if tensors[0] is not None:
        return tensors
    _, u_out, u_in = tensors
    return None if u_in is None else u_in.mT, u_out, None
