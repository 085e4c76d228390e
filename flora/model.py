"""The verbs on whole models: adapt, add, choose and delete adapters, merge, unmerge, unload, disable.

Every verb is all or nothing: what can be checked is checked before the first change, and what fails after it is undone.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from flora import base_dtype as half
from flora.config import DeltaConfig
from flora.deltas import Delta
from flora.distributed import check_whole, settle
from flora.kinds import is_product
from flora.layers import AdaptedLayer, check_adapter_name
from flora.parameters import AdaptedModule, AdaptedParameter
from flora.saved import SavedModule
from flora.targets import Configs, Place, Selection, Target, distinct, inside, joined, places, select

_Model = TypeVar("_Model", bound=nn.Module)


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


# What is there -----------------------------------------------------------------------------------------------------


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
    state = _own_state(model)
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


def _own_state(model: nn.Module) -> State | None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    state: State | None = model.__dict__.get("_flora_state")
    for name, module in model.named_modules():
        if module is not model and "_flora_state" in module.__dict__:
            if name in ("module", "_orig_mod"):  # as DistributedDataParallel and torch.compile name what they wrap
                raise RuntimeError(f"the model is wrapped, a {type(model).__name__}: call the verb on its .{name}")
            raise RuntimeError(f"{name} was adapted by itself; call the verb on it, or unload it first")
    return state


def _check_unmerged(model: nn.Module) -> None:
    merged = [name for name, layer in adapted_layers(model).items() if layer.merged]
    if merged:
        raise RuntimeError(f"{_listed(merged)} {'are' if len(merged) > 1 else 'is'} merged; unmerge first")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name or "the layer" for name in names[:5]) + (", …" if len(names) > 5 else "")


# Adapting ----------------------------------------------------------------------------------------------------------


def adapt(
    model: _Model,
    config: Configs,
    name: str = "default",
    *,
    base_dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> _Model:
    """Put an adapter on a model, in place, and freeze everything else.

    On a model that has adapters already, the new one is added; those that are active stay active and trainable, until
    `set_adapter`. BatchNorm layers are held in evaluation mode from now on, except in ``modules_to_save``: their
    running statistics belong to the frozen base. A module that is registered in two places is adapted in both.

    Args:
        model: any module with layers in it. For a single layer use `flora.wrap`.
        config: one configuration, or a mapping of patterns to configurations: each layer takes the first whose pattern
            (a regex that must match its whole name, a dotted suffix, or "all") it matches.
        name: letters, digits, "-" and "_".
        base_dtype: torch.bfloat16 or torch.float16 casts the frozen base, for good: its weights then take half the
            memory. Normalisation stays in float32 and returns the dtype it was given; deltas and ``modules_to_save``
            are float32; floating inputs are cast. Only for the first adapter; further ones share the base.
        seed: an integer draws the adapter as right after ``torch.manual_seed(seed)``, the same in every process, and
            leaves the program's generators as they were; by default they are drawn from.

    Returns:
        The model itself.

    Raises:
        TypeError, ValueError: anything wrong with the names, patterns, ranks, layers, dtype or seed, by name. The model
            is then as it was.
        RuntimeError: the model is merged, sharded or wrapped (DistributedDataParallel, ``torch.compile``).
    """
    check_model(model)
    if seed is not None and not (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**64):
        raise ValueError(f"seed={seed!r} must be an integer from 0 to 2**64 - 1")
    if base_dtype is not None:
        half.check_base_dtype(base_dtype)
    selection = select(model, config)
    with nullcontext() if seed is None else _seeded(seed):
        install(model, name, config, selection, base_dtype=base_dtype)
    return model


def add_adapter(
    model: _Model, config: Configs, name: str, *, base_dtype: torch.dtype | None = None, seed: int | None = None
) -> _Model:
    """`adapt` under another name, for a model that has adapters already."""
    state_of(model)
    return adapt(model, config, name, base_dtype=base_dtype, seed=seed)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within it random numbers are those after ``torch.manual_seed(seed)``; afterwards as if it had not been."""
    accelerator = torch.accelerator.current_accelerator()
    devices = range(torch.accelerator.device_count()) if accelerator else ()
    with torch.random.fork_rng(devices, device_type=accelerator.type if accelerator else "cuda"):
        torch.manual_seed(seed)
        yield


