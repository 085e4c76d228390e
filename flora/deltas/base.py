"""What every delta has, and those on a weight and on an output have; nothing here knows a layer or a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flora import functional
from flora.config import DeltaConfig
from flora.forms import DenseForm, Parts, Tucker
from flora.ops import Op
from flora.outputs import Output


@dataclass(frozen=True)
class Site:
    """The layer that a delta is built for."""

    shape: tuple[int, ...]
    """Of its weight, (out, in/groups, *k); for a delta that acts on the output (width, width)."""
    dtype: torch.dtype = torch.float32
    """Of the delta's parameters."""
    device: torch.device | str | None = None
    weight: Tensor | None = None
    """The frozen weight in the same order; None if the layer does not have it as plain numbers."""
    name: str = ""
    """The module's, for messages."""
    transposed: bool = False
    """Whether the layer itself keeps its weight as (in, out), as transformers' Conv1D does."""
    has_bias: bool = True
    """Whether the layer has a place for a bias, empty or not."""
    norm_offset: float | None = None
    """On a normalisation what its forward adds to the weight before it multiplies by it; None on any other layer."""
    output: Output | None = None
    """For a delta that acts on it: the channels of the module's output."""
    looked_up: bool = False
    """Whether rows of the weight are looked up, as those of an Embedding are."""
    shapes_only: bool = False
    """Only the parameters' shapes are asked for: nothing has to be drawn or decomposed."""
    most: int | None = None
    """The most numbers that a parameter can have: those of the file that it is to be filled from."""

    @property
    def label(self) -> str:
        return self.name or "layer"

    def parameter(self, *shape: int) -> nn.Parameter:
        """A parameter of zeros on the layer's device, in the delta's dtype. ValueError for one above `most`."""
        if self.most is not None and math.prod(shape) > self.most:
            raise ValueError(f"{self.label}: a parameter {shape} is asked for, and the file has {self.most} numbers")
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.device))


