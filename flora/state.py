"""What a model remembers of its adapters, and what of them is in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn

from flora.deltas import Delta
from flora.layers import AdaptedLayer
from flora.parameters import AdaptedModule, AdaptedParameter
from flora.saved import SavedModule
from flora.targets import Configs, distinct, joined, places


@dataclass
class Adapter:
    """What a model remembers of one adapter."""

    config: Configs
    patterns: dict[str, str] = field(default_factory=dict)
    """The pattern of the mapping that each layer matched, by the layer's name; "" if one configuration serves all."""
    left_alone: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Class and reason, by name, of what was left alone."""


@dataclass
class State:
    """What a model remembers of its adapters. It holds no module, so that models can be copied and pickled."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    requires_grad: dict[str, bool] = field(default_factory=dict)
    """Of every parameter of the unadapted model, by name."""
    base_dtype: torch.dtype | None = None
    """The dtype that the base was cast to; None for a base as it came."""
    watching: bool = False
    """Whether the next training step is still to show that it reaches every delta."""
    watched: int | None = None
    """The thread that such a step has begun in; those that others begin meanwhile show nothing."""


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers and parameters by their (first) names in the unadapted model."""
    layers: dict[str, AdaptedLayer] = {}
    for target in distinct(places(model)):
        if isinstance(target.module, AdaptedLayer):
            layers[target.name] = target.module
        elif isinstance(target.module, AdaptedModule):
            layers.update({joined(target.name, key): each for key, each in target.module.adapted.items()})
    return layers


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """The modules that some adapter trains whole, by their (first) names in the unadapted model."""
    found = distinct(place for place in places(model) if isinstance(place.module, SavedModule))
    return {target.name: cast(SavedModule, target.module) for target in found}


def state_of(model: nn.Module) -> State:
    """The state of an adapted model, or one that describes the wrapped layers that a model was built from.

    Raises:
        TypeError: not a module.
        RuntimeError: no adapter in it, or a part of it was adapted by itself.
    """
    state = own_state(model)
    if state is not None:
        return state
    layers = adapted_layers(model)
    if not layers:
        raise RuntimeError(f"{type(model).__name__} has no adapters; flora.adapt adds one")
    state = State()
    for adapter in dict.fromkeys(adapter for layer in layers.values() for adapter in layer.deltas):
        configs = {
            name: cast(Delta, layer.deltas[adapter]).config for name, layer in layers.items() if adapter in layer.deltas
        }
        first = next(iter(configs.values()))
        if all(config == first for config in configs.values()):
            named = first if "" in configs else replace(first, **_selecting(layers, configs))
            state.adapters[adapter] = Adapter(named, dict.fromkeys(configs, ""))
        else:
            state.adapters[adapter] = Adapter(configs, {name: name for name in configs})
    state.active = tuple(dict.fromkeys(adapter for layer in layers.values() for adapter in layer.active))
    return state


def _selecting(layers: Mapping[str, AdaptedLayer], names: Iterable[str]) -> dict[str, Any]:
    """The fields of a configuration that select exactly these layers and parameters."""
    parameters = {name for name in names if isinstance(layers[name], AdaptedParameter)}
    modules = tuple(name for name in names if name not in parameters)
    return {"target_modules": modules, "target_parameters": tuple(parameters) or None}


def check_adapter(state: State, name: str) -> None:
    """Raises ValueError, listing what there is, if no adapter has the name."""
    if name not in state.adapters:
        raise ValueError(f"there is no adapter {name!r}; there are {', '.join(map(repr, state.adapters))}")


def own_state(model: nn.Module) -> State | None:
    """What the model itself remembers, if anything; TypeError and RuntimeError as of `state_of`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    state: State | None = model.__dict__.get("_flora_state")
    for name, module in model.named_modules():
        if module is not model and "_flora_state" in module.__dict__:
            if name in ("module", "_orig_mod"):  # as DistributedDataParallel and torch.compile name what they wrap
                raise RuntimeError(f"the model is wrapped, a {type(model).__name__}: call the verb on its .{name}")
            raise RuntimeError(f"{name} was adapted by itself; call the verb on it, or unload it first")
    return state


def check_unmerged(model: nn.Module) -> None:
    """Raises RuntimeError, naming the layers, if some are merged."""
    merged = [name for name, layer in adapted_layers(model).items() if layer.merged]
    if merged:
        raise RuntimeError(f"{listed(merged)} {'are' if len(merged) > 1 else 'is'} merged; unmerge first")


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first few of them."""
    return ", ".join(name or "the layer" for name in names[:5]) + (", …" if len(names) > 5 else "")


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the unadapted model, by all of their names."""
    for place in places(model):
        for key, parameter in place.original._parameters.items():
            if parameter is not None:
                yield joined(place.name, key), parameter


def set_state(model: nn.Module, state: State | None) -> None:
    """Let a model remember its adapters, or nothing."""
    if state is not None:
        model.__dict__["_flora_state"] = state
    else:
        model.__dict__.pop("_flora_state", None)
