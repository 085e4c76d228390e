"""Which modules and parameters of a model a configuration means. Nothing here changes a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from flora.config import DeltaConfig, ParameterTargets, Targets, is_suffix, matches
from flora.deltas import Site
from flora.kinds import delta_shape, describe, is_adaptable, is_foreign, refusal, unfit
from flora.layers import AdaptedLayer, site_of
from flora.outputs import NEVER_CALLED
from flora.parameters import (
    AdaptedModule,
    parameter_site,
    refused_owner,
    undroppable_parameter,
    unfit_parameter,
)
from flora.saved import SavedModule

Configs = DeltaConfig | Mapping[str, DeltaConfig]

_LONGEST_ADVICE = 100  # characters of a regex that a message proposes


@dataclass(frozen=True)
class Place:
    """Where a module of the unadapted model is registered."""

    name: str
    """Its dotted name in the unadapted model; "" for the root."""
    module: nn.Module
    """What is registered there: the original, or the AdaptedLayer, AdaptedModule or SavedModule that stands for it."""
    parent: nn.Module | None
    key: str

    @property
    def original(self) -> nn.Module:
        """The module of the unadapted model."""
        if isinstance(self.module, AdaptedLayer | AdaptedModule | SavedModule):
            return self.module.base_layer
        return self.module

    def put(self, module: nn.Module) -> None:
        """Register another module here."""
        assert self.parent is not None
        setattr(self.parent, self.key, module)


@dataclass(frozen=True)
class Target:
    """One module, or one parameter of a module, wherever the module is registered."""

    name: str
    """Its first name."""
    places: list[Place]
    """Of the module."""
    config: DeltaConfig | None = None
    """For a layer to adapt: its own configuration, patterns applied."""
    pattern: str = ""
    """For a layer to adapt: the pattern of the mapping that it matched; "" if one configuration serves all."""
    parameter: str = ""
    """The parameter's name in its module; "" for a module."""

    @property
    def original(self) -> nn.Module:
        """The module of the unadapted model."""
        return self.places[0].original

    @property
    def held(self) -> nn.Parameter:
        """The parameter itself."""
        held = self.original._parameters[self.parameter]
        assert held is not None
        return held

    @property
    def module(self) -> nn.Module:
        """What is registered for it now."""
        return self.places[0].module

    def any(self, test: Callable[[str], bool]) -> bool:
        """Whether one of its names passes a test."""
        return any(test(joined(place.name, self.parameter)) for place in self.places)

    def own(self, config: DeltaConfig) -> DeltaConfig:
        """A configuration for this one alone, its patterns applied."""
        return config.for_parameter(self.name) if self.parameter else config.for_module(self.name)

    def shape(self, config: DeltaConfig) -> tuple[int, ...]:
        """The shape of what the configuration's delta stands for: a weight's, or a block's matrix."""
        return tuple(self.held.shape) if self.parameter else delta_shape(self.original, config)

    def site(self, config: DeltaConfig) -> Site:
        """What the configuration's delta has to know of it; which fits."""
        if self.parameter:
            return parameter_site(self.original, self.parameter, self.name)
        return site_of(self.original, config, self.name)


@dataclass(frozen=True)
class Selection:
    """What a configuration means in a model."""

    layers: list[Target]
    saved: list[Target]
    left_alone: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Class and reason, by name, of every module with a weight of its own that is neither adapted nor saved."""


def places(model: nn.Module) -> Iterator[Place]:
    """Every module by every name of the unadapted model, parents first; what the library put there is seen through."""

    def walk(place: Place) -> Iterator[Place]:
        yield place
        parent = place.original
        for key, child in parent._modules.items():
            if child is not None:
                yield from walk(Place(joined(place.name, key), child, parent, key))

    return walk(Place("", model, None, ""))


def joined(name: str, key: str) -> str:
    """A module's dotted name and the name of something in it."""
    return f"{name}.{key}" if name and key else name or key


def distinct(found: Iterable[Place]) -> list[Target]:
    """The places of each module together, in the order of their first names."""
    by_module: dict[int, Target] = {}
    for place in found:
        by_module.setdefault(id(place.original), Target(place.name, [])).places.append(place)
    return list(by_module.values())


