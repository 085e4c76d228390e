"""What the report says of figures: they choose the sentence, and a difference that is not clear is not claimed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flora.study.methods import METHODS
from flora.study.statistics import LEVEL, Estimate

TITLES: Mapping[str, str] = {name: method.title for name, method in METHODS.items()}

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def number(count: int, what: str) -> str:
    """A number of things in words: "three tasks"."""
    return f"{_NUMBERS[count] if count < len(_NUMBERS) else count} {what}{'' if count == 1 else 's'}"


def listed(items: Iterable[str]) -> str:
    """Words as one list: "a, b and c"; of none ""."""
    *others, last = items or [""]
    return f"{', '.join(others)} and {last}" if others else last


def signed(points: float) -> str:
    """A difference with its sign, to a tenth: "+1.2", "−0.3", "0.0"."""
    text = f"{points:+.1f}"
    return "0.0" if text[1:] == "0.0" else text.replace("-", "−")


def spanned(estimate: Estimate) -> str:
    """The ends of an interval: "+0.3 to +2.1"."""
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"{signed(estimate.low)} to {signed(estimate.high)}"


def estimated(estimate: Estimate) -> str:
    """A difference in a table, bold if its interval does not hold 0: "**+1.2** (+0.3 to +2.1)"."""
    mean = signed(estimate.mean)
    return f"{f'**{mean}**' if estimate.sign else mean} ({spanned(estimate)})"


def verdict(first: str, second: str, estimate: Estimate) -> str:
    """The sentence on a difference first - second, in points: better, worse, or not to be told apart."""
    if estimate.low is None:
        return f"{first} less {second} is {signed(estimate.mean)} points, on too few seeds to say more"
    interval = f"{LEVEL:.0%} interval {spanned(estimate)}".replace("%", " %")
    if estimate.sign == 0:
        return f"{first} and {second} cannot be told apart ({signed(estimate.mean)} points, {interval})"
    how = "better" if estimate.sign > 0 else "worse"
    return f"{first} is {how} than {second} by {abs(estimate.mean):.1f} points ({interval})"


def setting(options: Mapping[str, Any]) -> str:
    """A method's options in words: "scale 4", "orthogonal factors, equal first step"."""
    words = {
        ("init", "orthogonal"): "orthogonal factors",
        ("init", "hosvd"): "singular vectors of the weight (HOSVD)",
        ("init", "reference"): "factors as the authors draw them",
        ("draw", "unit"): "factors N(0, 1/r)",
        ("alpha_rule", "rank"): "alpha / r",
        ("alpha_rule", "sqrt"): "alpha / √r",
        ("batch_norm", "moving"): "statistics move",
        ("gain", "matched"): "equal first step",
    }
    numbers = {"scale": "scale {:g}", "core_lr": "the core at {:g} × the rate"}
    said = []
    for key, value in options.items():
        said.append(numbers[key].format(value) if key in numbers else words.get((key, value), f"{key} {value}"))
    return ", ".join(said)
