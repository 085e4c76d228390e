"""Which layers can be adapted, and what there is to know about each kind: its weight, its stock operation, its shape.

Nothing here computes. `kind_of` is the one place that decides; a layer that it refuses is refused with a reason.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from flora.ops import ADDMM, LINEAR, ConvOp, Op, same_padding


class Kind:
    """A kind of layer: how its weight is called, laid out and used."""

    weight_name = "weight"
    opaque = False
    """The weight is not there as plain numbers (quantised): only y = base(x) + s·ΔW·x is possible."""
    droppable = True
    """The delta has an input of its own that dropout can act on."""

    def __init__(self, constant: str) -> None:
        self._constant = constant

    def __reduce__(self) -> str:
        return self._constant  # copies and pickles are the module's own constant

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """The weight's shape as (out, in/groups, *k)."""
        return tuple(getattr(module, self.weight_name).shape)

    def turned(self, weight: Tensor) -> Tensor:
        """A weight of this layer in the order (out, in, *k), or one of that order in the layer's; a view."""
        return weight

    def stock(self, module: nn.Module) -> bool:
        """Whether calling the module is its stock operation and nothing else, on its class and its instance."""
        return False

    def op(self, module: nn.Module) -> Op:
        """The stock operation that a call amounts to."""
        raise TypeError(f"{type(module).__name__} has no single stock operation")


class LinearKind(Kind):
    def stock(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward and "forward" not in module.__dict__

    def op(self, module: nn.Module) -> Op:
        return LINEAR


class OpaqueLinearKind(LinearKind):
    """A linear layer whose weight is packed or quantised."""

    opaque = True

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return module.out_features, module.in_features  # type: ignore[return-value]

    def stock(self, module: nn.Module) -> bool:
        return False


class TransposedLinearKind(Kind):
    """transformers' Conv1D: a linear layer with its weight as (in, out)."""

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(reversed(module.weight.shape))  # type: ignore[arg-type]

    def turned(self, weight: Tensor) -> Tensor:
        return weight.mT

    def stock(self, module: nn.Module) -> bool:
        return _is_conv1d_class(type(module)) and "forward" not in module.__dict__

    def op(self, module: nn.Module) -> Op:
        return ADDMM


class ConvKind(Kind):
    _STOCK = frozenset((cls.forward, cls._conv_forward) for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def stock(self, module: nn.Module) -> bool:
        cls: type[Any] = type(module)
        own = module.__dict__
        return (cls.forward, cls._conv_forward) in self._STOCK and not ("forward" in own or "_conv_forward" in own)

    def op(self, module: nn.Module) -> Op:
        conv: _ConvNd = module  # type: ignore[assignment]
        if isinstance(conv.padding, str):
            padding = _named_padding(conv.padding, conv.kernel_size, conv.dilation)
        else:
            padding = _both_sides(tuple(conv.padding))
        return ConvOp(tuple(conv.stride), padding, tuple(conv.dilation), conv.groups, conv.padding_mode)


class EmbeddingKind(Kind):
    """A table of vectors; the modes of its weight are (num_embeddings, embedding_dim)."""

    droppable = False

    def stock(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Embedding.forward and "forward" not in module.__dict__


class AttentionKind(Kind):
    """`torch.nn.MultiheadAttention`: its packed input projection, read by its own forward. out_proj is a Linear."""

    weight_name = "in_proj_weight"
    droppable = False


LINEAR_KIND = LinearKind("LINEAR_KIND")
OPAQUE_LINEAR = OpaqueLinearKind("OPAQUE_LINEAR")
TRANSPOSED = TransposedLinearKind("TRANSPOSED")
CONV = ConvKind("CONV")
EMBEDDING = EmbeddingKind("EMBEDDING")
ATTENTION = AttentionKind("ATTENTION")


def _named_padding(padding: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    return same_padding(kernel, dilation) if padding == "same" else (0,) * (2 * len(kernel))


@lru_cache(maxsize=1024)
def _both_sides(padding: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(p) for p in padding for _ in (0, 1))


def _is_conv1d_class(cls: type) -> bool:
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def _is_transposed_linear(module: nn.Module) -> bool:
    return any(_is_conv1d_class(cls) for cls in type(module).__mro__)


def is_opaque(module: nn.Module) -> bool:
    """A layer with the extents of a linear one whose weight is a method, packed in integers or quantised."""
    extents = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(extent, int) and extent > 0 for extent in extents):
        return False
    weight = module._parameters.get("weight")
    if weight is None:
        packed = (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
        return callable(getattr(module, "weight", None)) or any(
            not t.is_floating_point() and t.ndim > 0 for t in packed
        )
    return not weight.is_floating_point() or type(weight) is not nn.Parameter


def kind_of(module: nn.Module) -> Kind:
    """The kind of a layer. Raises TypeError with the reason where it cannot be adapted."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise TypeError(f"a {type(module).__name__} has no weight before its first forward")
    if isinstance(module, _ConvTransposeNd):
        raise TypeError(f"{type(module).__name__} is not supported: only convolutions that are not transposed are")
    if is_opaque(module):
        return OPAQUE_LINEAR
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            raise TypeError(
                "this MultiheadAttention has separate q_proj_weight, k_proj_weight and v_proj_weight (kdim or vdim "
                "differ from embed_dim): only a packed in_proj_weight can be adapted"
            )
        kind: Kind = ATTENTION
    elif isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise TypeError(f"an Embedding with max_norm={module.max_norm} rewrites its weight in each forward")
        kind = EMBEDDING
    elif isinstance(module, nn.Linear):
        kind = LINEAR_KIND
    elif isinstance(module, _ConvNd):
        kind = CONV
    elif _is_transposed_linear(module):
        kind = TRANSPOSED
    else:
        raise TypeError(f"{type(module).__name__} is not a Linear, Conv1d to Conv3d, Conv1D, Embedding or attention")
    if parametrize.is_parametrized(module, kind.weight_name) and not kind.stock(module):
        raise TypeError(f"this {type(module).__name__} has a parametrised weight and a forward of its own")
    weight = getattr(module, kind.weight_name)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"its {kind.weight_name} is not a tensor of floating-point numbers: {type(weight).__name__}")
    if 0 in weight.shape:
        raise TypeError(f"its {kind.weight_name} is empty: shape {tuple(weight.shape)}")
    return kind


def refusal(module: nn.Module, dropout: float = 0.0) -> str | None:
    """Why a layer cannot be adapted, with this dropout on its delta's input, or None if it can."""
    try:
        kind = kind_of(module)
    except TypeError as error:
        return str(error)
    if dropout > 0 and not kind.droppable:
        return f"dropout={dropout} is not possible on {describe(module)}, whose delta has no input of its own"
    return None


def is_adaptable(module: nn.Module) -> bool:
    """Whether ``target_modules="all"`` means this module: linear, convolution or packed attention, Embedding not.

    Transposed convolutions and parametrised layers count, so that a report can say why they were left alone.
    """
    kinds = (nn.Linear, _ConvNd, nn.MultiheadAttention)
    return isinstance(module, kinds) or _is_transposed_linear(module) or is_opaque(module)


def describe(module: nn.Module) -> str:
    """A layer's class name, for messages; that of a parametrised one without its prefix."""
    return type(module).__name__.removeprefix("Parametrized")
