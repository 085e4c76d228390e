"""Means with intervals, of few figures: t intervals of differences that are paired by task and seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flora.finetune.data import require

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval of `LEVEL` around it; ``low`` and ``high`` are None where there are too few figures."""

    mean: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is above or below 0; 0 if it holds 0 or there is none."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def interval(values: Sequence[float]) -> Estimate:
    """Student's t interval of the mean of independent figures, at least one."""
    return over_groups([values])


def over_groups(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean of the means of groups that are what they are, as tasks, each with its own spread over its figures.

    The variance is Σ_g s_g²/n_g over the square of the number of groups, with Welch and Satterthwaite's degrees of
    freedom. A group of one figure has no known spread, so there is no interval then.
    """
    mean = statistics.fmean(statistics.fmean(group) for group in groups)
    if any(len(group) < 2 for group in groups):
        return Estimate(mean, None, None)
    variances = [statistics.variance(group) / len(group) for group in groups]
    total = sum(variances)
    if total == 0:
        return Estimate(mean, mean, mean)
    freedom = total**2 / sum(v**2 / (len(group) - 1) for v, group in zip(variances, groups, strict=True))
    half = quantile(freedom) * math.sqrt(total) / len(groups)
    return Estimate(mean, mean - half, mean + half)


def quantile(freedom: float) -> float:
    """How many standard errors the interval reaches to either side, by Student's t."""
    return float(require("scipy.special", extra="study").stdtrit(freedom, (1 + LEVEL) / 2))


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None of a single figure."""
    return statistics.stdev(values) if len(values) > 1 else None
