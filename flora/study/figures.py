"""The report's drawings. matplotlib is needed only when one is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.finetune.data import require
from flora.study.results import Contrast, Outcome
from flora.study.section import BLACK, GREY, STYLES
from flora.study.statistics import Estimate, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 3.6  # inches


def save(figures: Mapping[str, Figure], folder: Path) -> None:
    """Writes ``study-NAME.svg`` files: the same figure gives the same file, and its letters stay letters."""
    matplotlib = require("matplotlib", extra="study")
    with matplotlib.rc_context({"svg.hashsalt": "flora", "svg.fonttype": "none"}):
        for name, figure in figures.items():
            figure.savefig(folder / f"study-{name}.svg", format="svg", metadata={"Date": None})


def panels(count: int, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, three at most in a row; spare places are left empty."""
    across = min(3, count)
    down = math.ceil(count / across)
    size = (max(6.0, PANEL * across), height * down)
    figure: Figure = require("matplotlib.figure", extra="study").Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    for one in axes[:count]:
        one.grid(color="#e5e5e5", lw=0.7)
        one.set_axisbelow(True)
    return figure, axes[:count]


def legend(figure: Figure, axes: Iterable[Axes], columns: int = 5) -> None:
    """One legend below all panels, each name once, in as many columns at most."""
    found: dict[str, Any] = {}
    for one in axes:
        handles, names = one.get_legend_handles_labels()
        for handle, name in zip(handles, names, strict=True):
            found.setdefault(name, handle)
    if found:
        columns = min(columns, len(found))
        figure.legend([*found.values()], [*found], loc="outside lower center", ncols=columns, frameon=False)


def mean_and_spread(outcome: Outcome) -> tuple[float, float]:
    """Of the test accuracy, %; a spread of 0 where one seed cannot tell."""
    values = [*outcome.accuracies.values()]
    return sum(values) / len(values), spread(values) or 0.0


def over_parameters(lines: Mapping[str, Mapping[str, Sequence[Outcome]]], titles: Mapping[str, str]) -> Figure:
    """Accuracy over trainable parameters: a panel a task, a line a method through its budgets.

    Args:
        lines: outcomes by method by task; a method without deltas ("head") is drawn as a level.
    """
    figure, axes = panels(len(lines))
    for place, (task, methods) in zip(axes, lines.items(), strict=True):
        for method, outcomes in methods.items():
            colour, marker = STYLES[method]
            found = sorted((o.parameters or 0, *mean_and_spread(o)) for o in outcomes)
            if found[0][0] == 0:
                place.axhline(found[0][1], color=colour, ls=":", lw=1.2, label=titles[method])
                continue
            counts, means, spreads = zip(*found, strict=True)
            _bars(place, counts, means, spreads, colour, marker, titles[method])
        _count_axis(place)
        place.set_title(task, fontsize="medium")
        place.set_xlabel("trainable parameters of the deltas")
        place.set_ylabel("test accuracy, %")
    legend(figure, axes)
    return figure


def over_cost(points: Mapping[str, Mapping[str, tuple[float, Outcome]]], titles: Mapping[str, str]) -> Figure:
    """Accuracy over the time of a step, as a ratio to that of the classifier alone: a panel a task."""
    figure, axes = panels(len(points))
    for place, (task, methods) in zip(axes, points.items(), strict=True):
        for method, (ratio, outcome) in methods.items():
            colour, marker = STYLES[method]
            mean, width = mean_and_spread(outcome)
            _bars(place, [ratio], [mean], [width], colour, marker, titles[method])
        place.set_title(task, fontsize="medium")
        place.set_xlabel("time of a step / that of the head alone")
        place.set_ylabel("test accuracy, %")
    legend(figure, axes)
    return figure


def differences(contrasts: Mapping[str, Contrast], titles: Mapping[str, str]) -> Figure:
    """Paired differences with their intervals and every single seed's: a panel a contrast, tasks and their mean below
    each other."""
    rows = max(len(contrast.differences) for contrast in contrasts.values())
    figure, axes = panels(len(contrasts), height=1.5 + 0.34 * rows)
    for place, (name, contrast) in zip(axes, contrasts.items(), strict=True):
        tasks = list(contrast.differences)
        for row, task in enumerate(tasks):
            values = contrast.differences[task]
            place.plot(values, [row + 0.22] * len(values), ".", color=GREY, ms=4, label="a seed")
            _span(place, row, contrast.on(task), STYLES["flora"][0], "mean of a task")
        if len(tasks) > 1:
            _span(place, len(tasks), contrast.here, BLACK, "mean of these tasks")
        place.axvline(0, color=GREY, lw=0.9)
        labels = [titles[task] for task in tasks] + (["all"] if len(tasks) > 1 else [])
        place.set_yticks(range(len(labels)), labels)
        place.set_ylim(len(labels) - 0.4, -0.6)
        place.set_title(name, fontsize="medium")
        place.set_xlabel("points of accuracy")
    legend(figure, axes)
    return figure