def by_pattern(config: Configs) -> dict[str, DeltaConfig]:
    """A mapping of patterns to configurations as it is, after a check; one configuration under the pattern "".

    Raises:
        TypeError: neither a configuration nor a mapping of patterns to them.
        ValueError: an empty mapping, a pattern that is no regex, or a configuration that has targets of its own.
    """
    if isinstance(config, DeltaConfig):
        return {"": config}
    if not isinstance(config, Mapping) or not all(isinstance(item, DeltaConfig) for item in config.values()):
        raise TypeError(f"config must be a DeltaConfig or a mapping of patterns to them, not {config!r}")
    if not config:
        raise ValueError("config is an empty mapping")
    for pattern, own in config.items():
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"pattern={pattern!r} must be a string that is not empty")
        for what, default in (("target_modules", "all"), ("target_parameters", None)):
            if getattr(own, what) != default:
                raise ValueError(f"pattern={pattern!r}: {what}={getattr(own, what)!r} must be left to the pattern")
        replace(own, target_modules=pattern)  # checks the regex
    return dict(config)


def select(model: nn.Module, config: Configs) -> Selection:
    """Find the modules and parameters that a configuration, or a mapping of patterns to configurations, means.

    Args:
        model: may already have adapters; names are those of the unadapted model.
        config: in a mapping each key stands for ``target_modules``: a regex that must match the whole name, a dotted
            suffix, or "all"; the first that matches counts. One that matches no module stands for
            ``target_parameters``.

    Raises:
        TypeError, ValueError: as `by_pattern`; a name or pattern that matches nothing, with its near misses; a layer
            that was named but cannot be adapted.
    """
    configs = by_pattern(config)
    candidates = _candidates(model)
    closed = _closed(candidates)
    saved = _saved([name for own in configs.values() for name in own.modules_to_save or ()], candidates, closed)
    saved_names = {place.name for target in saved for place in target.places}
    layers: dict[str, Target] = {}
    left_alone: dict[str, tuple[str, str]] = {}
    parameters = _parameters(model)
    for pattern, own in configs.items():
        what, wanted = f"pattern={pattern!r}", pattern or own.target_modules
        found: list[Target] = []
        if pattern:
            found = _pattern_matches(pattern, candidates, parameters, own)
        elif own.target_modules != ():
            what = _shown("target_modules", own.target_modules)
            found = _matches(what, own.target_modules, candidates, own)
        if not any(target.parameter for target in found):
            _check_layers(what, wanted, found, candidates, own)
        named = [(target, what, wanted == "all") for target in found]
        if own.target_parameters is not None:
            what = _shown("target_parameters", own.target_parameters)
            matched = _parameter_matches(what, own.target_parameters, parameters)
            named += [(target, what, own.target_parameters == "all") for target in matched]
        excluded = _excluded(own, candidates)
        chosen: list[str] = []
        for target, what, by_all in named:
            if target.name in layers or target.any(lambda name: inside(name, saved_names)):
                continue
            out = target.name in excluded or (target.parameter and target.name.rpartition(".")[0] in excluded)
            reason = "it is excluded" if out else _refusal(target, closed, own)
            if reason is None:
                layers[target.name] = replace(target, config=target.own(own), pattern=pattern)
                chosen.append(target.name)
            elif not out and not by_all and (target.parameter or _has_weight(target.original)):
                raise ValueError(f"{target.name}: {what} names it, but {reason}")
            elif not target.parameter:
                left_alone.setdefault(target.name, (describe(target.original), reason))
        if not chosen:
            reasons = sorted({reason for _, reason in left_alone.values()})
            raise ValueError(f"{what} leaves nothing to adapt" + (f": {'; '.join(reasons)}" if reasons else ""))
        _check_patterns(own, chosen)
    _check_apart(layers)
    _sweep(left_alone, candidates, _taken(layers.values()), saved_names, closed, configs.values())
    return Selection(list(layers.values()), saved, left_alone)


