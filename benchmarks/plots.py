"""Drawings of a run: the layers' ratios as bars, and the curves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.curves import SHOWN
from benchmarks.report import PARTS, Run
from flora.bench.compare import Result
from flora.bench.peers import FROZEN

matplotlib.rcParams["svg.hashsalt"] = "flora"  # the same run draws the same file
matplotlib.rcParams["svg.fonttype"] = "none"


def draw(run: Run, folder: Path) -> dict[str, str]:
    """Writes an SVG for each part and each curve into ``folder``; returns their file names by title.

    Noisy figures are left out, and so are small calls, of which no ratio is of interest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for part, results in run.results.items():
        if part != "small":
            drawn[PARTS[part]] = _saved(_bars(results), folder, part)
    for name, points in run.curves.items():
        drawn[name] = _saved(_lines(name, points), folder, name)
    return drawn


def _saved(figure: Figure, folder: Path, name: str) -> str:
    file = f"bench-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.svg"
    figure.savefig(folder / file, format="svg", metadata={"Date": None})
    return file


def _bars(results: Sequence[Result]) -> Figure:
    """A group of bars for each comparison; the arithmetic limit as a mark across flora's."""
    peers = [*dict.fromkeys(row.peer for result in results for row in result.rows if row.peer != FROZEN)]
    figure = Figure(figsize=(9, 1.0 + 0.11 * (len(peers) + 2) * len(results)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        ratios = [(j, row.ratio) for j, row in enumerate(result.row(peer) for result in results) if row and row.ratio]
        places = [j - 0.4 + (i + 0.5) * height for j, _ in ratios]
        fade = 1 - i // 10 * 0.5  # there are ten colours
        axes.barh(places, [ratio for _, ratio in ratios], height, label=peer, color=f"C{i % 10}", alpha=fade)
    for j, result in enumerate(results):
        if result.limit is not None:
            axes.plot([result.limit] * 2, [j - 0.42, j + 0.42], color="black", lw=1, label="limit" if j == 0 else None)
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.invert_yaxis()
    axes.axvline(1.0, color="grey", lw=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time of a step, as a ratio to the frozen one")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


def _lines(name: str, points: dict[int, Result]) -> Figure:
    """Milliseconds a step on the left, the ratio to the frozen step on the right."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    for peer in SHOWN:
        rows = [(value, result.row(peer)) for value, result in points.items()]
        used = [(value, row) for value, row in rows if row is not None and row.timing is not None and not row.noisy]
        values = [value for value, _ in used]
        times.plot(values, [row.timing.quartile * 1e3 for _, row in used if row.timing], "o-", label=peer)
        if peer != FROZEN:
            ratios.plot(values, [row.ratio for _, row in used], "o-", color=times.lines[-1].get_color(), label=peer)
    for axes, label in ((times, "ms a step"), (ratios, "ratio to the frozen step")):
        axes.set_xscale("log", base=2)
        axes.set_xticks([*points], [*map(str, points)])
        axes.set_xlabel(name.rpartition(" over ")[2])
        axes.set_ylabel(label)
    times.set_yscale("log")
    ratios.axhline(1.0, color="grey", lw=0.8)
    times.legend(frameon=False)
    figure.suptitle(name, fontsize="medium")
    return figure
