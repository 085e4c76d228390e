"""The verbs on whole models: adapt, add, choose and delete adapters, merge, unmerge, unload, disable.

Every verb is all or nothing: what can be checked is checked before the first change, and what fails after it is undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from flora import base_dtype as half
from flora.config import DeltaConfig
from flora.config.base import is_real
from flora.deltas import Delta
from flora.distributed import check_whole, settle
from flora.hooks import hold_base, release, watch
from flora.kinds import is_product
from flora.layers import AdaptedLayer, check_adapter_name
from flora.merging import MAX_LOSS, MergeReport
from flora.parameters import AdaptedModule
from flora.saved import SavedModule
from flora.state import (
    Adapter,
    State,
    adapted_layers,
    base_parameters,
    check_adapter,
    check_unmerged,
    own_state,
    saved_modules,
    set_state,
    state_of,
)
from flora.targets import Configs, Selection, Target, distinct, inside, places, select

_Model = TypeVar("_Model", bound=nn.Module)


class Fill(Protocol):
    """Where the values of an adapter come from that is not drawn."""

    def elements(self, where: str) -> int:
        """How many numbers there are for a module."""

    def __call__(self, deltas: Mapping[str, Delta], copies: Mapping[str, nn.Module]) -> None:
        """Load the values of deltas and of copies of ``modules_to_save``, by name."""


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
    fill: Fill | None = None,
    base_dtype: torch.dtype | None = None,
) -> None:
    """Put an adapter on the modules of a selection.

    Args:
        config: what the model remembers of it; each layer of the selection has its own.
        trainable: False freezes the adapter as well.
        base_dtype: as of `adapt`, checked.
        fill: loads the values before the model is changed; may raise.

    Raises:
        ValueError: a name that is taken; a ``base_dtype`` for a base that other adapters use in another; with
            ``fill``, a delta that is to learn and never can.
        RuntimeError: the model is merged or sharded.
    """
    check_adapter_name(name)
    check_whole(model, "put an adapter on")
    state = own_state(model) or (state_of(model) if adapted_layers(model) else State())
    if name in state.adapters:
        raise ValueError(f"there is already an adapter {name!r}; there are {', '.join(map(repr, state.adapters))}")
    check_unmerged(model)
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
                name,
                target.config,
                trainable=trainable,
                shapes_only=fill is not None,
                most=None if fill is None else fill.elements(target.name),
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
    set_state(model, state)
    _activate(model, state.active)
    hold_base(model)


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
        if not is_real(weight):
            raise ValueError(f"name={name!r}: the weight {weight!r} of {one!r} must be a finite number")
    check_unmerged(model)
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
    watch(model)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; modules that no other adapter uses are the original ones again.

    If it was the only active one, none is active afterwards. Removing the last one leaves the unadapted model.

    Raises:
        ValueError: no such adapter.
        RuntimeError: no adapters in the model, or some are merged; the model is sharded.
    """
    state = state_of(model)
    check_adapter(state, name)
    check_unmerged(model)
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
    hold_base(model)


def _held(standing: AdaptedLayer | AdaptedModule | SavedModule) -> Any:
    """What adapters have put on it."""
    if isinstance(standing, SavedModule):
        return standing.copies
    return standing.deltas if isinstance(standing, AdaptedLayer) else standing.adapted


# Merging -----------------------------------------------------------------------------------------------------------


def merge(model: nn.Module, *, safe: bool = False, max_loss: float = MAX_LOSS) -> MergeReport:
    """Put W + s·ΔW of the active adapters into the weights, until `unmerge`.

    The sum is computed in float32 (float64 for a float64 base) and rounded once to the base's dtype. In bfloat16 and
    float16 a ΔW that is small beside W is partly lost by that: how much, the report says. A weight that is tied to
    another module's is untied: the other keeps the original.

    Args:
        safe: refuse, before anything is changed, weights that are not finite or lose more than ``max_loss``.
        max_loss: the largest share of a layer's update that ``safe`` lets rounding take; above 0.

    Returns:
        What was lost, by layer.

    Raises:
        ValueError: a ``max_loss`` that is no number above 0.
        RuntimeError: a layer that cannot be merged, by name; nothing to merge; no adapters; the model is sharded. No
            layer is merged then.
    """
    if not is_real(max_loss) or max_loss <= 0:
        raise ValueError(f"max_loss={max_loss!r} must be a number above 0")
    state_of(model)
    check_whole(model, "merge")
    return _merge(model, safe, max_loss)


def _merge(model: nn.Module, safe: bool = False, max_loss: float = MAX_LOSS) -> MergeReport:
    layers = adapted_layers(model)
    waiting = {name: layer for name, layer in layers.items() if layer.active and not layer.merged}
    if not waiting:
        merged = any(layer.merged for layer in layers.values())
        raise RuntimeError("the active adapters are merged already" if merged else "no adapter is active")
    _check_mergeable(waiting)
    lost = {}
    with ExitStack() as undo:
        for name, layer in waiting.items():
            lost[name] = layer.merge(safe=safe, max_loss=max_loss)
            undo.callback(layer.unmerge)
        undo.pop_all()
    return MergeReport(lost)


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
    watch(model)


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
    set_state(model, None)
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