def check_model(model: nn.Module) -> None:
    """Raises TypeError for no module, ValueError for a single layer, which has no place in which to be replaced.

    RuntimeError for a wrapped model: DistributedDataParallel would not reduce the gradients of parameters that it does
    not know, and a file would have names that an unwrapped model has not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, AdaptedLayer):
        raise ValueError("the model is a single layer that is adapted already; use its add_delta")
    if is_product(model) or next(model.children(), None) is None:
        raise ValueError(f"the model is a single {type(model).__name__}; use flora.wrap(layer, config)")
    for name, module in model.named_modules():
        parallel = isinstance(module, DistributedDataParallel)
        if parallel or (module is model and (isinstance(module, DataParallel) or "_orig_mod" in module._modules)):
            raise RuntimeError(
                f"{name or 'the model'} is wrapped, a {type(module).__name__}: adapt the module in it, or load its "
                "adapters, and wrap then"
            )


def install(
    model: nn.Module,
    name: str,
    config: Configs,
    selection: Selection,
    *,
    trainable: bool = True,
    fill: Callable[[Mapping[str, Delta], Mapping[str, nn.Module]], None] | None = None,
    base_dtype: torch.dtype | None = None,
) -> None:
    """Put an adapter on the modules of a selection.

    Args:
        config: what the model remembers of it; each layer of the selection has its own.
        trainable: False freezes the adapter as well.
        base_dtype: as of `adapt`, checked.
        fill: is given the deltas and the copies of ``modules_to_save`` by name before the model is changed, to load
            their values; may raise.

    Raises:
        ValueError: a name that is taken; a ``base_dtype`` for a base that other adapters use in another; with
            ``fill``, a delta that is to learn and never can.
        RuntimeError: the model is merged or sharded.
    """
    check_adapter_name(name)
    check_whole(model, "put an adapter on")
    state = _own_state(model) or (state_of(model) if adapted_layers(model) else State())
    if name in state.adapters:
        raise ValueError(f"there is already an adapter {name!r}; there are {', '.join(map(repr, state.adapters))}")
    _check_unmerged(model)
    first = not state.adapters
    if not first and base_dtype not in (None, state.base_dtype):
        kept = "the dtypes that it came in" if state.base_dtype is None else str(state.base_dtype)
        raise ValueError(
            f"base_dtype={base_dtype}: the base is kept in {kept} for {', '.join(map(repr, state.adapters))}"
        )
    dtype = base_dtype or state.base_dtype
    with ExitStack() as undo:
        undo.callback(_set_flags, [(p, p.requires_grad) for p in model.parameters()])
        flags = {} if not first else {key: p.requires_grad for key, p in base_parameters(model)}
        layers = {target.name: target.module for target in selection.layers}
        saved = {target.name: target.module for target in selection.saved}
        deltas, copies = {}, {}
        for target in selection.saved:  # before the base is cast: the copies are exact
            if not isinstance(target.module, SavedModule):
                is_head = _is_head(model, target, selection.saved)
                saved[target.name] = SavedModule(target.original, name=target.name, base_dtype=dtype, is_head=is_head)
            module = cast(SavedModule, saved[target.name])
            copies[target.name] = module.add_copy(name, trainable=trainable and first)
            release(copies[target.name])
            if module is target.module:
                undo.callback(module.copies.__delitem__, name)
        if first and dtype is not None:
            half.cast((target.original for target in distinct(places(model))), dtype, undo)
        owners: dict[int, AdaptedModule] = {}
        for target in selection.layers:
            if target.parameter:
                if id(target.original) not in owners:
                    owners[id(target.original)] = _owner(target)
                owner = layers[target.name] = owners[id(target.original)]
                new = target.parameter not in owner.adapted
                layer: AdaptedLayer = (
                    owner.add(target.parameter, target.name) if new else owner.adapted[target.parameter]
                )
                if new and owner is target.module:
                    undo.callback(owner.remove, target.parameter)
            else:
                if not isinstance(target.module, AdaptedLayer):
                    layers[target.name] = AdaptedLayer(target.original, name=target.name)
                layer = cast(AdaptedLayer, layers[target.name])
                new = layer is not target.module
            assert target.config is not None
            deltas[target.name] = layer.add_delta(
                name, target.config, trainable=trainable, shapes_only=fill is not None
            )
            if not new:
                undo.callback(layer.delete_delta, name)
        if fill is not None:
            fill(deltas, copies)
        if fill is not None and trainable:
            _check_learning(deltas)
        if not first:  # it waits for `set_adapter`
            for delta in deltas.values():
                delta.set_trainable(False)

        for target in (*selection.layers, *selection.saved):
            standing = layers.get(target.name) or saved[target.name]
            for place in target.places:
                place.put(standing)
                undo.callback(place.put, place.module)
        adapter = Adapter(
            _without_functions(config, selection),
            {target.name: target.pattern for target in selection.layers},
            selection.left_alone,
        )
        if first:
            state = State({name: adapter}, (name,), flags, dtype)
            for _, parameter in base_parameters(model):
                parameter.requires_grad_(False)
        else:
            state = replace(state, adapters={**state.adapters, name: adapter})
        undo.pop_all()
    _set_state(model, state)
    _activate(model, state.active)
    _hold_base(model)


def _owner(target: Target) -> AdaptedModule:
    """What stands, or will stand, for the module of a parameter."""
    if isinstance(target.module, AdaptedModule):
        return target.module
    return AdaptedModule(target.original, name=target.places[0].name)


def _is_head(model: nn.Module, target: Target, saved: Sequence[Target]) -> bool:
    """Whether nothing with parameters is registered after a module but others that are trained whole."""
    whole = {place.name for other in saved for place in other.places}
    rest = reversed([place for place in places(model) if any(True for _ in place.original.parameters(recurse=False))])
    names = [place.name for place in target.places]
    last = next((place.name for place in rest if inside(place.name, names) or not inside(place.name, whole)), None)
    return last is not None and inside(last, names)


def _check_learning(deltas: Mapping[str, Delta]) -> None:
    for where, delta in deltas.items():
        reason = delta.stuck()
        if reason is not None:
            raise ValueError(f"{where}: the delta could never learn, as {reason}; trainable=False takes it as it is")


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the unadapted model, by all of their names."""
    for place in places(model):
        for key, parameter in place.original._parameters.items():
            if parameter is not None:
                yield joined(place.name, key), parameter


