"""Deltas inside a forward that is not ours.

A layer with a forward of its own (a convolution that pads by itself, a layer with hooks or with a forward that another
library put on the instance) reads its weight and does something with it. `Intercept` is active while that forward runs
and watches PyTorch's functions: a stock linear, convolution or embedding call on the weight is served with the delta on
top; any other use of the weight gets W + s·ΔW in its place. The module itself is never changed, and the watch is local
to the thread, so that several threads may run the same layer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flora.effective import METADATA, name_of
from flora.ops import ADDMM, LINEAR, ConvOp, Op, same_padding

StockCall = Callable[[Op, Tensor, Tensor, Tensor | None], Tensor]

_CONVOLUTIONS: dict[Any, int] = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
}


_IN_PLACE_OPERATORS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__"}


class Intercept(TorchFunctionMode):
    """Puts a layer's deltas into the forward that runs inside it.

    Parameters
    ----------
    name
        the module's, for messages.
    is_weight
        whether a tensor is the layer's weight.
    turned
        brings a weight of the layer into the order (out, in, *k).
    stock
        called with (op, x, W, b) for a stock operation on the weight: returns its adapted output.
    embedding
        called with (ids, W, everything else of the call) likewise.
    effective
        returns W + s·ΔW, which stands for the weight in any other use.
    bias
        the layer's own, if it has one.
    shift
        returns a bias with what the deltas add to it. It stands for the layer's own bias wherever that is used; a layer
        without one gets it in its stock calls.

    After the forward, ``served`` counts the stock calls, ``replaced`` the other uses and ``shifted`` those of the bias;
    ``learns`` says whether any use of the weight had gradients enabled.
    """

    def __init__(
        self,
        name: str,
        is_weight: Callable[[Tensor], bool],
        turned: Callable[[Tensor], Tensor],
        stock: StockCall,
        embedding: Callable[..., Tensor],
        effective: Callable[[Tensor], Tensor],
        bias: Tensor | None,
        shift: Callable[[Tensor | None], Tensor | None],
    ) -> None:
        super().__init__()
        self.name = name
        self.is_weight, self.turned = is_weight, turned
        self.stock, self.embedding, self.effective = stock, embedding, effective
        self.bias, self.shift = bias, shift
        self.served = self.replaced = self.shifted = 0
        self.learns = False
        self._values: dict[bool, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if name_of(func) in METADATA:
            return func(*args, **kwargs)
        call = self._stock_call(func, args, kwargs)
        if call is not None:
            self.served += 1
            self.learns |= torch.is_grad_enabled()
            return call()
        self._refuse_writes(func, args, kwargs)
        detached = name_of(func) in ("data", "detach")
        return func(*self._substituted(args, detached), **self._substituted(kwargs, detached))

    def _refuse_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A write would go to W + s·ΔW, for the moment, and be lost, or carry ΔW into W for good."""
        name = getattr(func, "__name__", "")
        writes = name == "__set__" or (name.endswith("_") and not name.startswith("__")) or name in _IN_PLACE_OPERATORS
        if (writes and args and self._matches(args[0])) or self._matches(kwargs.get("out")):
            raise RuntimeError(
                f"{self.name}: {name} writes to its weight in the forward, where the delta is a part of it"
            )

    def _stock_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Tensor] | None:
        """The adapted form of a stock operation on the weight, or None if this call is not one."""
        if func is F.linear:
            x, weight, bias = _bound(("input", "weight", "bias"), args, kwargs)
            return (lambda: self.stock(LINEAR, x, weight, self._shifted(bias))) if self._matches(weight) else None
        if func is torch.addmm and not kwargs and len(args) == 3 and self._matches(args[2]):
            bias, x, weight = args
            if isinstance(bias, Tensor) and bias.ndim == 1 and self.turned(weight) is not weight:
                return lambda: self.stock(ADDMM, x, self.turned(weight), self._shifted(bias))
            return None
        if func in _CONVOLUTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            x, weight, bias, stride, padding, dilation, groups = _bound(names, args, kwargs)
            if not self._matches(weight):
                return None
            op = _conv_op(_CONVOLUTIONS[func], weight, stride, padding, dilation, groups)
            return lambda: self.stock(op, x, weight, self._shifted(bias))
        if func is F.embedding:
            ids, weight, *rest = _bound(
                ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
                args,
                kwargs,
            )
            return (lambda: self.embedding(ids, weight, rest[0])) if self._matches(weight) else None
        return None

    def _matches(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self.is_weight(value)

    def _shifted(self, bias: Tensor | None) -> Tensor | None:
        """The bias of a stock call: with the shift, unless it was computed from one that has it."""
        if self.bias is not None and bias is not self.bias:
            return bias
        self.shifted += 1
        return self.shift(bias)

    def _substituted(self, value: Any, detached: bool) -> Any:
        if isinstance(value, Tensor):
            if value is self.bias:
                return self._shifted(value)
            if not self.is_weight(value):
                return value
            self.replaced += 1
            grad = torch.is_grad_enabled()
            self.learns |= grad and not detached
            if grad not in self._values:
                self._values[grad] = self.effective(value)
            return self._values[grad]
        if type(value) in (list, tuple):
            return type(value)(self._substituted(v, detached) for v in value)
        if type(value) is dict:
            return {k: self._substituted(v, detached) for k, v in value.items()}
        return value


def _bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a call by the names of its parameters; None where one was left out."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _conv_op(modes: int, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int | None) -> ConvOp:
    """The operation of a ``conv1d`` to ``conv3d`` call, whose arguments may be ints, sequences, strings or left out."""

    def spread(value: Any, default: int) -> tuple[int, ...]:
        if value is None:
            return (default,) * modes
        if isinstance(value, int):
            return (value,) * modes
        values = tuple(int(v) for v in value)
        return values * modes if len(values) == 1 else values

    dilations = spread(dilation, 1)
    if padding == "same":
        pads = same_padding(weight.shape[2:], dilations)
    else:
        pads = tuple(p for p in spread(None if padding == "valid" else padding, 0) for _ in (0, 1))
    return ConvOp(spread(stride, 1), pads, dilations, 1 if groups is None else groups)
