"""The report's section on structural distortion: what it says follows from the lines of kind "distortion"."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flora.config import TuckerConfig
from flora.study.figures import legend, panels
from flora.study.plan import SHARE
from flora.study.records import Record
from flora.study.section import BLACK, STYLES, VERMILION, Section, shown, table
from flora.study.statistics import LEVEL, Estimate, interval, over_groups
from flora.study.structure import SHARE as LEADING
from flora.study.synthetic import SYNTHETIC
from flora.study.wording import TITLES, listed, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = 37
"""How much less structural distortion, in %, the summary of FLoRA's paper (arXiv 2405.14739) names."""

_COMPARED = ("lora", "locon", "flora")
_NONE = "–"
_FILLED = 0.98  # of a budget: what is below is said
_OWN_TITLES = {"flora-ranks": "FLoRA of chosen ranks", "loha": "LoHa", "lokr": "LoKr"}
_OWN_STYLES = {"flora-ranks": (VERMILION, "x"), "loha": STYLES["peft-loha"], "lokr": STYLES["peft-lokr"]}
_KIND_TITLES = {
    "full": "full kernels",
    "depthwise": "depthwise kernels",
    "pointwise": "1×1 kernels",
    "linear": "linear layers",
}


def title(method: str) -> str:
    """A method's, those that only fits have included."""
    return _OWN_TITLES.get(method) or TITLES[method]


def style(method: str) -> tuple[str, str]:
    """A method's colour and marker."""
    return _OWN_STYLES.get(method) or STYLES[method]


@dataclass(frozen=True)
class Target:
    """An update, and each method's points by their share of its entries."""

    about: Record
    points: Mapping[str, Mapping[float, Record]]

    def point(self, method: str, share: float) -> Record | None:
        """The method's best at a budget; None if it needs more parameters, or was not fitted."""
        return self.points.get(method, {}).get(share)


class Lines:
    """What was measured: targets with their fits, and what training has learned."""

    def __init__(self, records: Iterable[Record]) -> None:
        parts: dict[str, list[Record]] = {"target": [], "fit": [], "learned": []}
        for record in records:
            if record["kind"] == "distortion":
                parts[record["part"]].append(record)
        fits: dict[str, dict[str, dict[float, Record]]] = {}
        for fit in parts["fit"]:
            points = {point["share"]: point for point in fit["points"] if "error" in point}
            fits.setdefault(fit["target"], {})[fit["method"]] = points
        self.targets = [Target(about, fits.get(about["target"], {})) for about in parts["target"]]
        self.learned = parts["learned"]

    @cached_property
    def synthetic(self) -> dict[str, Group]:
        """By their names, in the order in which they are defined."""
        names = {
            one.name: [t for t in self._of(None) if t.about["target"].startswith(f"{one.name}/")] for one in SYNTHETIC
        }
        return {name: Group.of(found) for name, found in names.items() if found}

    @cached_property
    def real(self) -> dict[str, Group]:
        """Updates of full fine-tuning, by the kind of their layers."""
        found = {kind: [t for t in self._real() if t.about["layer_kind"] == kind] for kind in _KIND_TITLES}
        return {kind: Group.of(targets) for kind, targets in found.items() if targets}

    def _of(self, task: str | None) -> list[Target]:
        return [target for target in self.targets if target.about["task"] == task]

    def _real(self) -> list[Target]:
        return [target for target in self.targets if target.about["task"] is not None]


