"""A frozen base kept in half precision: what of it is cast, what stays in float32, and where activations change dtype.

Linear layers, convolutions, embeddings and everything else with weights are cast, and cast their floating inputs.
Normalisation and the like (vectors that scale and shift, running statistics, computed tables) stays in float32 and
returns the dtype that it was given. Both by hooks; nothing here knows an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora.kinds import is_opaque, is_product
from flora.norms import NORMS

BASE_DTYPES = (torch.bfloat16, torch.float16)

_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.RNNBase, nn.PReLU)  # PReLU's two dtypes must be one
_STRICT = (nn.LayerNorm.forward, nn.GroupNorm.forward, nn.BatchNorm2d.forward)
"""Forwards that want activations in their weights' dtype, but on the CPU, where they are quicker with mixed ones."""
_GIVEN = "_flora_given"


def check_base_dtype(dtype: Any) -> None:
    """Raises ValueError, quoting it, for anything but a dtype that a base can be kept in."""
    if dtype not in BASE_DTYPES:
        raise ValueError(f"base_dtype={dtype!r} must be one of {', '.join(map(str, BASE_DTYPES))}, or None")


# Which ------------------------------------------------------------------------------------------------------------


def stays(module: nn.Module) -> bool:
    """Whether a module keeps its dtype: normalisation and the like, computed tables, quantised layers.

    That is a module below which no other holds a tensor, of PyTorch's own normalisation or with nothing but vectors
    (at most one extent above 1) for parameters; no layer that is a product, even if its weight happens to be a vector.
    A module that holds buffers alone (rotary frequencies, position tables) is one.
    """
    if isinstance(module, NORMS) or is_opaque(module) or any(_is_special(p) for p in _parameters(module)):
        return True
    if is_product(module) or isinstance(module, _PRODUCTS):
        return False
    if any(True for inner in module.modules() if inner is not module for _ in _tensors(inner)):
        return False
    return all(_is_vector(p) for p in _parameters(module))


def cast_tensors(
    module: nn.Module, dtype: torch.dtype, whole: bool = False
) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """A module's own tensors that are cast: names, tensors, and what to. ``whole`` casts what stays, too.

    Vectors that are not in the state_dict are left alone: rotary frequencies, which half precision would ruin.
    """
    special = is_opaque(module) or any(_is_special(p) for p in _parameters(module))
    kept = stays(module) and not whole
    for key, tensor in () if special else _tensors(module):
        computed = key in module._non_persistent_buffers_set
        if kept and tensor.dtype == torch.float64:
            yield key, tensor, torch.float32
        elif tensor.is_floating_point() and not kept and not (computed and _is_vector(tensor)):
            yield key, tensor, dtype


def _is_vector(tensor: Tensor) -> bool:
    return sum(extent > 1 for extent in tensor.shape) <= 1


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module._parameters.values() if p is not None)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((key, t) for key, t in (*module._parameters.items(), *module._buffers.items()) if t is not None)


def _is_special(parameter: nn.Parameter) -> bool:
    """Quantised, packed or of a library's own type."""
    return type(parameter) is not nn.Parameter or not (parameter.is_floating_point() or parameter.is_complex())


# Tensors ----------------------------------------------------------------------------------------------------------


def cast(modules: Iterable[nn.Module], dtype: torch.dtype, undo: ExitStack, whole: bool = False) -> None:
    """Cast what `cast_tensors` names. Parameters stay the same objects, so ties hold; ``undo`` puts every value back.

    The originals are freed as soon as ``undo`` lets go of them.
    """
    converted: dict[object, Tensor] = {}  # one copy for each storage, however many tensors share it
    for module, key, tensor, to in [(m, *found) for m in modules for found in cast_tensors(m, dtype, whole)]:
        if tensor.dtype == to:
            continue
        real = tensor.numel() > 0 and not tensor.is_meta
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if real else id(tensor)
        if where not in converted:
            converted[where] = narrowed(tensor.detach(), to)
        if isinstance(tensor, nn.Parameter):
            undo.callback(_restore, tensor, tensor.data, tensor.grad)
            tensor.grad, tensor.data = None, converted[where]
        else:
            undo.callback(module._buffers.__setitem__, key, tensor)
            module._buffers[key] = converted[where]


