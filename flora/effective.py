"""W + s·ΔW as an attribute: known by its metadata at once, computed when its values are used.

Some modules read a layer's ``weight`` for its values (attention, Mamba's dt_proj), others for its dtype or device alone
(T5, CLIP, LLaMA's rotary cache), in every forward. An `EffectiveWeight` serves both without building what nobody uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

METADATA = {
    *("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu", "is_meta", "is_nested"),
    *("size", "dim", "stride", "numel", "is_floating_point", "element_size", "is_contiguous", "get_device"),
    *(
        "grad_fn",
        "is_leaf",
        "is_complex",
        "is_quantized",
        "is_sparse",
        "is_mkldnn",
        "is_inference",
        "names",
        "ndimension",
        "itemsize",
    ),
}
"""What may be asked of a weight without its values."""


def name_of(function: Any) -> str:
    """The name of a function as PyTorch's overrides see it; for an attribute's getter that of the attribute."""
    name: str = getattr(function, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", "")
    return name


class EffectiveWeight(Tensor):
    """A tensor like ``like`` whose values ``compute`` returns, when first needed; any operation gets those.

    It has no storage of its own: code that went past PyTorch's dispatcher would fail, not read the frozen weight. This
    class is for reading without gradients, and is no obstacle to the fast paths of PyTorch's own modules.
    """

    _compute: Callable[[], Tensor]
    _computed: dict[bool, Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, requires_grad: bool, compute: Callable[[], Tensor]) -> EffectiveWeight:
        made: EffectiveWeight = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, requires_grad=requires_grad
        )
        return made

    def __init__(self, like: Tensor, requires_grad: bool, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        self._compute, self._computed = compute, {}

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_valued(args), **_valued(kwargs or {}))


class LearningWeight(EffectiveWeight):
    """The same where a gradient has to find its way to the delta: the values come in above autograd."""

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if name_of(func) in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_valued(args), **_valued(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} met an effective weight whose values were not computed; use weight.clone()")


def effective_weight(
    like: Tensor, requires_grad: bool, compute: Callable[[], Tensor], overridable: bool = False
) -> EffectiveWeight:
    """The attribute: ``like`` gives shape, strides, dtype and device, ``compute`` the values.

    ``overridable`` makes it one that `torch.overrides.has_torch_function` sees, whether it learns or not.
    """
    return (LearningWeight if requires_grad or overridable else EffectiveWeight)(like, requires_grad, compute)


def _valued(argument: Any) -> Any:
    """The argument with every effective weight in it computed, one with a graph and one without at most."""
    if isinstance(argument, EffectiveWeight):
        grad = torch.is_grad_enabled()
        if grad not in argument._computed:
            argument._computed[grad] = argument._compute()
        return argument._computed[grad]
    if type(argument) in (list, tuple):
        return type(argument)(_valued(a) for a in argument)
    if type(argument) is dict:
        return {key: _valued(a) for key, a in argument.items()}
    return argument
