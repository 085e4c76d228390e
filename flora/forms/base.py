"""What `flora.functional` asks of a parametrisation, and the one that any method has: ΔW as a tensor.

A form is a strategy without tensors: it is given them at each call, so that autograd alone holds them between forward
and backward. Methods that say "plain PyTorch" build graphs and run anywhere; the others run in C (or as C would: no
graph, CPU tensors) inside a node of `flora.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.ops import Op

Tensors: TypeAlias = Sequence[Any]
"""Of each a Tensor, or None where the form allows it."""

Gradients = tuple[Tensor | None, ...]


class Form:
    """A parametrisation of s·ΔW by some tensors; ΔW has the weight's shape (d_out, d_in/groups, *k).

    A subclass needs `delta`, which is enough for the merged plan. `runs` names the others that it can do, through
    `update_` and `update_backward`.
    """

    __slots__ = ("scale",)

    name: ClassVar[str] = ""
    """By which the operators of `flora.library` know it; one without a name is computed in plain PyTorch there."""

    of_weight = False
    """Whether ΔW depends on W."""

    in_half = False
    """Whether the products of `twin` may be those of a half-precision x's own dtype, where the C kernels cannot run."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @classmethod
    def of(cls, scale: float, shape: tuple[int, ...], tensors: Tensors) -> Self:
        """The form again, from what an operator has: its scale, the weight's shape and the tensors."""
        return cls(scale)

    @classmethod
    def places(cls, modes: int) -> int:
        """How many tensors it has, given or None, for a weight of so many modes."""
        return 1

    # Plain PyTorch --------------------------------------------------------------------------------------------------

    def delta(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        """s·ΔW in the tensors' dtype, differentiable. W is given where `of_weight`."""
        raise NotImplementedError

    def twin(self, op: Op, x: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        """s·ΔW·x in the tensors' dtype, differentiable."""
        delta = self.delta(weight, tensors)
        y: Tensor = op.base(x.to(delta.dtype), delta, None)
        return y

    def narrowed(self, tensors: Tensors, x: Tensor) -> Tensors:
        """The tensors as `twin` is to take them for this x: as autocast would, in x's dtype where that is `in_half`."""
        if not self.in_half or x.is_cpu or x.dtype not in (torch.bfloat16, torch.float16):
            return tensors
        return [None if t is None else t.to(x.dtype) for t in tensors]

    def lookup(self, ids: Tensor, weight: Tensor | None, tensors: Tensors) -> Tensor:
        """The rows s·ΔW[ids] of an Embedding, differentiable."""
        return F.embedding(ids, self.delta(weight, tensors))

    # On the weight --------------------------------------------------------------------------------------------------

    def alone(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        """s·ΔW in the tensors' dtype."""
        return self.delta(weight, tensors)

    def effective(self, weight: Tensor, tensors: Tensors) -> Tensor:
        """W + s·ΔW, a new tensor of W's dtype and layout, rounded once."""
        delta = self.delta(weight, tensors)
        return torch.empty_like(weight, requires_grad=False).copy_(weight.to(delta.dtype) + delta)

    def project(self, dw: Tensor, weight: Tensor | None, tensors: Tensors, needs: Sequence[bool]) -> Gradients:
        """The gradient of s·ΔW taken to the tensors, each None unless ``needs`` it."""
        with torch.enable_grad():
            aliases = [
                None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)
            ]
            delta = self.delta(weight, aliases)
        wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need and alias is not None]
        found = iter(torch.autograd.grad(delta, wanted, dw.to(delta.dtype)) if wanted else ())
        return tuple(next(found) if need and t is not None else None for t, need in zip(tensors, needs, strict=True))

    def base_gradient(self, dw: Tensor, tensors: Tensors) -> Tensor:
        """The gradient of W from that of W + s·ΔW."""
        return dw

    # Through the parameters -----------------------------------------------------------------------------------------

    def keeps_input(self, needs: Sequence[bool]) -> bool:
        """Whether `update_backward` reads x for the gradients that are needed; else what `update_` returns will do."""
        return any(needs)

    def update_(self, op: Op, y: Tensor, x: Tensor, tensors: Tensors, want_h: bool) -> tuple[Tensor, Tensor | None]:
        """y += s·ΔW·x; returns y (a copy if it was not writable) and what backward needs beside x, if anything."""
        raise NotImplementedError

    def kept(self, op: Op, x: Tensor, y: Tensor, tensors: Tensors) -> Sequence[int] | None:
        """The shape of what `update_` returns beside y for backward, in the tensors' dtype; None if that is nothing.

        x and y of a linear layer are rows, (n, d).
        """
        return None

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
        """dx += … in place, and the gradients of the tensors, each None unless ``needs`` it."""
        raise NotImplementedError

    def gradients(
        self, op: Op, dy: Tensor, x: Tensor, weight: Tensor, tensors: Tensors, needs: Sequence[bool]
    ) -> Gradients:
        """The gradients of the tensors alone, without the weight's: what plan hybrid asks for."""
        return self.update_backward(op, None, dy, x, None, tensors, needs)

    # Which plan -----------------------------------------------------------------------------------------------------

    def runs(self, op: Op, tensors: Tensors) -> tuple[str, ...]:
        """The plans that it can run on this operation, the one first that stands in for the others."""
        return ("merged",)

    def cheapest(
        self, op: Op, x: Tensor, weight: Tensor, tensors: Tensors, grad: bool, possible: tuple[str, ...]
    ) -> str:
        """The cheapest of the possible plans for this call."""
        return possible[0]


def outputs(tensors: Tensors, needs: Sequence[bool]) -> tuple[Any, ...]:
    """An uninitialised tensor for each gradient that is needed, and None for the others."""
    return tuple(
        torch.empty_like(t) if need and t is not None else None for t, need in zip(tensors, needs, strict=True)
    )


class DenseForm(Form):
    """ΔW itself, as one tensor: what a method without kernels of its own computes by plain PyTorch."""

    __slots__ = ()

    name = "dense"
    in_half = True

    def delta(self, weight: Tensor | None, tensors: Tensors) -> Tensor:
        delta: Tensor = tensors[0]
        return self.scale * delta

    def project(self, dw: Tensor, weight: Tensor | None, tensors: Tensors, needs: Sequence[bool]) -> Gradients:
        (delta,) = tensors
        return ((self.scale * dw.to(delta.dtype)) if needs[0] else None,)


class Parts(NamedTuple):
    """A delta as `flora.functional` takes it."""

    form: Form
    tensors: tuple[Any, ...]