@dataclass(frozen=True)
class Group:
    """Targets of one sort, compared at one budget: the share at which most of them have LoRA, LoCon and FLoRA, the
    nearest to that of the runs among equals. ``targets`` are those that have, and ``all`` of them."""

    targets: Sequence[Target]
    share: float
    all: Sequence[Target]

    @classmethod
    def of(cls, targets: Sequence[Target]) -> Group:
        """All targets of the sort."""
        shares = sorted({share for t in targets for points in t.points.values() for share in points})
        with_all = {s: [t for t in targets if all(t.point(m, s) for m in _COMPARED)] for s in shares}
        share = max(shares, key=lambda s: (len(with_all[s]), -abs(math.log(s / SHARE))), default=SHARE)
        return cls(with_all.get(share, []), share, targets)

    @property
    def methods(self) -> list[str]:
        """All that were fitted, in the order of their lines."""
        return list(dict.fromkeys(method for target in self.all for method in target.points))

    def errors(self, method: str) -> list[float] | None:
        """Of each target; None unless the method has a point for all of them."""
        points = [target.point(method, self.share) for target in self.targets]
        return [p["error"] for p in points if p] if points and all(points) else None

    def filled(self, method: str) -> float:
        """The parameters of a method's points over the budgets, on average."""
        points = [target.point(method, self.share) for target in self.targets]
        return statistics.fmean(p["parameters"] / p["budget"] for p in points if p)

    def ratio(self, method: str, other: str) -> Estimate | None:
        """The logarithm of the method's error over the other's: its mean over the targets. None without any, or where
        an error is 0."""
        pairs = list(zip(self.errors(method) or [], self.errors(other) or [], strict=False))
        if not pairs or min(min(pair) for pair in pairs) <= 0:
            return None
        return interval([math.log(a / b) for a, b in pairs])


def section(records: Iterable[Record]) -> Section | None:
    """The section; None if there are no lines for it."""
    lines = Lines(records)
    if not lines.targets and not lines.learned:
        return None
    parts = [_definitions(), _best(lines), _synthetic(lines), _learned(lines)]
    text = "\n\n".join(part.text for part in parts if part is not None)
    return Section(text, {name: figure for part in parts if part is not None for name, figure in part.figures.items()})


def headline(records: Iterable[Record]) -> str | None:
    """One sentence: the distortion of FLoRA's best fits beside LoRA's on full kernels' updates; None without any."""
    group = Lines(records).real.get("full")
    if group is None or (estimate := group.ratio("flora", "lora")) is None:
        return None
    return (
        f"Structural distortion, the error of the best fit to {number(len(group.targets), 'update')} of full kernels "
        f"with {_percent(group.share)} of their entries as parameters: {_compared('FLoRA', 'LoRA', estimate)}. The "
        f"paper's summary names {PAPER} % less."
    )


def _definitions() -> Section:
    return Section(
        f"""## Structural distortion

How close can a parametrisation come to an update ΔW, and how close does training come? The *error* of ΔŴ is
‖ΔŴ − ΔW‖ / ‖ΔW‖. Along each mode, ΔW as a matrix of that mode's rows has singular values and directions: the *spectrum*
distortion is the norm of the singular values' difference over ‖ΔW‖, which is never above the error, and the *subspace*
distortion 1 − mean cos² of the principal angles between the leading directions of both, as many as hold
{_percent(LEADING)} of ‖ΔW‖². All are 0 at best, and none depends on the bases or the unit.

FLoRA's paper says in its summary that it has {PAPER} % less structural distortion than LoRA; how it defines that is not
known here, so that its figure and those below may be of different things."""
    )


# The best that there are ---------------------------------------------------------------------------------------------


def _best(lines: Lines) -> Section | None:
    groups = {kind: group for kind, group in lines.real.items() if group.targets}
    if not groups:
        return None
    sentences = [_verdicts(kind, group) for kind, group in groups.items()]
    kernels = groups.get("full")
    columns = [f"{_KIND_TITLES[kind]}, {_percent(group.share)}" for kind, group in groups.items()]
    counts = listed(f"{len(group.targets)} of {_KIND_TITLES[kind]}" for kind, group in groups.items())
    text = f"""### The closest to real updates

The target is the update that full fine-tuning has made of a layer; each method is fitted to it as well as can be, by a
formula where there is one (LoRA's is the truncated singular value decomposition), by alternating least squares (Tucker
decompositions, LoKr), or by L-BFGS from starts that are better than a simpler method's best (Toeplitz, low displacement
rank, LoHa). What alternates or descends may have missed the best; the others cannot. The number of parameters is that
of `flora.budget` on 64 such layers, which gives some of them the next rank.

{table(["mean error", *columns], _errors(groups))}

The columns name the budget, as a share of the weight's entries; the updates are {counts}. In brackets is how much of
the budget a method uses that cannot use all of it; a dash says that it needs more on some layer.

{shown("distortion", "The error of the best fit to real updates over parameters, by kind of layer")}

{" ".join(sentences)} Intervals of {_percent(LEVEL)} are over updates of a few networks, whose layers are alike.
{_against_the_paper(kernels)}{_ranks(kernels)}

How many of a mode's directions hold {_percent(LEADING)} of ‖ΔW‖², median over the updates:

{_leading(lines.real)}

Along the modes:

{_modes(groups)}

{_spectra_note(kernels)}"""
    figures = {"distortion": _curves({_KIND_TITLES[kind]: group for kind, group in lines.real.items()})}
    if kernels is not None and (spectra := _spectra(kernels)) is not None:
        figures["spectra"] = spectra
    return Section(text.strip(), figures)