def _restore(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    parameter.grad = None
    parameter.data = data
    parameter.grad = grad


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype; finite values beyond its range become its largest, as masks of finfo.min must."""
    info = torch.finfo(dtype)
    if tensor.layout is not torch.strided or tensor.is_nested or torch.finfo(tensor.dtype).max <= info.max:
        return tensor.to(dtype)
    return torch.where(tensor.isinf(), tensor, tensor.clamp(info.min, info.max)).to(dtype)


# Activations ------------------------------------------------------------------------------------------------------


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A structure of lists, tuples and mappings with its floating tensors changed; the same object if none is."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        items = [_mapped(item, change) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        changed = {key: _mapped(item, change) for key, item in value.items()}
        if all(changed[key] is item for key, item in value.items()):
            return value
        if not isinstance(value, MutableMapping):
            return changed
        result = copy.copy(value)  # of its own class, as transformers' ModelOutput
        for key, item in changed.items():
            result[key] = item
        return result
    return value


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The floating tensors of a structure in a dtype."""
    return _mapped(value, lambda t: t if t.dtype == dtype else t.to(dtype))


def widened(value: Any) -> Any:
    """The floating tensors of a structure in float32 at least; each remembers what it was, for `given`."""

    def widen(tensor: Tensor) -> Tensor:
        if tensor.dtype not in BASE_DTYPES:
            return tensor
        wide = tensor.float()
        setattr(wide, _GIVEN, tensor.dtype)  # travels with the call, so that calls may nest and run in threads
        return wide

    return _mapped(value, widen)


def given(value: Any, default: torch.dtype) -> torch.dtype:
    """The dtype of the first floating tensor of a structure, before `widened`; the default if there is none."""
    found: list[torch.dtype] = []

    def look(tensor: Tensor) -> Tensor:
        found.append(getattr(tensor, _GIVEN, tensor.dtype))
        return tensor

    _mapped(value, look)
    return found[0] if found else default


# Hooks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CastsInput:
    """A forward pre-hook: floating inputs come in the base's dtype."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return to_dtype(args, self.dtype), to_dtype(kwargs, self.dtype)


@dataclass(frozen=True)
class CastsModelInput:
    """The same at the root, where a mask may hold float32's least value."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def cast(tensor: Tensor) -> Tensor:
            return tensor if tensor.dtype == self.dtype else narrowed(tensor, self.dtype)

        return _mapped(args, cast), _mapped(kwargs, cast)


@dataclass(frozen=True)
class WidensInput:
    """A forward pre-hook of what stayed in float32 and cannot leave its inputs to type promotion."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if type(module).forward in _STRICT and all(
            t.is_cpu for t in (*args, *kwargs.values()) if isinstance(t, Tensor)
        ):
            return None
        return widened(args), widened(kwargs)


@dataclass(frozen=True)
class ReturnsGiven:
    """A forward hook of what stayed in float32: it returns the dtype that it was given, the base's if none was."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return to_dtype(output, given((args, kwargs), self.dtype))


HOOKS = (CastsInput, CastsModelInput, WidensInput, ReturnsGiven)


def hold(model: nn.Module, modules: Iterable[tuple[nn.Module, nn.Module]], dtype: torch.dtype) -> None:
    """Put the hooks on a model, where they are not yet.

    ``modules`` are pairs: a module of the unadapted model, and the one that is called for it.
    """
    _register(model, CastsModelInput(dtype))
    for original, called in modules:
        own = [t.dtype for _, t in _tensors(original) if t.is_floating_point()]
        if stays(original):
            opaque = is_opaque(original)
            if opaque or any(d not in BASE_DTYPES for d in own):
                if opaque or type(original).forward in (*_STRICT, nn.RMSNorm.forward):
                    _register(called, WidensInput())
                _register(called, ReturnsGiven(dtype))
        elif own and called is not model:
            _register(called, CastsInput(dtype))


def _register(module: nn.Module, hook: Any) -> None:
    if isinstance(hook, ReturnsGiven):
        if hook not in module._forward_hooks.values():
            module.register_forward_hook(hook, with_kwargs=True)
    elif hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)
