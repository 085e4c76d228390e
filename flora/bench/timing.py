"""Times the steps of several modules in turns. How a noisy machine is dealt with is written here and nowhere else.

A virtual machine's speed drifts by more than an adapter costs, within seconds. So no two times are compared that were
not taken side by side, and what can be made steady is made so:

- The steps take turns in one process, in a new order each round. The baseline runs before and after every second one,
  and a sample counts as its ratio to the mean of the two baseline samples around it. A figure is the *median* of these
  paired ratios: drift is the same above and below the line, and a burst of other work spoils single pairs.
- The heap is kept at the size that the steps need (`memory.keep_heap`), as allocators made for training do. With the
  defaults of glibc a module's large tensors come as fresh pages or not depending on what the module before it has
  freed, which is worth a factor of two to a convolution.
- `Timing.error` is the standard error of the median, 0.93·IQR/√n (normal noise). While it is above `Timing.tolerance`,
  more rounds are added, `ATTEMPTS` times in all; rounds in which others took more than `machine.OTHERS` of the CPUs are
  thrown away. What stays noisy is marked, is left out of every comparison, and the program ends with 1.
- A step that takes twice the baseline's time or more is sampled in every third round only: its overhead is large
  against its error anyway.

Least and lower quartile are reported in seconds too, for what they are worth on the machine of that moment.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from flora.bench.machine import OTHERS, Others
from flora.bench.memory import keep_heap

Step = Callable[[], None]
Pair = tuple[float, float]
"""Seconds of a step, and of the baseline's around it."""

SHORTEST = 0.01
"""Seconds that a sample takes at least, in as many steps as that needs."""

LONGEST = 20.0
"""Seconds that an attempt may take about; rounds are given up for it, down to `FEWEST`."""

LONG = 0.2
"""Seconds of a step that is not run just to be warm."""

FEWEST = 5
"""The rounds without which there are no quartiles worth the name."""

TOLERANCE = 0.02
"""Error of a ratio above which it is not to be used …"""

OF_OVERHEAD = 0.1
"""… unless it is within this share of what the ratio has above 1."""

ATTEMPTS = 3

SLOW = 2.0
SLOW_EVERY = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of a step (least, lower quartile), the ratio to the baseline with its error, and the seconds above it."""

    least: float
    quartile: float
    ratio: float
    error: float
    samples: int
    disturbed: float = 0.0
    """The share of the CPUs that others took meanwhile."""
    over: float = 0.0
    """Median of the paired differences to the baseline, for steps so short that what is added is no share of them."""

    @property
    def tolerance(self) -> float:
        """The greatest error with which the ratio is to be used."""
        return max(TOLERANCE, OF_OVERHEAD * (self.ratio - 1))

    @property
    def noisy(self) -> bool:
        """Whether the ratio is not to be used."""
        return self.error > self.tolerance or self.disturbed > OTHERS

    @property
    def why_noisy(self) -> str:
        """What made it noisy."""
        if self.disturbed > OTHERS:
            return f"others had {self.disturbed:.0%} of the CPUs"
        return f"{self.ratio:.2f} ± {self.error:.2f}"


def interleaved(
    steps: Mapping[str, Step], baseline: str, rounds: int = 15, *, attempts: int = ATTEMPTS
) -> dict[str, Timing]:
    """The timing of every step, in the order of ``steps``; ``baseline`` is one of their names.

    Raises ValueError for fewer than `FEWEST` rounds.
    """
    if rounds < FEWEST:
        raise ValueError(f"rounds={rounds} are too few for quartiles; {FEWEST} at least")
    keep_heap()
    once = {name: _warm(step) for name, step in steps.items()}
    pairs: dict[str, list[Pair]] = {name: [] for name in steps}
    timings: dict[str, Timing] = {}
    pending: Collection[str] = list(steps)
    for attempt in range(attempts):
        watch = Others()
        taken = _pairs(steps, baseline, pending, once, rounds, random.Random(attempt))
        share = watch.share()
        for name, values in taken.items():
            if share <= OTHERS:
                pairs[name] += values
                timings[name] = _timing(pairs[name], 0.0, name == baseline)
            elif not pairs[name]:
                timings[name] = _timing(values, share, name == baseline)
        pending = [name for name in pending if timings[name].noisy]
        if not pending:
            break
    return {name: timings[name] for name in steps}


def _warm(step: Step) -> float:
    """Seconds of a step once it is warm; a long one is warm enough at once."""
    first = _seconds(step, 1)
    return first if first > LONG else min(_seconds(step, 1) for _ in range(2))


def _pairs(
    steps: Mapping[str, Step],
    baseline: str,
    names: Collection[str],
    once: Mapping[str, float],
    rounds: int,
    shuffled: random.Random,
) -> dict[str, list[Pair]]:
    """The pairs of each name; the baseline's own are of each of its samples and the one before."""
    repeat = {name: max(1, math.ceil(SHORTEST / once[name])) for name in steps}
    slow = {name for name in names if once[name] > SLOW * once[baseline]}
    per_round = sum(once[n] * repeat[n] / (SLOW_EVERY if n in slow else 1) for n in names)
    per_round += once[baseline] * repeat[baseline] * (len(names) / 2 + 1)
    rounds = max(FEWEST, min(rounds, int(LONGEST / per_round)))
    every = SLOW_EVERY if rounds >= SLOW_EVERY * FEWEST else max(1, rounds // FEWEST)
    pairs: dict[str, list[Pair]] = {name: [] for name in names}
    for turn in range(rounds):
        due = [name for name in names if name != baseline and (name not in slow or turn % every == 0)]
        shuffled.shuffle(due)
        before = _seconds(steps[baseline], repeat[baseline])
        for i in range(0, max(1, len(due)), 2):
            taken = {name: _seconds(steps[name], repeat[name]) for name in due[i : i + 2]}
            after = _seconds(steps[baseline], repeat[baseline])
            for name, seconds in taken.items():
                pairs[name].append((seconds, (before + after) / 2))
            if baseline in pairs:
                pairs[baseline].append((after, before))
            before = after
    return pairs


def _seconds(step: Step, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    return (time.perf_counter() - start) / repeat


def _timing(pairs: list[Pair], disturbed: float, is_baseline: bool) -> Timing:
    """The figures of some pairs. The baseline's ratio is 1; its error shows how it scatters from one to the next."""
    seconds = [own for own, _ in pairs]
    low, median, high = statistics.quantiles([own / base for own, base in pairs], n=4)
    error = 0.93 * (high - low) / math.sqrt(len(pairs))
    quartile = statistics.quantiles(seconds, n=4)[0]
    ratio, over = (1.0, 0.0) if is_baseline else (median, statistics.median(own - base for own, base in pairs))
    return Timing(min(seconds), quartile, ratio, error, len(pairs), disturbed, over)