def select_named(model: nn.Module, layers: Mapping[str, tuple[DeltaConfig, str]], saved: Sequence[str]) -> Selection:
    """The selection of exactly these modules, as a file names them.

    Args:
        layers: configuration, patterns applied, and pattern of each layer by its name.
        saved: names of the modules that are trained whole.

    Raises:
        ValueError: a module that is not there, that cannot be adapted, or that another adapter trains whole.
    """
    candidates = _candidates(model)
    closed = _closed(candidates)
    by_name = {place.name: target for target in candidates for place in target.places}
    parameters = {
        joined(place.name, target.parameter): target for target in _parameters(model) for place in target.places
    }
    for name in (*layers, *saved):
        target = by_name.get(name) or (parameters.get(name) if name in layers else None)
        if target is None:
            raise ValueError(f"the model has no module {name!r}{near_misses(name, by_name)}")
        reason = _unsavable(target, closed) if name in saved else _refusal(target, closed, layers[name][0])
        if reason is not None:
            raise ValueError(f"{name}: it is in the file, but {reason}")
    whole = [replace(by_name[name], name=name) for name in saved]
    saved_names = {place.name for target in whole for place in target.places}
    chosen = []
    for name, (config, pattern) in layers.items():
        if inside(name, saved_names):
            raise ValueError(f"{name}: the file adapts it and trains it whole, too")
        target = by_name.get(name) or parameters[name]
        chosen.append(replace(target, name=name, config=config, pattern=pattern))
    _check_apart({target.name: target for target in chosen})
    left_alone: dict[str, tuple[str, str]] = {}
    kinds = {type(config): config for config, _ in layers.values()}
    _sweep(left_alone, candidates, _taken(chosen), saved_names, closed, kinds.values())
    return Selection(chosen, whole, left_alone)


def inside(name: str, heads: Collection[str]) -> bool:
    """Whether a module is one of the heads or inside one, by their names."""
    while name not in heads:
        name = name.rpartition(".")[0]
        if not name:
            return False
    return True


def near_misses(pattern: str, names: Iterable[str]) -> str:
    """The end of a message: what a pattern that matches nothing may have meant."""
    pool: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        pool.update({".".join(parts[i:]): None for i in reversed(range(len(parts)))})
    near = difflib.get_close_matches(pattern, pool, n=5, cutoff=0.5)
    if near:
        return f"; near misses: {', '.join(map(repr, near))}"
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in pool))
    return f"; there are {', '.join(map(repr, last[:8]))}{', …' if len(last) > 8 else ''}" if last else ""


def _candidates(model: nn.Module) -> list[Target]:
    """Every module but the root, and but those that compute a parametrised weight."""
    return distinct(p for p in places(model) if p.name and "parametrizations" not in p.name.split("."))


def _parameters(model: nn.Module) -> list[Target]:
    """Every parameter of every module, but of those that compute a parametrised weight."""
    return [
        replace(target, name=joined(target.name, key), parameter=key)
        for target in distinct(p for p in places(model) if "parametrizations" not in p.name.split("."))
        for key, parameter in target.original._parameters.items()
        if parameter is not None
    ]


def _parameter_matches(what: str, targets: ParameterTargets, parameters: list[Target]) -> list[Target]:
    """The parameters that a selection means; ValueError if it, or one name of it, means none."""
    if callable(targets):
        found = [t for t in parameters if any(targets(joined(p.name, t.parameter), t.held) for p in t.places)]
    elif targets == "all":
        found = [target for target in parameters if sum(extent > 1 for extent in target.held.shape) > 2]
        found = [target for target in found if _unfit_parameter(target) is None]
    else:
        return _named(what, targets, parameters, parameters, "parameter")
    if not found:
        raise ValueError(f"{what} matches no parameter{near_misses('', _suggested(parameters))}")
    return found


def _suggested(parameters: Iterable[Target]) -> list[str]:
    return [target.name for target in parameters if _unfit_parameter(target) is None]


def _unfit_parameter(target: Target) -> str | None:
    if target.places[0].parent is None:
        return "it is the model's own, which has no place where something could stand for it"
    return refused_owner(target.original, target.parameter)


def _check_apart(layers: Mapping[str, Target]) -> None:
    """Raises ValueError for a parameter of a module that is adapted itself."""
    modules = {id(target.original): target.name for target in layers.values() if not target.parameter}
    for target in layers.values():
        if target.parameter and id(target.original) in modules:
            raise ValueError(f"{target.name}: its module {modules[id(target.original)]} is adapted itself")


