"""How wide a module's output is, and which axis of it holds the channels: where a block after the module acts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from flora.norms import is_norm, is_stock

NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

_WIDTHS = ("out_features", "out_channels", "embedding_dim", "embed_dim", "hidden_size", "nf")
"""Attributes by which modules call the width of their output; ``nf`` is that of transformers' Conv1D."""

_CHANNELS_LAST = (nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNCellBase)


class Output(NamedTuple):
    """The channels of a module's output."""

    width: int
    axis: int = -1
    certain: bool = True
    """Whether the axis is known; else it is taken by the output's shape, ``axis`` being that of a layer inside."""

    def channels(self, y: Tensor) -> int:
        """The axis of y that holds the channels. ValueError, quoting its shape, if none has their width.

        Images (four axes or more) have them second or last, whichever is as wide; fewer axes have them last, unless y
        has as many as the output of the convolution inside.
        """
        axis = self.axis
        if not self.certain:
            other, axis = (-1, 1) if axis != -1 and y.ndim == 1 - axis else (1, -1)
            fits = [a for a in (axis, other) if y.shape[a] == self.width] if y.ndim > 3 or axis == 1 else []
            if len(fits) > 1 and (axis == -1 or y.ndim == 3):  # of images with a convolution inside, the second
                raise ValueError(
                    f"the output {tuple(y.shape)} has {self.width} channels on two axes; which is not known"
                )
            axis = fits[0] if fits else axis
        if not -y.ndim <= axis < y.ndim or y.shape[axis] != self.width:
            raise ValueError(f"the output {tuple(y.shape)} has not the {self.width} channels on axis {axis}")
        return axis


def output_of(module: nn.Module) -> Output:
    """The channels of a module's output, from its own attributes or the last layer inside it.

    Raises TypeError, with the reason, where that does not tell.
    """
    if isinstance(module, NEVER_CALLED):
        raise TypeError(f"a {type(module).__name__} is never called; name the modules in it")
    own = _of_layer(module)
    if own is not None:
        return own
    stated = _stated_width(module)
    inner = [(layer, found) for layer in module.modules() if (found := _of_layer(layer)) is not None]
    products = [found for layer, found in inner if not is_norm(layer) and not isinstance(layer, nn.Embedding)]
    for found in reversed(products or [found for _, found in inner]):
        if stated in (None, found.width):
            return found._replace(certain=False)
    if stated is not None:
        return Output(stated, certain=False)
    raise TypeError(
        f"how wide the output of this {type(module).__name__} is could not be found: it has none of "
        f"{', '.join(_WIDTHS[:-1])}, and no layer in it"
    )


def _of_layer(module: nn.Module) -> Output | None:
    """That of a single layer; None for anything else."""
    if isinstance(module, _ConvNd):
        return Output(module.out_channels, -1 - len(module.kernel_size))
    if isinstance(module, _NormBase):
        return Output(module.num_features, 1)
    if isinstance(module, nn.GroupNorm):
        return Output(module.num_channels, 1)
    if isinstance(module, nn.RNNBase):
        return Output((module.proj_size or module.hidden_size) * (1 + module.bidirectional))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        shape = module.normalized_shape
        return Output(shape[0], certain=is_stock(module)) if len(shape) == 1 else None
    if is_norm(module):
        return Output(len(module.weight))  # type: ignore[arg-type]
    known = isinstance(module, _CHANNELS_LAST) or type(getattr(module, "in_features", None)) is int
    width = _stated_width(module) if known or not module._modules else None
    return None if width is None else Output(width, certain=known)


def _stated_width(module: nn.Module) -> int | None:
    """What it calls the width of its output itself."""
    widths = (getattr(module, name, None) for name in _WIDTHS)
    return next((width for width in widths if type(width) is int and width > 0), None)