def _errors(groups: Mapping[str, Group]) -> list[list[str]]:
    methods = list(dict.fromkeys(method for group in groups.values() for method in group.methods))
    return [[title(method), *(_error(group, method) for group in groups.values())] for method in methods]


def _error(group: Group, method: str) -> str:
    errors = group.errors(method)
    if errors is None:
        return _NONE
    used = "" if (filled := group.filled(method)) >= _FILLED else f" ({_percent(filled)})"
    return f"{statistics.fmean(errors):.3f}{used}"


def _verdicts(kind: str, group: Group) -> str:
    said = []
    for other in ("lora", "locon"):
        estimate = group.ratio("flora", other)
        if estimate is not None and not (other == "locon" and kind == "linear"):
            said.append(_compared("FLoRA", title(other), estimate))
    return f"On {_KIND_TITLES[kind]}, {' and '.join(said)}." if said else ""


def _compared(first: str, second: str, ratio: Estimate) -> str:
    """The sentence on a mean logarithm of two errors' ratio."""
    change = _change(ratio.mean)
    first, second = (f"the error of {name}" for name in (first, second))
    if ratio.low is None or ratio.high is None:
        return f"{first} is {_signed(change)} % beside {second}, on too few updates to say more"
    span = f"{_percent(LEVEL)} interval {_signed(_change(ratio.low))} to {_signed(_change(ratio.high))} %"
    if ratio.sign == 0:
        return f"{first} cannot be told from {second} ({_signed(change)} %, {span})"
    how = "below" if ratio.sign < 0 else "above"
    return f"{first} is {abs(change):.1f} % {how} {second} ({span})"


def _against_the_paper(group: Group | None) -> str:
    if group is None or (ratio := group.ratio("flora", "lora")) is None or ratio.low is None or ratio.high is None:
        return ""
    low, high = _change(ratio.low), _change(ratio.high)
    if low <= -PAPER <= high:
        how = "the interval holds the paper's figure"
    elif ratio.sign < 0:
        how = f"that is {'less' if low > -PAPER else 'more'} of a gain than the paper's"
    else:
        how = "no gain is seen" if ratio.sign == 0 else "it is a loss and no gain"
    return (
        f"The paper's {PAPER} % less than LoRA are of convolutions, if they are of the same: on full kernels {how}.\n"
    )


def _ranks(group: Group | None) -> str:
    """Which kernel ranks serve real kernels best, by the ranks that were chosen for the targets."""
    if group is None:
        return ""
    found = []
    for target in group.targets:
        point, kernel = target.point("flora-ranks", group.share), target.about["shape"][2:]
        if point is not None:
            setting = max(point["sizes"], key=lambda size: int(size[2]))[0]
            ranks = [int(rank) for rank in setting.removeprefix("rank ").split("×")][2:]
            found.append(ranks == kernel)
    if not found:
        return ""
    free = [
        _compared(title(m), "LoRA", r) for m in ("flora-ranks", "locon") if (r := group.ratio(m, "lora")) is not None
    ]
    return (
        (f"\nWith other ranks of the modes, {' and '.join(free)}." if free else "")
        + f"\nWith ranks that were chosen for the target, {sum(found)} of the {len(found)} approximations "
        "of full kernels keep the kernel's modes whole, and the others pay for more channel ranks by cutting one or "
        f"both; FLoRA's default cuts both to {TuckerConfig().kernel_rank}."
    )