def _closed(candidates: Iterable[Target]) -> set[str]:
    """The names of the modules that some adapter trains whole."""
    return {p.name for target in candidates for p in target.places if isinstance(p.module, SavedModule)}


def _taken(layers: Iterable[Target]) -> set[str]:
    """The first names of the modules that are adapted, or some of whose parameters are."""
    return {target.places[0].name for target in layers}


def _sweep(
    left_alone: dict[str, tuple[str, str]],
    candidates: Iterable[Target],
    chosen: Collection[str],
    saved: Collection[str],
    closed: Collection[str],
    configs: Iterable[DeltaConfig],
) -> None:
    """Add to ``left_alone`` every module with a weight of its own that is neither chosen nor saved."""
    for target in candidates:
        known = target.name in chosen or target.any(lambda name: inside(name, saved))
        if not known and _has_weight(target.original):
            reasons = [_closed_reason(target, closed) or unfit(target.original, config) for config in configs]
            reason = "it was not named" if None in reasons else reasons[0]
            left_alone.setdefault(target.name, (describe(target.original), str(reason)))


def _shown(what: str, targets: Targets | ParameterTargets) -> str:
    return f"{what}={getattr(targets, '__qualname__', repr(targets)) if callable(targets) else repr(targets)}"


def _matches(what: str, targets: Targets, candidates: list[Target], config: DeltaConfig | None = None) -> list[Target]:
    """The candidates that a selection means, "all" by its configuration; ValueError if it or one name means none."""
    if callable(targets):
        found = [target for target in candidates if any(targets(p.name, p.original) for p in target.places)]
    elif targets == "all":
        found = [target for target in candidates if config is not None and is_adaptable(target.original, config)]
    else:
        weighty = [target for target in candidates if _has_weight(target.original)]
        return _named(what, targets, candidates, weighty, "module")
    if not found:
        names = [target.name for target in candidates if _has_weight(target.original)]
        raise ValueError(f"{what} matches no module{near_misses('', names)}")
    return found


def _named(
    what: str, targets: str | Sequence[str], candidates: Sequence[Target], likely: Sequence[Target], kind: str
) -> list[Target]:
    """The candidates that a regex or names mean; ValueError, with near misses among the likely ones, if one is none."""
    names = [target.name for target in likely]
    if not isinstance(targets, str):
        found = []
        for suffix in targets:
            hits = [target for target in candidates if target.any(partial(is_suffix, suffix))]
            if not hits:
                raise ValueError(f"{what}: {suffix!r} matches no {kind}{near_misses(suffix, names)}")
            found += hits
        return found
    found = [target for target in candidates if target.any(partial(_is_whole, targets))]
    if found:
        return found
    if any(target.any(partial(is_suffix, targets)) for target in candidates):
        hint = f"; the list [{targets!r}] means every {kind} that has this name or whose name ends in it"
    else:
        hint = near_misses(targets, names)
    raise ValueError(f"{what} matches no {kind}: a string is a regex that must match the whole name{hint}")


