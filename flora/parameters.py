"""Deltas on parameters of modules that are no layers, as the experts of a mixture kept in one tensor.

An `AdaptedModule` stands for the module that owns them and runs its forward under `Intercept`; an `AdaptedParameter`
is to one parameter what an `AdaptedLayer` is to a layer's weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from flora.config import DeltaConfig
from flora.deltas import Site
from flora.functional import compute_dtype
from flora.intercept import Intercept, Watch
from flora.kinds import Kind, describe, kind_of
from flora.layers import AdaptedLayer, is_protocol
from flora.ops import Op
from flora.outputs import NEVER_CALLED

MOST_MODES = 5
"""Of a weight that the kernels build."""

_PREFIX = "adapted_"  # of children's names, which may be no methods of nn.Module


class ParameterKind(Kind):
    """A parameter of a module that is no layer; its modes are in the parameter's own order."""

    name = "parameter"
    droppable = shiftable = False

    def __init__(self, key: str) -> None:
        self.weight_name = key

    def __reduce__(self) -> Any:
        return ParameterKind, (self.weight_name,)


class AdaptedParameter(AdaptedLayer):
    """One parameter of a module, and its deltas. It is never called itself: `AdaptedModule` is.

    ``base_layer`` is the module that owns the parameter, and no child of this one.
    """

    def __init__(self, owner: nn.Module, key: str, name: str) -> None:
        self.__dict__["_key"] = key
        super().__init__(owner, name=name)

    def _kind_of(self, base_layer: nn.Module) -> Kind:
        reason = refused_owner(base_layer, self._key)
        if reason is not None:
            raise TypeError(reason)
        return ParameterKind(self._key)

    def _hold(self, base_layer: nn.Module) -> None:
        self.__dict__["base_layer"] = base_layer
        self._base_weight().requires_grad_(False)

    def _unfit(self, config: DeltaConfig) -> str | None:
        return unfit_parameter(self.base_layer, self._key, config)

    def _undroppable(self, config: DeltaConfig) -> str | None:
        return undroppable_parameter(config)

    def _site(self, config: DeltaConfig, shapes_only: bool) -> Site:
        return parameter_site(self.base_layer, self._key, self._label, shapes_only)

    def watch(self) -> Watch:
        """What puts the active deltas into the forward of the parameter's module."""
        deltas, base, key = self._deltas(), self.base_layer, self._key

        def is_weight(tensor: Tensor) -> bool:
            return tensor is base._parameters.get(key)

        def stock(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._call(op, x, weight, bias, deltas)

        return Watch(self._label, is_weight, lambda weight: self._effective(weight, deltas), stock)

    def check(self, watch: Watch, grad: bool) -> None:
        """After a forward, begun with gradients or not. A parameter need not be used in every forward.

        Raises RuntimeError, naming the parameter, if it was used such that its deltas could not learn.
        """
        if not watch.used:
            return
        if self.training or grad:
            self.reached = True
        if grad and not watch.learns and any(p.requires_grad for d in self._deltas() for p in d.parameters()):
            raise RuntimeError(
                f"{self._label}: the forward of {describe(self.base_layer)} used it only where gradients are off (in "
                "an autograd.Function of its own, perhaps), so the delta could not learn; leave it out"
            )

    def read(self) -> Tensor:
        """The parameter as an attribute of its module."""
        return self._read_weight(self._deltas(), overridable=False) if self._in_use() else self._base_weight()

    __setattr__ = nn.Module.__setattr__
    state_dict = nn.Module.state_dict  # the module's, not this, has the parameter


class AdaptedModule(nn.Module):
    """A module and deltas on some of its parameters; takes its place in a model and answers its attributes.

    Its children are the module, ``base_layer``, and an `AdaptedParameter` for each parameter that has deltas.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, *, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.base_layer = base_layer
        self.training = base_layer.training

    @property
    def adapted(self) -> dict[str, AdaptedParameter]:
        """The parameters that have deltas, by their names in the module."""
        return {module._key: module for module in self._modules.values() if isinstance(module, AdaptedParameter)}

    def add(self, key: str, name: str) -> AdaptedParameter:
        """Make a parameter, whose full name is ``name``, one that deltas can be put on. TypeError where none can."""
        parameter = AdaptedParameter(self.base_layer, key, name)
        self.add_module(_PREFIX + key, parameter)
        return parameter

    def remove(self, key: str) -> None:
        del self._modules[_PREFIX + key]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for these arguments, computed with W + s·ΔW of its adapted parameters."""
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        used = [parameter for parameter in self.adapted.values() if parameter._in_use()]
        if not used:
            return base(*args, **kwargs)
        grad, watches = torch.is_grad_enabled(), [parameter.watch() for parameter in used]
        with Intercept(*watches):
            y = base(*args, **kwargs)
        for parameter, watch in zip(used, watches, strict=True):
            parameter.check(watch, grad)
        return y

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if is_protocol(name) or "base_layer" not in modules:
            raise AttributeError(name)  # while it is being built, copied or unpickled
        parameter = modules.get(_PREFIX + name)
        return getattr(modules["base_layer"], name) if parameter is None else parameter.read()

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base_layer")
        own = name in self.__dict__ or name in self.__dict__.get("_modules", {}) or hasattr(type(self), name)
        if base is None or own or not hasattr(base, name):
            super().__setattr__(name, value)
            return
        parameter = self.adapted.get(name)
        if parameter is not None and parameter.merged:
            raise RuntimeError(f"{parameter.name}: it cannot be set while an adapter is merged; unmerge first")
        setattr(base, name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.state_dict`; the parameters are the frozen ones, merged or not."""
        state = super().state_dict(*args, **kwargs)
        for parameter in self.adapted.values():
            for key, original in parameter._original.items():
                assert original is not None
                state[f"{kwargs.get('prefix', '')}base_layer.{key}"] = (
                    original if kwargs.get("keep_vars") else original.detach()
                )
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for parameter in self.adapted.values():
            parameter.put_aside()
        super()._load_from_state_dict(*args, **kwargs)


# Which -------------------------------------------------------------------------------------------------------------


def refused_owner(owner: nn.Module, key: str) -> str | None:
    """Why a module's parameter can have no deltas, whatever the configuration, or None."""
    kind = describe(owner)
    if isinstance(owner, NEVER_CALLED):
        return f"its {kind} is never called, and the module that reads it cannot be told"
    if isinstance(owner, LazyModuleMixin) and owner.has_uninitialized_params():
        return f"a {kind} has no weight before its first forward"
    if isinstance(owner, nn.RNNBase):
        return f"a {kind} keeps its weights in a list of its own"
    if isinstance(owner, nn.Embedding):
        return f"it is the weight of an {kind}, which target_modules can name, unless it has a max_norm"
    try:
        own = kind_of(owner)
    except TypeError:
        own = None
    if own is not None:
        weight = key == own.weight_name or own.opaque
        return f"it is the {'weight' if weight else key} of a {kind}, a layer; target_modules names those"
    parameter = owner._parameters[key]
    assert parameter is not None
    shape = tuple(parameter.shape)
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        return f"it is no parameter of plain floating-point numbers: {type(parameter).__name__} of {parameter.dtype}"
    if not 2 <= len(shape) <= MOST_MODES:
        return f"it has the shape {shape}, and a delta needs 2 to {MOST_MODES} modes"
    return f"it is empty: shape {shape}" if 0 in shape else None


def unfit_parameter(owner: nn.Module, key: str, config: DeltaConfig) -> str | None:
    """Why a configuration's deltas cannot be put on a parameter, whatever its dropout, or None if they can."""
    reason = refused_owner(owner, key)
    if reason is not None:
        return reason
    shape, method = tuple(owner._parameters[key].shape), type(config).__name__  # type: ignore[union-attr]
    if config.of_output:
        return f"{method} acts on the output of a module, which target_modules names"
    if len(shape) > 2 and not config.rank_by_mode:
        return f"{method} is of matrices and it has the shape {shape} (TuckerConfig takes it)"
    reason = config.refuses("parameter", owner)
    return None if reason is None else f"{method} cannot adapt it: {reason}"


def undroppable_parameter(config: DeltaConfig) -> str | None:
    """Why the configuration's dropout is not possible on a parameter that its deltas fit."""
    if config.dropout == 0:
        return None
    return f"dropout={config.dropout} is not possible on a parameter, whose delta has no input of its own"


def parameter_site(owner: nn.Module, key: str, name: str, shapes_only: bool = False) -> Site:
    """What a delta has to know of an unadapted parameter, which it fits."""
    weight: Tensor = owner._parameters[key]  # type: ignore[assignment]
    return Site(
        tuple(weight.shape),
        compute_dtype(weight.dtype),
        weight.device,
        weight,
        name,
        has_bias=False,
        shapes_only=shapes_only,
    )
