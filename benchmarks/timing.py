"""Times one step, forward and backward with the input's gradient, of several modules in turns."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SHORTEST = 0.02  # seconds a sample takes at least, in as many steps as that needs
TOO_WIDE = 0.10  # the spread above which a figure means nothing


@dataclass(frozen=True)
class Sample:
    """Seconds of a step: the least, the lower quartile, and the distance of the quartiles over the lower one."""

    least: float
    quartile: float
    spread: float

    @property
    def noisy(self) -> bool:
        return self.spread > TOO_WIDE


def interleaved(modules: Mapping[str, nn.Module], x: Tensor, rounds: int) -> dict[str, Sample]:
    """One sample of each module a round, in a new order each time, so that drift of the machine hits all alike."""
    with torch.no_grad():
        dy = torch.randn_like(next(iter(modules.values()))(x))
    steps = {name: _calibrated(module, x, dy) for name, module in modules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(modules), len(modules)):
            seconds[name].append(_seconds(modules[name], x, dy, steps[name]))
    return {name: _sample(times) for name, times in seconds.items()}


def _calibrated(module: nn.Module, x: Tensor, dy: Tensor) -> int:
    """The steps that a sample needs, once the module is warm."""
    _seconds(module, x, dy, 2)
    return max(1, math.ceil(SHORTEST / _seconds(module, x, dy, 2)))


def _seconds(module: nn.Module, x: Tensor, dy: Tensor, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(dy)
    return (time.perf_counter() - start) / steps


def _sample(seconds: list[float]) -> Sample:
    low, _, high = statistics.quantiles(seconds, n=4)
    return Sample(min(seconds), low, (high - low) / low)
