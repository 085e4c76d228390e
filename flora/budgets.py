"""`budget`: the sizes at which a method has a given number of parameters, so that methods compare at equal cost."""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from flora.config import DeltaConfig
from flora.deltas import Site, build
from flora.targets import Target, select

_Config = TypeVar("_Config", bound=DeltaConfig)

_MOST_STEPS = 20_000_000  # of an exact subset sum; beyond it, the largest steps that fit are taken first


def budget(
    model: nn.Module, config: type[_Config] | _Config, parameters: int, *, uniform: bool = False, **fields: Any
) -> _Config:
    """The configuration whose deltas come closest to a number of trainable parameters without exceeding it.

    Ranks, terms or block shapes are chosen; everything else stays. What ``modules_to_save`` trains is not counted, as
    it is the same for every method. A method without a choice (circulant, Toeplitz, rescaling) is returned as it is if
    it fits.

    Args:
        model: adapted or not; it is only looked at.
        config: a configuration, or its class for the default one.
        parameters: how many may learn.
        uniform: True: one rank for all layers. False: where the next rank on all of them is too much, it is given to
            those with which the sum comes closest, in a ``rank_pattern``.
        fields: other fields of the configuration, ``target_modules`` say.

    Raises:
        TypeError, ValueError: as of `flora.adapt`; fewer parameters than the method's smallest size has, with that
            number.

    >>> config = flora.budget(model, flora.TuckerConfig, parameters=200_000, target_modules=["query", "value"])
    """
    kind = config if isinstance(config, type) else type(config)
    if not issubclass(kind, DeltaConfig):
        raise TypeError(f"config={config!r} must be a configuration or its class")
    base = config(**fields) if isinstance(config, type) else replace(config, **fields)
    if isinstance(parameters, bool) or not isinstance(parameters, int) or parameters < 1:
        raise ValueError(f"parameters={parameters!r} must be a positive int")
    targets = select(model, base).layers
    count = _Counter(targets)
    sizes = base.sizes([site.shape for site in count.sites.values()])
    if base.ordered:

        def of_size(size: Mapping[str, Any]) -> int:
            return count(replace(base, **size))

        best = bisect_right(sizes, parameters, key=of_size) - 1
        if best >= 0:  # the first of those with as many, as a rank is cut to a mode's extent
            best = bisect_left(sizes, of_size(sizes[best]), key=of_size)
    else:
        counts = [count(replace(base, **size)) for size in sizes]
        fitting = [i for i, number in enumerate(counts) if number <= parameters]
        best = max(fitting, key=counts.__getitem__, default=-1)
    if best < 0:
        least = min(count(replace(base, **size)) for size in ([sizes[0]] if base.ordered else sizes))
        raise ValueError(
            f"{type(base).__name__}: parameters={parameters} are fewer than the {least} that it has at least on "
            f"{len(targets)} {'layer' if len(targets) == 1 else 'layers'}"
        )
    chosen = replace(base, **sizes[best])
    if uniform or "rank" not in sizes[best] or best + 1 == len(sizes) or not base.ordered:
        return chosen
    return _filled(chosen, replace(base, **sizes[best + 1]), count, parameters)


def _filled(low: _Config, high: _Config, count: _Counter, parameters: int) -> _Config:
    """``low`` with the rank of ``high`` on the layers with which the sum comes closest to the budget."""
    steps = {name: count.of(high, name) - count.of(low, name) for name in count.sites}
    names = [name for name, step in steps.items() if step > 0]
    raised = closest_subset([steps[name] for name in names], parameters - count(low))
    patterns = {f"^{re.escape(names[i])}$": high.rank for i in raised}  # type: ignore[attr-defined]
    return replace(low, rank_pattern={**(low.rank_pattern or {}), **patterns} or None)


class _Counter:
    """Trainable parameters of configurations on the targets of one of them."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = {t.name: t for t in targets}
        self.sites = {t.name: self._site(t) for t in targets}
        self._known: dict[tuple[DeltaConfig, Site], int] = {}

    @staticmethod
    def _site(target: Target) -> Site:
        assert target.config is not None
        return replace(target.site(target.config), device="meta", weight=None, shapes_only=True)

    def __call__(self, config: DeltaConfig) -> int:
        return sum(self.of(config, name) for name in self.sites)

    def of(self, config: DeltaConfig, name: str) -> int:
        """Of the configuration on one layer, patterns applied."""
        own, site = self.targets[name].own(config), self.sites[name]
        alike = own, replace(site, name="")
        if alike not in self._known:
            delta = build(own, site)
            self._known[alike] = sum(p.numel() for p in delta.parameters() if p.requires_grad)
        return self._known[alike]


def closest_subset(steps: Sequence[int], most: int) -> list[int]:
    """Indices of the steps whose sum comes closest to ``most`` from below."""
    unit = math.gcd(*steps)
    if not steps or most < min(steps):
        return []
    room = most // unit
    if sum(steps) <= most:
        return list(range(len(steps)))
    if room * len(steps) > _MOST_STEPS * 64:  # bits
        chosen = []
        for i in sorted(range(len(steps)), key=lambda i: -steps[i]):
            if steps[i] <= most:
                chosen.append(i)
                most -= steps[i]
        return sorted(chosen)
    reached = [1]  # bit n: some of the steps so far sum to n units
    full = (1 << (room + 1)) - 1
    for step in steps:
        reached.append((reached[-1] | reached[-1] << (step // unit)) & full)
    chosen, left = [], reached[-1].bit_length() - 1
    for i in reversed(range(len(steps))):
        if not reached[i] >> left & 1:
            chosen.append(i)
            left -= steps[i] // unit
    return sorted(chosen)