def _is_whole(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def _pattern_matches(
    pattern: str, candidates: list[Target], parameters: list[Target], config: DeltaConfig
) -> list[Target]:
    """The modules that a mapping's pattern means, or the parameters if it means no module."""
    if pattern == "all":
        return _matches("pattern='all'", "all", candidates, config)
    for pool in (candidates, parameters):
        found = [target for target in pool if target.any(partial(matches, pattern))]
        if found:
            return found
    names = [target.name for target in candidates if _has_weight(target.original)] + _suggested(parameters)
    raise ValueError(f"pattern={pattern!r} matches no module{near_misses(pattern, names)}")


def _excluded(config: DeltaConfig, candidates: list[Target]) -> set[str]:
    """First names of the modules that are excluded, by themselves or with a module that holds them."""
    if config.exclude_modules is None:
        return set()
    what, wanted = _shown("exclude_modules", config.exclude_modules), config.exclude_modules
    heads = {place.name for target in _matches(what, wanted, candidates, config) for place in target.places}
    return {target.name for target in candidates if target.any(lambda name: inside(name, heads))}


def _saved(wanted: list[str], candidates: list[Target], closed: Collection[str]) -> list[Target]:
    """The modules that ``modules_to_save`` means, less those inside another of them."""
    if not wanted:
        return []
    found = {target.name: target for target in _matches("modules_to_save", tuple(wanted), candidates)}
    for name, target in found.items():
        reason = _unsavable(target, closed)
        if reason is not None:
            raise ValueError(f"{name}: modules_to_save names it, but {reason}")
    heads = set(found)
    return [target for name, target in found.items() if not inside(name.rpartition(".")[0], heads)]


def _unsavable(target: Target, closed: Collection[str]) -> str | None:
    module = target.original
    if isinstance(module, NEVER_CALLED):
        return f"a {describe(module)} is never called; name the modules in it"
    if not any(True for _ in module.parameters()):
        return f"this {describe(module)} has no parameters"
    if any(is_foreign(parameter) for parameter in module.parameters()):
        return f"this {describe(module)} is quantised, at least in part, and could not be trained whole"
    held = isinstance(target.module, AdaptedLayer | AdaptedModule)
    held = held or target.any(lambda name: inside(name.rpartition(".")[0], closed))
    if held or any(isinstance(inner, AdaptedLayer | AdaptedModule | SavedModule) for inner in module.modules()):
        return "another adapter already holds it or a part of it"
    return None


def _check_patterns(config: DeltaConfig, chosen: list[str]) -> None:
    for what in ("rank_pattern", "scale_pattern"):
        patterns: Mapping[str, Any] = getattr(config, what) or {}
        for pattern in patterns:
            if not any(matches(pattern, name) for name in chosen):
                raise ValueError(f"{what}={pattern!r} matches no adapted module{near_misses(pattern, chosen)}")


def _refusal(target: Target, closed: Collection[str], config: DeltaConfig) -> str | None:
    reason = _closed_reason(target, closed)
    if reason is not None:
        return reason
    if not target.parameter:
        held = isinstance(target.module, AdaptedModule)
        return "another adapter adapts its parameters" if held else refusal(target.original, config)
    if isinstance(target.module, AdaptedLayer):
        return "another adapter adapts its module"
    reason = _unfit_parameter(target) or unfit_parameter(target.original, target.parameter, config)
    return reason or undroppable_parameter(config)


def _closed_reason(target: Target, closed: Collection[str]) -> str | None:
    return "another adapter trains it whole" if target.any(lambda name: inside(name, closed)) else None


def _check_layers(
    what: str, wanted: Targets, found: Sequence[Target], candidates: Sequence[Target], config: DeltaConfig
) -> None:
    """Raises ValueError for a name or pattern that only modules without a weight of their own have."""
    if wanted == "all":
        return
    groups = [found]
    if not isinstance(wanted, str) and not callable(wanted):
        groups = [[target for target in found if target.any(partial(is_suffix, suffix))] for suffix in wanted]
    for hits in groups:
        if not any(_has_weight(target.original) or unfit(target.original, config) is None for target in hits):
            reason = _held(hits[0], candidates, config) or unfit(hits[0].original, config)
            raise ValueError(f"{hits[0].name}: {what} names it, but {reason}")


def _held(container: Target, candidates: Iterable[Target], config: DeltaConfig) -> str | None:
    """What to name instead of a container; None if it holds no layer that can be adapted."""
    inner = {place.name: place.original for target in candidates for place in target.places}
    inner = {name: module for name, module in inner.items() if name.startswith(f"{container.name}.")}
    layers = [name for name, module in inner.items() if is_adaptable(module, config) and unfit(module, config) is None]
    others = [name for name, module in inner.items() if name not in layers and _has_weight(module)]
    if not layers:
        return None
    head = re.escape(container.name)
    ends = "|".join(dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in layers))
    patterns = [rf"{head}\..*", rf"{head}\.(.*\.)?({ends})"]
    exact = [p for p in patterns if len(p) <= _LONGEST_ADVICE and not any(_is_whole(p, name) for name in others)]
    advice = f"the regex r'{exact[0]}' means them" if exact else f"name them, as {layers[0]!r}"
    return f"a {describe(container.original)} is no layer, it holds {len(layers)}; {advice}"


def _has_weight(module: nn.Module) -> bool:
    own = any(parameter is not None for parameter in module._parameters.values())
    return own or parametrize.is_parametrized(module)