def _leading(groups: Mapping[str, Group]) -> str:
    """How concentrated the updates are: the leading directions of the output's mode, the input's and the kernel's."""
    rows = []
    for kind, group in groups.items():
        cells = []
        for modes in (slice(0, 1), slice(1, 2), slice(2, None)):
            abouts = [target.about for target in group.all]
            pairs = [
                pair for a in abouts for pair in zip(a["leading"][modes], a["shape"][modes], strict=True) if pair[0]
            ]
            medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
            cells.append("{:g} of {:g}".format(*medians) if medians else _NONE)
        rows.append([_KIND_TITLES[kind], *cells])
    return table(["", "out", "in", "kernel"], rows)


def _modes(groups: Mapping[str, Group]) -> str:
    rows = []
    for kind, group in groups.items():
        for method in (*_COMPARED, "flora-ranks"):
            points = [target.point(method, group.share) for target in group.targets]
            if all(points) and not (method == "locon" and kind == "linear"):
                rows.append([f"{_KIND_TITLES[kind]}: {title(method)}", *_by_mode([p for p in points if p])])
    head = ["", *(f"{what}, {mode}" for what in ("spectrum", "subspace") for mode in ("out", "in", "kernel"))]
    return table(head, rows)


def _by_mode(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means of spectra and subspaces over the output's mode, the input's and the kernel's."""
    cells = []
    for field in ("spectra", "subspaces"):
        for modes in (slice(0, 1), slice(1, 2), slice(2, None)):
            values = [value for point in points for value in point[field][modes] if value is not None]
            cells.append(f"{statistics.fmean(values):.3f}" if values else _NONE)
    return cells


def _spectra_note(group: Group | None) -> str:
    target = None if group is None else _middle(group)
    if target is None:
        return ""
    caption = "Singular values along each mode of one update and of its best approximations"
    about = target.about
    return (
        f"{shown('spectra', caption)}\n\nThe middle one of these kernels, {about['layer']} of {about['task']}, "
        f"{'×'.join(map(str, about['shape']))}, with {_percent(SHARE)} of its entries as parameters."
    )


# Synthetic targets ---------------------------------------------------------------------------------------------------


def _synthetic(lines: Lines) -> Section | None:
    groups = {name: group for name, group in lines.synthetic.items() if group.targets}
    if not groups:
        return None
    titles = {one.name: one.title for one in SYNTHETIC}
    shape = next(iter(groups.values())).targets[0].about["shape"]
    legend_ = "\n".join(f"- *{name}*: {titles[name]}" for name in groups)
    text = f"""### The closest to targets of known structure

The same for drawn targets of the shape {"×".join(map(str, shape))}:

{legend_}

{table(["mean error", *(f"{name}, {_percent(group.share)}" for name, group in groups.items())], _errors(groups))}

{shown("distortion-synthetic", "The error of the best fit to synthetic targets over parameters")}

{_own_targets(groups)}"""
    return Section(text.strip(), {"distortion-synthetic": _curves(lines.synthetic)})


def _own_targets(groups: Mapping[str, Group]) -> str:
    """Who is closest where: a sentence that any other figures would make another one."""
    closest: dict[str, list[str]] = {}
    for name, group in groups.items():
        errors = {m: statistics.fmean(e) for m in _COMPARED if (e := group.errors(m)) is not None}
        if errors:
            least = min(errors.values())
            among = [title(m) for m, e in errors.items() if e <= least + 1e-3]
            closest.setdefault(listed(among), []).append(f"*{name}*")
    said = [f"{who} on {listed(names)}" for who, names in closest.items()]
    return f"Of LoRA, LoCon and FLoRA the closest: {'; '.join(said)}." if said else ""


# What is learned -----------------------------------------------------------------------------------------------------


def _learned(lines: Lines) -> Section | None:
    runs = [run for run in lines.learned if run["layers"] and not run["options"]]
    if not runs:
        return None
    kinds = [
        kind for kind in _KIND_TITLES if any(layer["layer_kind"] == kind for run in runs for layer in run["layers"])
    ]
    rows = [
        [
            f"{run['task']}: {_learner(run)}",
            _plain(run["cosine"]),
            f"{run['norm']:.2f}",
            *(_plain(_mean(run["layers"], kind, "cosine")) for kind in kinds),
        ]
        for run in runs
    ]
    modes = [
        [
            f"{_KIND_TITLES[kind]}: {title(method)}",
            _number(_mean(layers, kind, "error")),
            *_by_mode(_alike(layers, kind)),
        ]
        for kind in kinds
        for method in _COMPARED
        if _alike(layers := [layer for run in runs if run["method"] == method for layer in run["layers"]], kind)
    ]
    head = ["", "error", *(f"{what}, {mode}" for what in ("spectrum", "subspace") for mode in ("out", "in", "kernel"))]
    text = f"""### What training finds

The update that each method has learned beside that of full fine-tuning with the same seed, the same classifier to
start from and the same examples in the same order: the cosine of both, all layers as one vector, and the norm over that
of full fine-tuning; then the mean cosine of layers of one kind.

{table(["", "cosine", "norm", *(_KIND_TITLES[kind] for kind in kinds)], rows)}

{_yardstick(runs)} {_paired_cosines(runs)}

After the scalar that brings an update closest to that of full fine-tuning, on average over its layers and the tasks:

{table(head, modes)}

{_possible(lines, runs)}"""
    return Section(text.strip())


def _learner(run: Record) -> str:
    return f"full fine-tuning, seed {run['seed']}" if run["method"] == "full" else title(run["method"])


def _alike(layers: Iterable[Record], kind: str) -> list[Record]:
    return [layer for layer in layers if layer["layer_kind"] == kind]


def _mean(layers: Iterable[Record], kind: str, field: str) -> float | None:
    values = [layer[field] for layer in _alike(layers, kind)]
    return statistics.fmean(values) if values else None


def _yardstick(runs: Sequence[Record]) -> str:
    again = {run["task"]: run["cosine"] for run in runs if run["method"] == "full"}
    if not again:
        return ""
    values = listed(f"{cosine:.2f} on {task}" for task, cosine in again.items())
    return f"Full fine-tuning beside itself with another seed has a cosine of {values}: more is not to be expected."


def _paired_cosines(runs: Sequence[Record]) -> str:
    said = []
    for other in ("lora", "locon"):
        groups = [_differences(runs, task, other) for task in dict.fromkeys(run["task"] for run in runs)]
        groups = [group for group in groups if group]
        if not groups:
            continue
        estimate = over_groups(groups)
        count = sum(map(len, groups))
        if estimate.low is None or estimate.high is None:
            how = f"differs by {_signed(estimate.mean, 3)} from"
            span = "too few layers to say more"
        else:
            how = {-1: "is below", 0: "cannot be told from", 1: "is above"}[estimate.sign]
            ends = f"{_signed(estimate.low, 3)} to {_signed(estimate.high, 3)}"
            span = f"{_signed(estimate.mean, 3)}, {_percent(LEVEL)} interval {ends}"
        said.append(f"{how} {title(other)}'s ({span}, {number(count, 'layer')})")
    return f"Layer by layer, FLoRA's cosine {' and '.join(said)}." if said else ""


def _differences(runs: Sequence[Record], task: str, other: str) -> list[float]:
    """FLoRA's cosine less the other's, on each layer of a task that both have changed."""
    by_method = {run["method"]: run for run in runs if run["task"] == task}
    if "flora" not in by_method or other not in by_method:
        return []
    first, second = ({layer["layer"]: layer["cosine"] for layer in by_method[m]["layers"]} for m in ("flora", other))
    return [first[layer] - second[layer] for layer in first if layer in second]


def _possible(lines: Lines, runs: Sequence[Record]) -> str:
    """Learned errors beside those of the best fits, on the layers that have both."""
    rows = []
    for kind, group in lines.real.items():
        for method in _COMPARED:
            pairs = []
            for target in group.targets:
                point, about = target.point(method, group.share), target.about
                for run in runs:
                    if (run["task"], run["method"]) == (about["task"], method) and point is not None:
                        learned = [layer["error"] for layer in run["layers"] if layer["layer"] == about["layer"]]
                        pairs += [(value, point["error"]) for value in learned]
            if pairs:
                means = [statistics.fmean(values) for values in zip(*pairs, strict=True)]
                rows.append(
                    [f"{_KIND_TITLES[kind]}: {title(method)}", *(f"{mean:.3f}" for mean in means), str(len(pairs))]
                )
    if not rows:
        return ""
    shares = {_percent(group.share) for group in lines.real.values() if group.targets}
    nearer = sum(float(row[1]) > float(row[2]) + (1 - float(row[2])) / 2 for row in rows)
    reading = (
        "In each row the learned update is closer to being unrelated than to the best that its parametrisation has: "
        "what keeps it from full fine-tuning's is mostly the way there, and not its structure."
        if nearer == len(rows)
        else f"In {nearer} of {len(rows)} rows the learned update is closer to being unrelated than to the best that "
        "its parametrisation has."
    )
    return f"""The same layers' error after the best scalar, as learned, and of the best fit to the same update with
{listed(sorted(shares))} of the entries as parameters:

{table(["", "learned", "best", "layers"], rows)}

{reading}"""


# Drawings ------------------------------------------------------------------------------------------------------------


def _curves(groups: Mapping[str, Group]) -> Figure:
    """Error over the share of the entries that are parameters: a panel a group, a line a method."""
    figure, axes = panels(len(groups))
    for place, (name, group) in zip(axes, groups.items(), strict=True):
        asked = _asked(group)
        for method in group.methods:
            colour, marker = style(method)
            points = {_at(targets, method, share) for share, targets in asked.items()} - {None}
            if points:
                x, y = zip(*sorted(point for point in points if point), strict=True)
                place.plot(x, y, color=colour, marker=marker, ms=5, lw=1.2, label=title(method), alpha=0.9)
        place.set_xscale("log")
        place.set_xticks([*asked], [f"{100 * share:g}" for share in asked])
        place.minorticks_off()
        place.set_ylim(bottom=0)
        place.set_title(name, fontsize="medium")
        place.set_xlabel("parameters, % of the weight's entries")
        place.set_ylabel("error of the best fit")
    legend(figure, axes, columns=min(4, 2 * len(axes)))
    return figure


def _asked(group: Group) -> dict[float, list[Target]]:
    """The targets that were fitted at each share: at those of all targets, or, where that is not three, of half."""
    shares = sorted({share for t in group.all for points in t.points.values() for share in points})
    found = {s: [t for t in group.all if any(s in points for points in t.points.values())] for s in shares}
    of_all = {share: targets for share, targets in found.items() if len(targets) == len(group.all)}
    of_half = {share: targets for share, targets in found.items() if 2 * len(targets) >= len(group.all)}
    return of_all if len(of_all) > 2 else of_half


def _at(targets: Sequence[Target], method: str, share: float) -> tuple[float, float] | None:
    """A method's mean share of parameters and mean error; None unless it has a point for every target."""
    points = [(target.point(method, share), target.about["parameters"]) for target in targets]
    if not all(point for point, _ in points):
        return None
    used = [point["parameters"] / entries for point, entries in points if point]
    return statistics.fmean(used), statistics.fmean(point["error"] for point, _ in points if point)


def _middle(group: Group) -> Target | None:
    """The update of the middle depth whose spectra were kept for every method that is drawn."""
    found = [t for t in group.all if all((p := t.point(m, SHARE)) and "values" in p for m in _COMPARED)]
    return found[len(found) // 2] if found else None


def _spectra(group: Group) -> Figure | None:
    """Singular values along each mode: a panel a mode, the update and each method."""
    target = _middle(group)
    if target is None:
        return None
    figure, axes = panels(3)
    names = ("output channels", "input channels", "kernel rows")
    for mode, (place, name) in enumerate(zip(axes, names, strict=True)):
        _values(place, target.about["values"][mode], "the update", BLACK, "*")
        for method in _COMPARED:
            point = target.point(method, SHARE)
            assert point is not None
            _values(place, point["values"][mode], title(method), *style(method))
        place.set_yscale("log")
        place.set_title(name, fontsize="medium")
        place.set_xlabel("number of the singular value")
        place.set_ylabel("singular value / ‖ΔW‖")
    legend(figure, axes)
    return figure


def _values(place: Axes, values: Sequence[float] | None, name: str, colour: str, marker: str) -> None:
    found = values or []
    place.plot(range(1, len(found) + 1), found, color=colour, marker=marker, ms=4, lw=1.1, label=name)


# Words ---------------------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _change(logarithm: float) -> float:
    """Of a ratio's logarithm: the change in %."""
    return 100 * math.expm1(logarithm)


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _plain(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}".replace("-", "−")


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"