def over_values(
    lines: Mapping[str, Mapping[str, Mapping[float, Outcome]]], titles: Mapping[str, str], label: str
) -> Figure:
    """Accuracy over a number that was varied, on a scale of powers of 2: a panel a task, a line a method."""
    figure, axes = panels(len(lines))
    for place, (task, methods) in zip(axes, lines.items(), strict=True):
        ticks: set[float] = set()
        for method, outcomes in methods.items():
            colour, marker = STYLES[method]
            values = sorted(outcomes)
            ticks.update(values)
            means, spreads = zip(*(mean_and_spread(outcomes[value]) for value in values), strict=True)
            _bars(place, values, means, spreads, colour, marker, titles[method])
        place.set_xscale("log", base=2)
        place.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
        place.minorticks_off()
        place.set_title(task, fontsize="medium")
        place.set_xlabel(label)
        place.set_ylabel("test accuracy, %")
    legend(figure, axes)
    return figure


def over_rates(outcomes: Mapping[str, Mapping[str, Outcome]], titles: Mapping[str, str]) -> Figure:
    """Accuracy on the validation examples over the learning rate, in the search: a panel a task, a line a method."""
    figure, axes = panels(len(outcomes))
    for place, (task, methods) in zip(axes, outcomes.items(), strict=True):
        for method, outcome in methods.items():
            colour, marker = STYLES[method]
            rates = sorted(outcome.searched)
            found = [100 * outcome.searched[rate]["validation"] for rate in rates]
            place.plot(rates, found, color=colour, marker=marker, ms=6, mec="white", mew=0.6, label=titles[method])
        place.set_xscale("log")
        place.set_title(task, fontsize="medium")
        place.set_xlabel("learning rate")
        place.set_ylabel("validation accuracy, %")
    legend(figure, axes)
    return figure


def ranking(outcomes: Mapping[str, Mapping[str, Outcome]], titles: Mapping[str, str]) -> Figure:
    """Accuracy of many methods below each other: a panel a task, in the order in which they are given."""
    names = list(dict.fromkeys(method for methods in outcomes.values() for method in methods))
    figure, axes = panels(len(outcomes), height=1.1 + 0.26 * len(names))
    for column, (place, (task, methods)) in enumerate(zip(axes, outcomes.items(), strict=True)):
        for row, method in enumerate(names):
            if method in methods:
                colour, marker = STYLES[method]
                mean, width = mean_and_spread(methods[method])
                place.errorbar(mean, row, xerr=width, color=colour, marker=marker, ms=6, capsize=2, lw=1)
        place.set_yticks(range(len(names)), [titles[name] for name in names] if column % 3 == 0 else [""] * len(names))
        place.set_ylim(len(names) - 0.4, -0.6)
        place.set_title(task, fontsize="medium")
        place.set_xlabel("test accuracy, %")
    return figure


def _count_axis(place: Axes) -> None:
    """Powers, with ticks that are written out: "200 k", "1 M"."""
    ticker = require("matplotlib.ticker", extra="study")
    place.set_xscale("log")
    place.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    place.xaxis.set_major_formatter(ticker.EngFormatter())
    place.minorticks_off()


def _bars(
    place: Axes,
    x: Sequence[float],
    y: Sequence[float],
    widths: Sequence[float],
    colour: str,
    marker: str,
    label: str,
) -> None:
    size = {"*": 11, "o": 9, "^": 8}.get(marker, 6)  # so that none hides another that lies at the same place
    drawn: dict[str, Any] = {"color": colour, "marker": marker, "ms": size, "mec": "white"}
    place.errorbar(x, y, yerr=widths, lw=1.2, capsize=2, elinewidth=0.9, mew=0.6, label=label, **drawn)


def _span(place: Axes, row: int, estimate: Estimate, colour: str, label: str) -> None:
    if estimate.low is not None and estimate.high is not None:
        place.plot([estimate.low, estimate.high], [row, row], color=colour, lw=1.6)
    place.plot([estimate.mean], [row], "D", color=colour, ms=5, label=label)