def _without_functions(config: Configs, selection: Selection) -> Configs:
    """The configuration with the names that a function selected in the function's place."""

    def named(own: DeltaConfig) -> DeltaConfig:
        if callable(own.target_modules):
            own = replace(own, target_modules=tuple(t.name for t in selection.layers if not t.parameter))
        if callable(own.target_parameters):
            own = replace(own, target_parameters=tuple(t.name for t in selection.layers if t.parameter))
        return replace(own, exclude_modules=None) if callable(own.exclude_modules) else own

    if isinstance(config, Mapping):
        return {pattern: named(own) for pattern, own in config.items()}
    return named(config)


def _set_flags(flags: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _set_state(model: nn.Module, state: State | None) -> None:
    if state is not None:
        model.__dict__["_flora_state"] = state
    else:
        model.__dict__.pop("_flora_state", None)


# Hooks -------------------------------------------------------------------------------------------------------------


def hold_eval(module: nn.Module, args: Any) -> None:
    """A forward pre-hook: a frozen norm layer normalises with, and keeps, its running statistics, whatever its mode."""
    if module.training:
        module.training = False


def _watched(model: nn.Module) -> State | None:
    """The state, where this forward is the training step that is to show that it reaches every delta."""
    state: State | None = model.__dict__.get("_flora_state")
    if torch.compiler.is_compiling() or state is None or not state.watching:
        return None
    if not model.training or not torch.is_grad_enabled() or state.watched not in (None, threading.get_ident()):
        return None
    away = any(layer.merged or not layer.enabled for layer in adapted_layers(model).values())
    return None if away else state


def forget_reached(model: nn.Module, args: Any) -> None:
    """A forward pre-hook: what ran before the first training step, an evaluation say, does not count."""
    state = _watched(model)
    if state is not None:
        state.watched = threading.get_ident()
        for layer in adapted_layers(model).values():
            layer.reached = False


def warn_unreached(model: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: after the first training step, warn about deltas that it did not reach."""
    state = _watched(model)
    if state is None or state.watched is None:
        return
    state.watching, state.watched = False, None
    missed = [name for name, layer in adapted_layers(model).items() if not layer.reached and _learns(layer)]
    if missed:
        warnings.warn(
            f"the forward did not reach the deltas of {_listed(missed)}: they will not learn; exclude_modules can "
            "leave such layers out",
            stacklevel=2,
        )


def _learns(layer: AdaptedLayer) -> bool:
    return any(p.requires_grad for name in layer.active for p in layer.deltas[name].parameters())


def _hold_base(model: nn.Module) -> None:
    """Hold the base's running statistics and its dtype, and watch whether a training step reaches the deltas."""
    state = _own_state(model)
    if state is not None and state.base_dtype is not None:
        modules = [(place.original, _called(place)) for place in places(model)]
        half.hold(model, modules, state.base_dtype)
    for place in places(model):
        module = place.original
        if isinstance(module, _NormBase) and hold_eval not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hold_eval)
    if warn_unreached not in model._forward_hooks.values():
        model.register_forward_pre_hook(forget_reached)
        model.register_forward_hook(warn_unreached)


def _called(place: Place) -> nn.Module:
    """The module that is called for the one of the unadapted model: a layer's own hooks would cost it its fast path."""
    return place.module if isinstance(place.module, AdaptedLayer) else place.original


def release(root: nn.Module) -> None:
    """Take the hooks of `_hold_base` off every module under a root; what was held follows the root's mode again."""
    ours = (hold_eval, forget_reached, warn_unreached)
    for module in root.modules():
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [k for k, hook in hooks.items() if hook in ours or isinstance(hook, half.HOOKS)]:
                with_kwargs.pop(key, None)
                if hooks.pop(key) is hold_eval:
                    module.training = root.training


# Choosing ----------------------------------------------------------------------------------------------------------


def set_adapter(
    model: nn.Module,
    name: str | Sequence[str] | Mapping[str, float],
    *,
    trainable: bool | Sequence[str] = True,
) -> None:
    """Make one adapter active, or several, and decide which of them learn.

    Updates of the same weight add. Several blocks after the same module do not: each is applied to what those before it
    returned, in the order of the names here.

    Afterwards exactly the adapters that ``trainable`` means require gradients, whatever was before; all others, and
    the base, do not. DistributedDataParallel looks at what requires gradients when it is built: set the adapters first,
    or keep ``trainable`` the same from then on (and ``find_unused_parameters=True``, if some of them rest).

    Args:
        name: one adapter, several, or several with weights: a mapping of names to the finite numbers that their updates
            are multiplied by, beside their own scales, until the next call. Files hold no weights.
        trainable: True: those that are active learn; False: none; or the names of those that do.

    Raises:
        ValueError: no name, an unknown one, a weight that is no finite number, or two adapters that train the same
            module whole.
        RuntimeError: no adapters in the model, or some are merged.
    """
    state = state_of(model)
    for what, value in (("name", name), ("trainable", trainable)):
        if not isinstance(value, str | Iterable) and not (what == "trainable" and isinstance(value, bool)):
            raise TypeError(f"{what}={value!r} must be a name or names of adapters")
    weights = dict(name) if isinstance(name, Mapping) else dict.fromkeys([name] if isinstance(name, str) else name, 1.0)
    if not weights:
        raise ValueError(f"name={name!r} must name an adapter; flora.disabled runs the model without")
    learning = list(weights) if trainable is True else [] if trainable is False else _listed_names(trainable)
    for one in (*weights, *learning):
        check_adapter(state, one)
    for one, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"name={name!r}: the weight {weight!r} of {one!r} must be a finite number")
    _check_unmerged(model)
    settle(model)
    for where, module in saved_modules(model).items():
        owners = [one for one in weights if one in module.copies]
        if len(owners) > 1:
            raise ValueError(
                f"{where}: only one of {', '.join(map(repr, owners))}, which all train it whole, can be active"
            )
    state.active = tuple(weights)
    _activate(model, state.active)
    for layer in adapted_layers(model).values():
        for one, delta in layer.adapters():
            delta.strength = float(weights.get(one, 1.0))
            delta.set_trainable(one in learning)
    for module in saved_modules(model).values():
        for one in module.copies:
            module.set_trainable(one, one in learning)


