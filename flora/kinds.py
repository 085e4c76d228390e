"""Which layers can be adapted, and what there is to know about each kind: its weight, its stock operation, its shape.

`kind_of` decides whether a layer has a weight that a delta can act on, `refusal` whether a configuration's deltas can;
what is refused is refused with a reason.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from flora.config import DeltaConfig
from flora.distributed import is_sharded, model_class
from flora.norms import is_norm, is_stock, offset
from flora.ops import ADDMM, LINEAR, ConvOp, Op, same_padding
from flora.outputs import output_of


class Kind:
    """A kind of layer: how its weight is called, laid out and used. This one is of modules without one to act on."""

    name = "module"
    """For `DeltaConfig.refuses`: "linear", "conv", "embedding", "attention", "quantised", "norm", "module" or
    "parameter" (of a module that is no layer)."""
    weight_name = ""
    opaque = False
    """The weight is not there as plain numbers (quantised): only y = base(x) + s·ΔW·x is possible."""
    droppable = True
    """The delta has an input of its own that dropout can act on."""
    shiftable = True
    """The delta can update its bias."""

    def __init__(self, constant: str) -> None:
        self._constant = constant

    def __reduce__(self) -> str:
        return self._constant  # copies and pickles are the module's own constant

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """The weight's shape as (out, in/groups, *k)."""
        return tuple(getattr(module, self.weight_name).shape) if self.weight_name else ()

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
    name = "linear"
    weight_name = "weight"

    def stock(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward and "forward" not in module.__dict__

    def op(self, module: nn.Module) -> Op:
        return LINEAR


class OpaqueLinearKind(LinearKind):
    """A linear layer whose weight is packed or quantised."""

    name = "quantised"
    opaque = True
    shiftable = False

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return module.out_features, module.in_features  # type: ignore[return-value]

    def stock(self, module: nn.Module) -> bool:
        return False


class TransposedLinearKind(Kind):
    """transformers' Conv1D: a linear layer with its weight as (in, out)."""

    name = "linear"
    weight_name = "weight"

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(reversed(module.weight.shape))  # type: ignore[arg-type]

    def turned(self, weight: Tensor) -> Tensor:
        return weight.mT

    def stock(self, module: nn.Module) -> bool:
        return _is_conv1d_class(type(module)) and "forward" not in module.__dict__

    def op(self, module: nn.Module) -> Op:
        return ADDMM


class ConvKind(Kind):
    name = "conv"
    weight_name = "weight"

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

    name = "embedding"
    weight_name = "weight"
    droppable = shiftable = False

    def stock(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Embedding.forward and "forward" not in module.__dict__


class AttentionKind(Kind):
    """`torch.nn.MultiheadAttention`: its packed input projection, read by its own forward. out_proj is a Linear."""

    name = "attention"
    weight_name = "in_proj_weight"
    droppable = shiftable = False


class NormKind(Kind):
    """A normalisation: its weight, most often (d,), and its bias act on each element or channel by itself."""

    name = "norm"
    weight_name = "weight"
    droppable = False

    def stock(self, module: nn.Module) -> bool:
        return is_stock(module)


LINEAR_KIND = LinearKind("LINEAR_KIND")
OPAQUE_LINEAR = OpaqueLinearKind("OPAQUE_LINEAR")
TRANSPOSED = TransposedLinearKind("TRANSPOSED")
CONV = ConvKind("CONV")
EMBEDDING = EmbeddingKind("EMBEDDING")
ATTENTION = AttentionKind("ATTENTION")
NORM = NormKind("NORM")
MODULE = Kind("MODULE")


def _named_padding(padding: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    return same_padding(kernel, dilation) if padding == "same" else (0,) * (2 * len(kernel))


def _both_sides(padding: tuple[int, ...]) -> tuple[int, ...]:
    if len(padding) == 2:  # most of them, at the price of a cache's answer; a cache is a warning under torch.compile
        height, width = padding
        return height, height, width, width
    return tuple(p for p in padding for _ in (0, 1))


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
            not (t.is_floating_point() or t.is_complex()) and t.ndim > 0 for t in packed
        )
    if weight.is_complex():  # not quantised: a real delta would lose the imaginary part
        return False
    return not weight.is_floating_point() or not (type(weight) is nn.Parameter or is_sharded(weight))


def is_foreign(tensor: Tensor) -> bool:
    """Of a type that is none of PyTorch's own: quantised by another library, as a rule."""
    return type(tensor).__module__.partition(".")[0] != "torch"


def kind_of(module: nn.Module) -> Kind:
    """The kind of a layer. Raises TypeError with the reason where it has no weight that a delta could act on."""
    _check_initialised(module)
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
    elif is_norm(module):
        if getattr(module, "weight", None) is None:
            raise TypeError(f"this {describe(module)} has no weight")
        kind = NORM
    else:
        keys = [key for key, parameter in module._parameters.items() if parameter is not None and parameter.ndim > 1]
        raise TypeError(
            f"{type(module).__name__} is not a Linear, Conv1d to Conv3d, Conv1D, Embedding, attention or normalisation"
            + (f"; target_parameters can name its {', '.join(keys)}" if keys else "")
        )
    if parametrize.is_parametrized(module, kind.weight_name) and not kind.stock(module):
        raise TypeError(f"this {type(module).__name__} has a parametrised weight and a forward of its own")
    weight = getattr(module, kind.weight_name)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"its {kind.weight_name} is not a tensor of floating-point numbers: {found}")
    if 0 in weight.shape:
        raise TypeError(f"its {kind.weight_name} is empty: shape {tuple(weight.shape)}")
    return kind


def kind_or_module(module: nn.Module) -> Kind:
    """`kind_of`, or `MODULE` for one without a weight to act on. TypeError for a lazy module before its first call."""
    _check_initialised(module)
    try:
        return kind_of(module)
    except TypeError:
        return MODULE


def _check_initialised(module: nn.Module) -> None:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise TypeError(f"a {type(module).__name__} has no weight before its first forward")


def unfit(module: nn.Module, config: DeltaConfig) -> str | None:
    """Why a configuration's deltas cannot be put on a module, whatever its dropout, or None if they can."""
    try:
        if config.of_output:
            _check_initialised(module)
            if isinstance(module, NonDynamicallyQuantizableLinear):
                return "the attention that holds it reads its weight and never calls it; name the attention"
            output_of(module)
            kind = kind_or_module(module)
        else:
            kind = kind_of(module)
        reason = config.refuses(kind.name, module)
        if reason is not None:
            name = describe(module)
            return f"{type(config).__name__} cannot adapt {'an' if name[0] in 'AEIOU' else 'a'} {name}: {reason}"
        if kind is NORM and not config.of_output:
            offset(module)
    except TypeError as error:
        return str(error)
    return None


def undroppable(module: nn.Module, config: DeltaConfig) -> str | None:
    """Why the configuration's dropout is not possible on a module that its deltas fit."""
    if config.dropout == 0 or config.of_output or kind_of(module).droppable:
        return None
    return f"dropout={config.dropout} is not possible on {describe(module)}, whose delta has no input of its own"


def refusal(module: nn.Module, config: DeltaConfig) -> str | None:
    """Why a module cannot be adapted by a configuration, or None if it can."""
    return unfit(module, config) or undroppable(module, config)


def delta_shape(module: nn.Module, config: DeltaConfig) -> tuple[int, ...]:
    """The shape of what the configuration's delta stands for: the weight (out, in/groups, *k), or a block's matrix."""
    if config.of_output:
        return (output_of(module).width,) * 2
    return kind_of(module).shape(module)


def is_adaptable(module: nn.Module, config: DeltaConfig) -> bool:
    """Whether ``target_modules="all"`` means this module: a product, or a normalisation if the configuration says so.

    Transposed convolutions and parametrised layers count, so that a report can say why they were left alone.
    """
    return is_product(module) or (config.of_norms and is_norm(module))


def is_product(module: nn.Module) -> bool:
    """A linear layer, a convolution or packed attention; Embedding not."""
    kinds = (nn.Linear, _ConvNd, nn.MultiheadAttention)
    return isinstance(module, kinds) or _is_transposed_linear(module) or is_opaque(module)


def describe(module: nn.Module) -> str:
    """A layer's class name, for messages; that of a parametrised or sharded one without its prefix."""
    return model_class(module).__name__.removeprefix("Parametrized")
