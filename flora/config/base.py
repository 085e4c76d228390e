"""What every configuration of a delta has: which layers, which scale, validation, JSON.

A field that is wrong raises ValueError with the field and its value. Symbols are those of docs/methods.md.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, NoReturn, Self, TypeAlias, TypeVar

from torch import nn

Rank: TypeAlias = int | tuple[int, ...]
Targets: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool]
ParameterTargets: TypeAlias = str | Sequence[str] | Callable[[str, nn.Parameter], bool]

PLANS = ("auto", "fused", "hybrid", "merged")

SELECTORS = (
    *("target_modules", "target_parameters", "exclude_modules"),
    *("rank_pattern", "scale_pattern", "modules_to_save"),
)
"""The fields that say which layers, and which are otherwise."""

_Value = TypeVar("_Value")
_LARGEST: Any = sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """What every delta is configured by. Use one of the subclasses.

    Args:
        scale: ΔW is multiplied by it: finite and not 0. 1.0 if neither it nor ``alpha`` is given.
        alpha: ΔW is multiplied by alpha / rank instead, or by alpha where a method has no rank; not together with
            ``scale``, nor with a tuple of ranks.
        dropout: probability, in [0, 1), that an element of the delta's input is dropped in training.
        target_modules: "all"; or a sequence of module names or their dotted suffixes; or a regex that must match the
            whole name; or a function of (name, module). An empty sequence, with ``target_parameters``: none.
        target_parameters: parameters of modules that are no layers, as the experts of a mixture in one tensor; the same
            forms, a function being one of (name, parameter). "all": those of three modes or more above 1.
        exclude_modules: modules left alone, with everything inside them; the same forms.
        rank_pattern: rank by pattern. A pattern is a regex that must match the whole name, or a dotted suffix of it;
            the first that matches counts.
        scale_pattern: scale by pattern.
        modules_to_save: names or suffixes of modules that are trained whole and saved with the adapter.
        plan: how a layer computes: "auto" | "fused" | "hybrid" | "merged".

    Raises:
        ValueError: a field has a value that it cannot have; the message quotes both.
    """

    method: ClassVar[str]
    ordered: ClassVar[bool] = True
    """Whether `sizes` go from few parameters to many."""
    of_output: ClassVar[bool] = False
    """Whether the delta acts on a module's output and not on its weight."""
    of_norms: ClassVar[bool] = False
    """Whether ``target_modules="all"`` means normalisation layers, too."""
    rank_by_mode: ClassVar[bool] = False
    """Whether ``rank``, if there is one, may be a tuple with an entry for every mode of the weight."""
    _methods: ClassVar[dict[str, type[DeltaConfig]]] = {}

    scale: float | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Targets = "all"
    target_parameters: ParameterTargets | None = None
    exclude_modules: Targets | None = None
    rank_pattern: Mapping[str, Rank] | None = field(default=None, hash=False)
    scale_pattern: Mapping[str, float] | None = field(default=None, hash=False)
    modules_to_save: Sequence[str] | None = None
    plan: str = "auto"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" not in cls.__dict__:
            return
        other = DeltaConfig._methods.get(cls.method, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):  # a cell may be run again
            raise TypeError(f"{cls.__qualname__}: method={cls.method!r} is that of {other.__qualname__}")
        DeltaConfig._methods[cls.method] = cls

    def __post_init__(self) -> None:
        if not hasattr(self, "method"):
            raise TypeError(f"{type(self).__name__} is a base class; use one of its subclasses")
        for name in ("scale", "alpha"):
            if getattr(self, name) is not None:
                self._set(name, self._factor(name, getattr(self, name)))
        if self.scale is not None and self.alpha is not None:
            self._fail("alpha", f"cannot be given together with scale={self.scale!r}")
        if not is_real(self.dropout) or not 0.0 <= self.dropout < 1.0:
            self._fail("dropout", "must be a number in [0, 1)")
        self._set("dropout", float(self.dropout))
        if self.plan not in PLANS:
            self._fail("plan", f"must be one of {', '.join(PLANS)}")
        if self.plan in ("hybrid", "merged") and self.dropout > 0.0:
            self._fail("plan", f"cannot drop elements of its input: dropout={self.dropout!r} needs auto or fused")
        for name in ("target_parameters", "exclude_modules"):
            value = getattr(self, name)
            empty = value is None or (is_names(value) and not value)
            self._set(name, None if empty else self._targets(name, value))
        alone = is_names(self.target_modules) and not self.target_modules and self.target_parameters is not None
        self._set("target_modules", () if alone else self._targets("target_modules", self.target_modules))
        if self.modules_to_save is not None:
            saved = [self.modules_to_save] if isinstance(self.modules_to_save, str) else self.modules_to_save
            self._set("modules_to_save", self._names("modules_to_save", saved) if saved else None)
        if self.rank_pattern is not None and not hasattr(self, "rank"):
            self._fail("rank_pattern", "has no meaning for a delta without rank")
        self._set("rank_pattern", self._patterns("rank_pattern", self._rank))
        self._set("scale_pattern", self._patterns("scale_pattern", self._factor))

    # For the layers -------------------------------------------------------------------------------------------------

    @property
    def resolved_scale(self) -> float:
        """The s of ΔW = s·…: ``scale``, or ``alpha`` / rank, or 1.0."""
        if self.alpha is not None:
            rank = getattr(self, "rank", None)
            return self.alpha / rank if isinstance(rank, int) else self.alpha
        return 1.0 if self.scale is None else self.scale

    def refuses(self, kind: str, module: nn.Module) -> str | None:
        """Why its deltas cannot be put on a layer of this kind (`flora.kinds.Kind.name`), or None if they can."""
        if kind == "norm" and not self.of_output:
            return "its weight has no rows and columns (RescaleConfig takes it)"
        return None

    def for_module(self, name: str) -> Self:
        """The config of one module: its rank and scale taken from the patterns, and nothing left that selects."""
        own = self
        if self.scale_pattern and (pattern := first_match(self.scale_pattern, name)) is not None:
            own = self.with_scale(self.scale_pattern[pattern])
        changes: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self) if f.name in SELECTORS}
        if self.rank_pattern and (pattern := first_match(self.rank_pattern, name)) is not None:
            changes["rank"] = self.rank_pattern[pattern]
        return dataclasses.replace(own, **changes)

    def for_parameter(self, name: str) -> Self:
        """The config of one parameter of a module that is no layer: as `for_module`."""
        return self.for_module(name)

    def with_scale(self, scale: float) -> Self:
        """The same with this scale, whatever gave it before."""
        return dataclasses.replace(self, scale=scale, alpha=None)

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> Sequence[Mapping[str, Any]]:
        """The fields that set how many parameters there are, with the values that fit weights of these shapes.

        From few parameters to many, unless ``ordered`` is False. A method without a choice has one size, ``{}``.
        """
        return ({},)

    def with_ranks(self, ranks: tuple[int, ...]) -> Self:
        """The config of one module with the ranks that its adapter file has, () for a method without ranks.

        Raises:
            ValueError: ranks that this method cannot have.
        """
        if ranks:
            raise ValueError(f"{type(self).__name__} has no ranks, and {ranks=} are given")
        return self

    # JSON -----------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields and the method, as JSON has them (tuples as lists).

        Raises:
            ValueError: a selection is a function, which cannot be written; replace it by the names that it selected.
        """
        for name in ("target_modules", "target_parameters", "exclude_modules"):
            if callable(getattr(self, name)):
                self._fail(name, "is a function and cannot be written")
        values = {f.name: _to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"method": self.method, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote, of the class that its "method" names.

        Raises:
            TypeError: not a mapping.
            ValueError: an unknown method, an unknown key or a value that its field cannot have.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a config must be a mapping of fields, not {values!r}")
        method = values.get("method")
        methods = {key: kind for key, kind in DeltaConfig._methods.items() if issubclass(kind, cls)}
        kind = methods.get(method) if isinstance(method, str) else None
        if kind is None:
            raise ValueError(f"{cls.__name__}: method={method!r} must be one of {', '.join(sorted(methods))}")
        known = {f.name for f in dataclasses.fields(kind)}
        unknown = [key for key in values if key != "method" and key not in known]
        if unknown:
            raise ValueError(f"{kind.__name__} has no field {', '.join(map(repr, unknown))}")
        return kind(**{key: value for key, value in values.items() if key != "method"})

    # Validation -----------------------------------------------------------------------------------------------------

    def _fail(self, name: str, rule: str, *value: Any) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {name}={value[0] if value else getattr(self, name)!r} {rule}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _positive(self, *names: str) -> None:
        for name in names:
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                self._fail(name, "must be a positive int")
            self._set(name, int(getattr(self, name)))

    def _flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self._fail(name, "must be True or False")

    def _one_of(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            self._fail(name, f"must be one of {', '.join(allowed)}")

    def _factor(self, name: str, value: Any) -> float:
        if not is_real(value) or value == 0:
            self._fail(name, "must be a finite number and not 0, since such a delta could never learn", value)
        return float(value)

    def _rank(self, name: str, value: Any) -> Rank:
        """A rank of ``rank`` or ``rank_pattern``."""
        if not self.rank_by_mode and (not is_int(value) or value < 1):
            self._fail(name, "must be a positive int", value)
        ranks = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        if not ranks or not all(is_int(r) and r > 0 for r in ranks):
            self._fail(name, "must be a positive int or a tuple of them", value)
        if not is_int(value) and self.alpha is not None:
            self._fail(name, f"is a tuple, for which alpha={self.alpha!r} / rank has no meaning; give scale", value)
        return int(value) if is_int(value) else tuple(int(r) for r in ranks)

    def _targets(self, name: str, value: Any) -> Targets:
        if isinstance(value, str):
            self._regex(name, value)
            return value
        if is_names(value):
            return self._names(name, value)
        if isinstance(value, nn.Module) or not callable(value):
            what = name.removeprefix("target_").removesuffix("s") if name == "target_parameters" else "module"
            self._fail(name, f'must be "all", a sequence of names, a regex or a function of (name, {what})')
        return value  # type: ignore[no-any-return]

    def _names(self, name: str, value: Any) -> tuple[str, ...]:
        if not is_names(value) or not value or not all(isinstance(item, str) and item for item in value):
            self._fail(name, f"must name {'parameters' if name == 'target_parameters' else 'modules'}")
        return tuple(sorted(value) if isinstance(value, set | frozenset) else value)

    def _patterns(self, name: str, check: Callable[[str, Any], _Value]) -> dict[str, _Value] | None:
        patterns = getattr(self, name)
        if not patterns:
            return None
        if not isinstance(patterns, Mapping):
            self._fail(name, "must map patterns to values")
        for pattern in patterns:
            self._regex(name, pattern)
        return {pattern: check(f"{name}[{pattern!r}]", value) for pattern, value in patterns.items()}

    def _regex(self, name: str, pattern: Any) -> None:
        if not isinstance(pattern, str) or not pattern:
            self._fail(name, "must hold patterns that are not empty")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{type(self).__name__}: {name}={pattern!r} is not a regex: {error}") from error


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (a regex that must match the whole name, or a dotted suffix of it) means the module."""
    return is_suffix(pattern, name) or re.fullmatch(pattern, name) is not None


def is_suffix(suffix: str, name: str) -> bool:
    """Whether the suffix is the whole name or its last components."""
    return name == suffix or name.endswith(f".{suffix}")


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first of the patterns that means the module, or None."""
    return next((pattern for pattern in patterns if matches(pattern, name)), None)


def ranks_up_to(most: int) -> Sequence[Mapping[str, Any]]:
    """What `DeltaConfig.sizes` gives where the rank is the size."""
    return [{"rank": rank} for rank in range(1, most + 1)]


def is_int(value: Any) -> bool:
    """Whether a value is a whole number that can count what a tensor has."""
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) <= sys.maxsize


def is_real(value: Any) -> bool:
    """Whether a value is a finite number that a float can be."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(-_LARGEST <= value <= _LARGEST)


def is_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset)


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    return value
