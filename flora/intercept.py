"""Deltas inside a forward that is not ours.

A layer with a forward of its own (a convolution that pads by itself, a layer with hooks or with a forward that another
library put on the instance) reads its weight and does something with it. `Intercept` is active while that forward runs
and watches PyTorch's functions: a stock linear, convolution or embedding call on the weight is served with the delta on
top; any other use of the weight gets W + s·ΔW in its place. It may watch several weights of one module. The module
itself is never changed, and the watch is local to the thread, so that several threads may run the same layer at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
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


_WRITES = {
    *("__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__"),
    *(name for of in (Tensor, torch, F) for name in dir(of) if name.endswith("_") and not name.endswith("__")),
}
"""The functions that write to their first argument: by name, as a compiler can follow."""


@dataclass
class Watch:
    """One weight, what stands for it, and what a forward made of it.

    Parameters
    ----------
    name
        the module's, for messages.
    is_weight
        whether a tensor is it.
    effective
        returns W + s·ΔW, which stands for it in any use that is not served.
    stock
        called with (op, x, W, b) for a stock operation on it: returns its adapted output. None: W + s·ΔW serves.
    turned
        brings it into the order (out, in, *k).
    embedding
        called with (ids, W, padding_idx), likewise.
    bias
        the layer's own, if it has one.
    shift
        returns a bias with what the deltas add to it. It stands for the layer's own bias wherever that is used; a layer
        without one gets it in its stock calls.

    After the forward, ``served`` counts the stock calls, ``replaced`` the other uses and ``shifted`` those of the bias;
    ``learns`` says whether any use of the weight had gradients enabled.
    """

    name: str
    is_weight: Callable[[Tensor], bool]
    effective: Callable[[Tensor], Tensor]
    stock: StockCall | None = None
    turned: Callable[[Tensor], Tensor] = lambda weight: weight
    embedding: Callable[..., Tensor] | None = None
    bias: Tensor | None = None
    shift: Callable[[Tensor | None], Tensor | None] = lambda bias: bias
    served: int = 0
    replaced: int = 0
    shifted: int = 0
    learns: bool = False
    _values: dict[bool, Tensor] = field(default_factory=dict)
    _slices: dict[bool, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def used(self) -> bool:
        return bool(self.served or self.replaced)

    def serve(self, call: Callable[[], Tensor]) -> Tensor:
        self.served += 1
        self.learns |= torch.is_grad_enabled()
        return call()

    def value(self, weight: Tensor, detached: bool) -> Tensor:
        """W + s·ΔW, computed once with a graph and once without, at most."""
        self.replaced += 1
        grad = torch.is_grad_enabled()
        self.learns |= grad and not detached
        if grad not in self._values:
            self._values[grad] = self.effective(weight)
        return self._values[grad]

    def slice(self, weight: Tensor, index: int) -> Tensor:
        """(W + s·ΔW)[index], such that all slices have one gradient of W's size between them, not one each."""
        value, grad = self.value(weight, detached=False), torch.is_grad_enabled()
        if grad not in self._slices:
            self._slices[grad] = value.unbind()
        return self._slices[grad][index]

    def of_call(self, bias: Tensor | None) -> Tensor | None:
        """The bias of a stock call: with the shift, unless it was computed from one that has it."""
        return bias if self.bias is not None and bias is not self.bias else self.with_shift(bias)

    def with_shift(self, bias: Tensor | None) -> Tensor | None:
        self.shifted += 1
        return self.shift(bias)