class Delta(nn.Module):
    """What one adapter trains on one frozen layer: subclass `WeightDelta` or `OutputDelta`.

    A subclass names its configuration, ``class MyDelta(WeightDelta, config=MyConfig)``. Its parameters are float32
    (float64 on a float64 base) and stay so when the model is cast: half-precision masters would lose small steps.

    Attributes
    ----------
    config
        the configuration it was built from, patterns already applied.
    scale
        the factor s on the update. While the layer is merged, setting it or ``strength`` is a RuntimeError.
    strength
        a second factor, which `flora.set_adapter` sets where adapters are weighted; 1 otherwise.
    shape
        the weight's shape in the order (out, in, *k), or that of a block's matrix.
    merged_in
        the name of the layer that it is merged into; None while it is not.
    """

    config_type: ClassVar[type[DeltaConfig]]
    _of_config: ClassVar[dict[type[DeltaConfig], type[Delta]]] = {}

    config: Any

    def __init_subclass__(cls, config: type[DeltaConfig] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if config is not None:
            cls.config_type = config
            Delta._of_config[config] = cls

    def __init__(self, config: DeltaConfig, site: Site) -> None:
        super().__init__()
        self.config = config
        self.scale = config.resolved_scale
        self.strength = 1.0
        self.shape = site.shape
        self.merged_in: str | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("scale", "strength") and self.__dict__.get("merged_in") is not None:
            raise RuntimeError(f"{self.merged_in}: {name}={value!r} cannot be set while it is merged; unmerge first")
        super().__setattr__(name, value)

    def set_trainable(self, trainable: bool) -> None:
        """Let the parts that the configuration names learn, or none."""
        for parameter in self.parameters():
            parameter.requires_grad_(trainable)

    def stuck(self) -> str | None:
        """Why no parameter of this delta can ever get a gradient other than zero, or None if one can."""
        return None

    @property
    def size(self) -> str:
        """What it was chosen to consist of, for reports: ranks, terms, a block's shape, or its parameters' names."""
        return ", ".join(name for name, _ in self.named_parameters())

    @property
    def factor(self) -> float:
        """What the update is multiplied by: scale times strength."""
        return self.scale * self.strength

    @property
    def dropout(self) -> float:
        """The probability that applies now: the configuration's in training, 0 in evaluation."""
        return self.config.dropout if self.training else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Everything that an adapter file must hold, trained or not, by name."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies `tensors` in. Names, shapes and finiteness are checked first: KeyError or ValueError, no change."""
        own = dict(self.named_parameters())
        if own.keys() != tensors.keys():
            missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
            raise KeyError(f"delta tensors do not fit: missing {missing}, unknown {extra}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the delta needs {tuple(own[name].shape)}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds values that are not finite")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(_keep_precision(fn), recurse)  # type: ignore[no-untyped-call]


class WeightDelta(Delta):
    """A trainable update ΔW of one frozen weight of shape (d_out, d_in/groups, *k).

    A subclass holds its parameters and says what ΔW is: by `unscaled_weight`, in plain PyTorch, or by `parts`, with a
    form of `flora.forms` that has kernels. Nothing else is needed: forward, merging, files and reports follow from it.
    """

    of_weight: ClassVar[bool] = False
    """Whether ΔW is made of W and cannot be had without it."""

    def __init__(self, config: DeltaConfig, site: Site) -> None:
        super().__init__(config, site)
        self.transposed = site.transposed

    # What a method says ---------------------------------------------------------------------------------------------

    def unscaled_weight(self, weight: Tensor | None) -> Tensor:
        """ΔW (out, in, *k) without its scale, differentiable, in the parameters' dtype, in plain PyTorch operations.

        ``weight`` is W in the same order, if the layer has it as plain numbers.
        """
        raise NotImplementedError(f"{type(self).__name__} must define unscaled_weight or parts")

    def parts(self, weight: Tensor | None) -> Parts | Tucker:
        """The form and tensors that `flora.functional` computes with; by default ΔW as one tensor."""
        with functional.exact(next(self.parameters()).device.type):
            return Parts(DenseForm(self.factor), (self.unscaled_weight(weight),))

    def bias_update(self, bias: Tensor | None) -> Tensor | None:
        """What is added to the bias (out,), which the layer need not have; None if nothing ever is."""
        return None

    # What follows ---------------------------------------------------------------------------------------------------

    def adapted(self, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        """op(x, W, b) with the delta of dropped x on top, in the plan of the configuration."""
        return functional.adapted(op, x, weight, bias, self.parts(weight), plan=self.config.plan, dropout=dropout)

    def update(self, op: Op, x: Tensor, weight: Tensor | None, dropout: float) -> Tensor:
        """s·ΔW·x of dropped x alone, in x's dtype."""
        return functional.update(op, x, weight, self.shape, self.parts(weight), dropout=dropout)

    def embedding_update(self, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        """The rows s·ΔW[ids], those of ``padding_idx`` zero."""
        return functional.embedding_update(ids, weight, self.parts(weight), padding_idx)

    def effective_weight(self, weight: Tensor) -> Tensor:
        """W + s·ΔW in W's dtype; shapes (out, in, *k); differentiable."""
        return functional.effective_weight(weight, self.parts(weight))

    def plan(self, op: Op, x: Tensor, weight: Tensor) -> str:
        """The plan that a call with this x would take in training."""
        grad = any(p.requires_grad for p in self.parameters())
        parts = self.parts(weight)
        return functional.resolve_plan(op, x, weight, parts, self.config.plan, self.dropout, grad)

    def alone(self, weight: Tensor | None) -> Tensor:
        """s·ΔW (out, in, *k) in the delta's dtype, differentiable."""
        return functional.delta_weight(weight, self.parts(weight))

    def delta_weight(self, weight: Tensor) -> Tensor:
        """s·ΔW with the shape of the layer's own weight, which is given: (out, in, *k), (in, out) for a Conv1D.

        Returned in the delta's own dtype, differentiable. Raises ValueError if the shape is another.
        """
        own = tuple(reversed(self.shape)) if self.transposed else tuple(self.shape)
        if tuple(weight.shape) != own:
            raise ValueError(f"delta_weight: the weight has shape {tuple(weight.shape)}, the delta {own}")
        return self.alone(weight.mT).mT if self.transposed else self.alone(weight)


class OutputDelta(Delta):
    """A trainable block after one frozen module, whatever that is; its configuration has ``of_output = True``.

    A subclass holds its parameters and says what becomes of the channels: `transformed`.

    Attributes
    ----------
    output
        how many channels the module's output has, and where.
    """

    def __init__(self, config: DeltaConfig, site: Site) -> None:
        super().__init__(config, site)
        assert site.output is not None
        self.output = site.output

    def transformed(self, y: Tensor) -> Tensor:
        """The output with the block on top, in y's dtype: y (..., n) to (..., n), differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define transformed")

    def unmergeable(self) -> str | None:
        """Why the block cannot be taken into the weight and bias before it, or None if it can."""
        return f"a {type(self).__name__} is no linear map"

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (n, ...) and bias (n,) with the block in them, in its parameters' dtype."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    def applied(self, y: Tensor) -> Tensor:
        """The whole output with the block on top. ValueError, quoting its shape, if it is not what the block is for."""
        if not y.is_floating_point():
            raise ValueError(f"the output is of {y.dtype}, which no block acts on")
        if y.is_nested:
            return torch.nested.as_nested_tensor([self.applied(one) for one in y.unbind()], layout=y.layout)
        axis = self.output.channels(y)
        if axis in (-1, y.ndim - 1):
            return self.transformed(y)
        return self.transformed(y.movedim(axis, -1)).movedim(-1, axis)


def all_zero(*parameters: Tensor | None) -> bool:
    """Whether there is nothing but zeros in them, as far as can be told; None is no zero."""
    return all(p is not None and not p.is_meta and torch.count_nonzero(p) == 0 for p in parameters)


def _keep_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` as `nn.Module.to` passes it, made to move tensors but never to narrow them below float32."""

    def moved(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return fn(t)
        probe = fn(t.new_empty(0))
        if probe.dtype == t.dtype:
            return fn(t)
        dtype = torch.float64 if probe.dtype == torch.float64 else torch.float32
        return t.to(device=probe.device, dtype=dtype)

    return moved
