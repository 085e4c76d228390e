"""`summary`: what an adapted model consists of, to print and to compute with."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from flora.distributed import model_class
from flora.kinds import describe, is_opaque, kind_of
from flora.state import adapted_layers, base_parameters, saved_modules, state_of
from flora.targets import distinct, places

_SHOWN = 4
"""Names shown of a group that was left alone."""


@dataclass(frozen=True)
class LayerRow:
    """One delta on one layer, or one copy of a module that is trained whole."""

    name: str
    adapter: str
    method: str
    """Of the adapter's configuration; "" for a module trained whole."""
    kind: str
    """The class of the base layer."""
    shape: tuple[int, ...]
    """Of the weight, (out, in / groups, k…), or of a block's matrix; empty for a module trained whole."""
    ranks: tuple[int, ...]
    """Of every mode; empty where the delta has none."""
    size: str
    """As `Delta.size` tells it: ranks, terms, a block, names of parameters; "" for a module trained whole."""
    plan: str
    """How the layer computes; "block" for one after it, "trained whole" for a module of ``modules_to_save``."""
    scale: float
    strength: float
    """The weight that `flora.set_adapter` gave the adapter."""
    parameters: int
    trainable: int
    """How many of the parameters learn now."""
    active: bool
    merged: bool


@dataclass(frozen=True)
class Summary:
    """A report on an adapted model; ``print`` shows it as a table."""

    model: str
    """The model's class."""
    adapters: tuple[str, ...]
    active: tuple[str, ...]
    layers: tuple[LayerRow, ...]
    left_alone: dict[str, tuple[str, str]]
    """Class and reason, by name, of the modules with a weight of their own that no adapter uses."""
    tied: dict[str, tuple[str, ...]]
    """Adapted weights that other modules share, by name; merging unties them."""
    base_parameters: int
    """Of the unadapted model, each counted once; a quantised or packed weight as the numbers that it stands for."""
    trainable_parameters: int
    """All that learn now, in the whole model."""

    @property
    def share(self) -> float:
        """Trainable parameters over the base's."""
        return self.trainable_parameters / self.base_parameters

    @property
    def adapter_parameters(self) -> int:
        """Of all adapters, trained or not."""
        return sum(row.parameters for row in self.layers)

    def _table(self) -> list[list[str]]:
        head = ["layer", "adapter", "method", "kind", "weight", "size", "plan", "scale", "parameters", "trainable"]
        rows = [
            [
                row.name or "(the layer)",
                row.adapter + ("*" if row.active else "") + (" (merged)" if row.merged else ""),
                row.method,
                row.kind,
                _times(row.shape),
                row.size,
                row.plan,
                (f"{row.scale:g}" + (f" × {row.strength:g}" if row.strength != 1 else "")) if row.shape else "",
                f"{row.parameters:,}",
                f"{row.trainable:,}",
            ]
            for row in self.layers
        ]
        return [head, *rows]

    def _notes(self) -> list[str]:
        notes = [
            f"trainable: {self.trainable_parameters:,} parameters, {100 * self.share:.3g} % of the model's "
            f"{self.base_parameters:,}; * active"
        ]
        notes += [f"tied: {name} with {', '.join(others)}; merging unties it" for name, others in self.tied.items()]
        groups: dict[tuple[str, str], list[str]] = {}
        for name, why in self.left_alone.items():
            groups.setdefault(why, []).append(name)
        for (kind, reason), names in groups.items():
            shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
            notes.append(f"left alone: {len(names)} {kind} ({shown}): {reason}")
        return notes

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        right = {len(widths) - 3, len(widths) - 2, len(widths) - 1}
        lines = [
            "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in cells).rstrip()
            for cells in (list(enumerate(zip(row, widths, strict=True))) for row in table)
        ]
        rule = "─" * max(map(len, lines))
        title = f"{self.model}: {', '.join(map(repr, self.adapters))}"
        return "\n".join([title, rule, lines[0], rule, *lines[1:], rule, *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *rows = self._table()

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        body = "".join(line(row, "td") for row in rows)
        return f"<h4>{html.escape(self.model)}</h4><table>{line(head, 'th')}{body}</table>{notes}"


def summary(model: nn.Module) -> Summary:
    """A printable report: layers, sizes, plans, parameters, share of the model, what was left alone and why.

    Raises:
        RuntimeError: no adapters in the model.
    """
    state = state_of(model)
    rows = []
    for name, layer in adapted_layers(model).items():
        for adapter, delta in layer.adapters():
            rows.append(
                LayerRow(
                    name=name,
                    adapter=adapter,
                    method=delta.config.method,
                    kind=describe(layer.base_layer),
                    shape=tuple(delta.shape),
                    ranks=tuple(getattr(delta, "ranks", ())),
                    size=delta.size,
                    plan=layer.plan_of(adapter),
                    scale=delta.scale,
                    strength=delta.strength,
                    parameters=_count(delta.parameters()),
                    trainable=_count(p for p in delta.parameters() if p.requires_grad),
                    active=adapter in layer.active,
                    merged=layer.merged and adapter in layer.active,
                )
            )
    for name, module in saved_modules(model).items():
        for adapter, copy in module.copies.items():
            rows.append(
                LayerRow(
                    name=name,
                    adapter=adapter,
                    method="",
                    kind=describe(module.base_layer),
                    shape=(),
                    ranks=(),
                    size="",
                    plan="trained whole",
                    scale=1.0,
                    strength=1.0,
                    parameters=_count(copy.parameters()),
                    trainable=_count(p for p in copy.parameters() if p.requires_grad),
                    active=adapter == module.active,
                    merged=False,
                )
            )
    used = {row.name for row in rows}
    left_alone: dict[str, tuple[str, str]] = {}
    for known in state.adapters.values():
        left_alone.update({name: why for name, why in known.left_alone.items() if name not in used})
    return Summary(
        model=model_class(model).__name__,
        adapters=tuple(state.adapters),
        active=state.active,
        layers=tuple(rows),
        left_alone=left_alone,
        tied=_tied(model),
        base_parameters=base_size(model),
        trainable_parameters=_count(p for p in model.parameters() if p.requires_grad),
    )


def base_size(model: nn.Module) -> int:
    """A packed weight may be no parameter at all, or one of fewer and wider numbers than it stands for."""
    opaque = [target.original for target in distinct(places(model)) if is_opaque(target.original)]
    packed = {id(layer._parameters.get("weight")) for layer in opaque}
    plain = {id(p): p for _, p in base_parameters(model) if id(p) not in packed}
    return _count(plain.values()) + sum(math.prod(kind_of(layer).shape(layer)) for layer in opaque)


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameters of adapted layers that other modules hold as well, with the names they have there."""
    owners: dict[int, list[str]] = {}
    for target in distinct(places(model)):
        for key, parameter in target.original._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{target.name}.{key}")
    adapted = adapted_layers(model)
    shared = [names for names in owners.values() if len(names) > 1]
    return {
        name: tuple(other for other in names if other != name)
        for names in shared
        for name in names
        if name in adapted or name.rpartition(".")[0] in adapted
    }


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _times(extents: Sequence[int]) -> str:
    return "×".join(map(str, extents))