class Intercept(TorchFunctionMode):
    """Puts deltas into the forward that runs inside it, by a `Watch` for each weight."""

    def __init__(self, *watches: Watch) -> None:
        super().__init__()
        self.watches = watches

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if name_of(func) in METADATA:
            return func(*args, **kwargs)
        found = self._stock_call(func, args, kwargs)
        if found is not None:
            watch, call = found
            return watch.serve(call)
        if func is Tensor.__getitem__ and _is_index(args[1]):  # as a loop over experts does
            watch_of_slice = self._of(args[0])
            if watch_of_slice is not None:
                return watch_of_slice.slice(args[0], int(args[1]))
        self._refuse_writes(func, args, kwargs)
        detached = name_of(func) in ("data", "detach")
        return func(*self._substituted(args, detached), **self._substituted(kwargs, detached))

    def _of(self, value: Any) -> Watch | None:
        if isinstance(value, Tensor):
            for watch in self.watches:
                if watch.is_weight(value):
                    return watch
        return None

    def _refuse_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A write would go to W + s·ΔW, for the moment, and be lost, or carry ΔW into W for good."""
        name = getattr(func, "__name__", "")
        watch = (self._of(args[0]) if args and name in _WRITES else None) or self._of(kwargs.get("out"))
        if watch is not None:
            raise RuntimeError(
                f"{watch.name}: {name} writes to its weight in the forward, where the delta is a part of it"
            )

    def _stock_call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Watch, Callable[[], Tensor]] | None:
        """The adapted form of a stock operation on a weight, or None if this call is not one."""
        if func is F.linear:
            x, weight, bias = _bound(("input", "weight", "bias"), args, kwargs)
            return self._product(LINEAR, x, weight, bias)
        if func is torch.addmm and not kwargs and len(args) == 3:
            bias, x, weight = args
            watch = self._of(weight)
            if watch is not None and isinstance(bias, Tensor) and bias.ndim == 1:
                turned = watch.turned(weight)
                return None if turned is weight else self._product(ADDMM, x, weight, bias, turned)
            return None
        if func in _CONVOLUTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            x, weight, bias, stride, padding, dilation, groups = _bound(names, args, kwargs)
            if self._of(weight) is None:
                return None
            return self._product(
                _conv_op(_CONVOLUTIONS[func], weight, stride, padding, dilation, groups), x, weight, bias
            )
        if func is F.embedding:
            ids, weight, padding_idx = _bound(("input", "weight", "padding_idx"), args, kwargs)
            watch = self._of(weight)
            embedding = None if watch is None else watch.embedding
            if watch is not None and embedding is not None:
                return watch, lambda: embedding(ids, weight, padding_idx)
        return None

    def _product(
        self, op: Op, x: Tensor, weight: Any, bias: Tensor | None, turned: Tensor | None = None
    ) -> tuple[Watch, Callable[[], Tensor]] | None:
        watch = self._of(weight)
        stock = None if watch is None else watch.stock
        if watch is None or stock is None:
            return None
        return watch, lambda: stock(op, x, weight if turned is None else turned, watch.of_call(bias))

    def _substituted(self, value: Any, detached: bool) -> Any:
        if isinstance(value, Tensor):
            for watch in self.watches:
                if value is watch.bias:
                    return watch.with_shift(value)
                if watch.is_weight(value):
                    return watch.value(value, detached)
            return value
        if type(value) in (list, tuple):
            return type(value)(self._substituted(v, detached) for v in value)
        if type(value) is dict:
            return {k: self._substituted(v, detached) for k, v in value.items()}
        return value


def _parametrisation(module: nn.Module, name: str) -> nn.Module | None:
    """What computes a weight at every access, if something does."""
    return module.parametrizations[name] if parametrize.is_parametrized(module, name) else None  # type: ignore[index, return-value]


class _Held(threading.local):
    def __init__(self) -> None:
        self.weights: dict[nn.Module, Tensor | None] = {}
        """By what computes them."""


_held = _Held()


@contextmanager
def held(module: nn.Module, name: str) -> Iterator[Callable[[], Tensor | None]]:
    """Within it a weight that is parametrised is one tensor, the first that is computed; gives what returns that.

    In this thread alone. `torch.nn.utils.parametrize.cached` shares it with all threads and with copies of the module:
    one would compute with the weight of another, or with one that was made without gradients.
    """
    parametrisation = _parametrisation(module, name)
    if parametrisation is None:
        yield lambda: None
        return
    if torch.compiler.is_compiling():  # which follows neither what is local to a thread nor new hooks
        with parametrize.cached():
            computed = getattr(module, name)
            yield lambda: computed
        return
    if _hold not in parametrisation._forward_hooks.values():
        parametrisation.register_forward_hook(_hold)
    outer = {parametrisation: _held.weights[parametrisation]} if parametrisation in _held.weights else {}
    _held.weights[parametrisation] = None
    try:
        yield lambda: _held.weights[parametrisation]
    finally:
        del _held.weights[parametrisation]
        _held.weights.update(outer)


def _hold(parametrisation: nn.Module, args: Any, weight: Tensor) -> Tensor | None:
    """A forward hook."""
    if torch.compiler.is_compiling() or parametrisation not in _held.weights:
        return None
    if _held.weights[parametrisation] is None:
        _held.weights[parametrisation] = weight
    return _held.weights[parametrisation]


def let_go(module: nn.Module, name: str) -> None:
    """Take the hook of `held` off again."""
    parametrisation = _parametrisation(module, name)
    hooks = {} if parametrisation is None else parametrisation._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _hold]:
        del hooks[key]


def _is_index(value: Any) -> bool:
    """Whether it picks one slice; a tensor that does so would be data to a compiler."""
    if type(value) is int:
        return True
    if not isinstance(value, Tensor) or value.ndim > 0 or torch.compiler.is_compiling():
        return False
    return value.dtype in (torch.int64, torch.int32)


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
