"""Normalisation layers: which modules are one, and what their forward makes of their weight.

y = x̂ ⊙ (weight + offset) + bias, x̂ the normalised input; the offset is 0, or 1 where the weight is kept less 1, as
Gemma's RMSNorm and Nemotron's LayerNorm keep it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from flora.intercept import Intercept, Watch
from flora.ops import NormOp

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)

_STOCK: dict[Any, tuple[Any, str]] = {
    nn.LayerNorm.forward: (torch.nn.functional.layer_norm, "normalized_shape"),
    nn.GroupNorm.forward: (torch.nn.functional.group_norm, "num_groups"),
    nn.RMSNorm.forward: (torch.nn.functional.rms_norm, "normalized_shape"),
}


def is_norm(module: nn.Module) -> bool:
    """One of PyTorch's own, or a class that is called so (LlamaRMSNorm, T5LayerNorm) and holds vectors alone."""
    if isinstance(module, NORMS):
        return True
    own = {name: p for name, p in module._parameters.items() if p is not None}
    leaf = not module._modules and not module._buffers and own.keys() in ({"weight"}, {"weight", "bias"})
    return leaf and "norm" in type(module).__name__.lower() and all(p.ndim == 1 for p in own.values())


def is_stock(module: nn.Module) -> bool:
    """Whether calling it is a single function of PyTorch's; running statistics are left to the module itself."""
    return type(module).forward in _STOCK and "forward" not in module.__dict__


def norm_op(module: nn.Module) -> NormOp:
    """The operation of a stock one."""
    function, extents = _STOCK[type(module).forward]
    return NormOp(function, getattr(module, extents), module.eps)  # type: ignore[arg-type]


@torch.no_grad()
def offset(module: nn.Module) -> float:
    """What its forward adds to its weight before it multiplies by it.

    Found by running a forward that is not PyTorch's own with weights of 0 and of 1 in the weight's place. Raises
    TypeError if y is not x̂ ⊙ (weight + offset) with an offset of 0 or 1.
    """
    # A forward with running statistics would change them.
    if isinstance(module, _NormBase) or is_stock(module):
        return 0.0
    weight: Tensor = module.weight  # type: ignore[assignment]
    with torch.device("cpu"):
        for more in ((), (3,), (3, 3), (3, 3, 3)):  # channels last, then images of one to three modes
            shape = torch.Size((2, *weight.shape, *more))
            x = torch.linspace(-1, 2, steps=shape.numel()).sin().reshape(shape)
            try:
                zero, one = (_with_weight(module, x, value).float() for value in (0.0, 1.0))
            except Exception:  # whatever a forward raises at a shape that it does not take
                continue
            for found in (0.0, 1.0):
                if torch.allclose(zero, found * (one - zero), rtol=0.02, atol=1e-3):
                    return found
            break
    raise TypeError(f"what the forward of {type(module).__name__} does with its weight is not known")


def _with_weight(module: nn.Module, x: Tensor, value: float) -> Tensor:
    """Its output with another weight and without bias; the module is not touched."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    other = torch.full(weight.shape, value)  # type: ignore[union-attr]

    def never(*_: Any) -> Tensor:
        raise TypeError("a product")

    watch = Watch(
        type(module).__name__,
        lambda t: t is weight,
        lambda t: other,
        never,
        embedding=never,
        bias=bias,
        shift=lambda t: None if t is None else torch.zeros(t.shape),
    )
    with Intercept(watch):
        y: Tensor = module.forward(x)
    return y