def _listed_names(names: Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _activate(model: nn.Module, names: Sequence[str]) -> None:
    for layer in adapted_layers(model).values():
        layer.set_active([name for name in names if name in layer.deltas])
    for module in saved_modules(model).values():
        module.active = next((name for name in names if name in module.copies), None)
    state = _own_state(model)
    if state is not None:
        state.watching, state.watched = True, None


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; modules that no other adapter uses are the original ones again.

    If it was the only active one, none is active afterwards. Removing the last one leaves the unadapted model.

    Raises:
        ValueError: no such adapter.
        RuntimeError: no adapters in the model, or some are merged; the model is sharded.
    """
    state = state_of(model)
    check_adapter(state, name)
    _check_unmerged(model)
    check_whole(model, "delete an adapter of")
    if len(state.adapters) == 1:
        unload(model, merge=False)
        return
    del state.adapters[name]
    state.active = tuple(one for one in state.active if one != name)
    for layer in adapted_layers(model).values():
        if name in layer.deltas:
            layer.delete_delta(name)
    for module in saved_modules(model).values():
        if name in module.copies:
            del module.copies[name]
    for place in list(places(model)):
        standing = place.module
        if isinstance(standing, AdaptedModule):
            for key in [key for key, parameter in standing.adapted.items() if not parameter.deltas]:
                standing.remove(key)
        if isinstance(standing, AdaptedLayer | AdaptedModule | SavedModule) and not _held(standing):
            place.put(standing.unload(merge=False) if isinstance(standing, AdaptedLayer) else standing.base_layer)
    _activate(model, state.active)
    _hold_base(model)


def _held(standing: AdaptedLayer | AdaptedModule | SavedModule) -> Any:
    """What adapters have put on it."""
    if isinstance(standing, SavedModule):
        return standing.copies
    return standing.deltas if isinstance(standing, AdaptedLayer) else standing.adapted


# Merging -----------------------------------------------------------------------------------------------------------


def merge(model: nn.Module) -> None:
    """Put W + s·ΔW of the active adapters into the weights, until `unmerge`.

    A weight that is tied to another module's is untied: the other keeps the original.

    Raises:
        RuntimeError: a layer that cannot be merged, by name; nothing to merge; no adapters; the model is sharded. No
            layer is merged then.
    """
    state_of(model)
    check_whole(model, "merge")
    _merge(model)


def _merge(model: nn.Module) -> None:
    layers = adapted_layers(model)
    waiting = {name: layer for name, layer in layers.items() if layer.active and not layer.merged}
    if not waiting:
        merged = any(layer.merged for layer in layers.values())
        raise RuntimeError("the active adapters are merged already" if merged else "no adapter is active")
    _check_mergeable(waiting)
    with ExitStack() as undo:
        for layer in waiting.values():
            layer.merge()
            undo.callback(layer.unmerge)
        undo.pop_all()


def _check_mergeable(layers: Mapping[str, AdaptedLayer]) -> None:
    reasons = {name: layer.check_mergeable() for name, layer in layers.items()}
    refused = [f"{name or 'the layer'}: {reason}" for name, reason in reasons.items() if reason is not None]
    if refused:
        raise RuntimeError(f"cannot merge {'; '.join(refused[:5])}" + ("; …" if len(refused) > 5 else ""))


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, bit for bit.

    Raises:
        RuntimeError: nothing is merged, or no adapters; the model is sharded.
    """
    state_of(model)
    check_whole(model, "unmerge")
    merged = [layer for layer in adapted_layers(model).values() if layer.merged]
    if not merged:
        raise RuntimeError("no adapter is merged")
    for layer in merged:
        layer.unmerge()


def unload(model: nn.Module, merge: bool = True) -> nn.Module:
    """Take all adapters off the model, in place.

    Args:
        merge: True leaves W + s·ΔW of the active adapters in the weights, and their trained copies of
            ``modules_to_save``; False restores the original modules.

    Returns:
        The plain model: the same object, unless it is itself an adapted layer. With a ``base_dtype`` all of it is in
        that dtype, as after ``model.to(base_dtype)``, but for vectors of numbers that no state_dict has.

    Raises:
        RuntimeError: a layer that cannot be merged, by name; no adapters; a sharded model. The model is then as it was.
    """
    state = state_of(model)
    check_whole(model, "unload")
    if merge and any(layer.active and not layer.merged for layer in adapted_layers(model).values()):
        _merge(model)
    result = model
    plain: dict[int, nn.Module] = {}
    for place in reversed(list(places(model))):  # children first
        standing = place.module
        if isinstance(standing, AdaptedLayer | AdaptedModule | SavedModule) and id(standing) not in plain:
            if isinstance(standing, AdaptedLayer):
                plain[id(standing)] = standing.unload(merge)
            elif isinstance(standing, AdaptedModule):
                for adapted in standing.adapted.values():
                    adapted.unload(merge)
                plain[id(standing)] = standing.base_layer
            else:
                standing.enabled = True
                plain[id(standing)] = standing.current if merge else standing.base_layer
        if id(standing) in plain:
            if place.parent is None:
                result = plain[id(standing)]
            else:
                place.put(plain[id(standing)])
    release(result)
    _set_state(model, None)
    if state.base_dtype is not None:
        with ExitStack() as undo:
            half.cast(result.modules(), state.base_dtype, undo, whole=True)
            undo.pop_all()
    for key, parameter in base_parameters(result):
        if key in state.requires_grad:
            parameter.requires_grad_(state.requires_grad[key])
    return result


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the ``with`` block the model is exactly the frozen base, also while merged.

    Raises:
        RuntimeError: no adapters; a model that was merged and then sharded.
    """
    state_of(model)
    if any(layer.merged for layer in adapted_layers(model).values()):
        check_whole(model, "switch off the merged adapters of")
    modules: list[AdaptedLayer | SavedModule] = [*adapted_layers(model).values(), *saved_modules(model).values()]
    before = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = False
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled
