"""What the study says, in sentences that its figures choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flora.study.plan import MAIN_METHODS, SHARE
from flora.study.results import Contrast, Results
from flora.study.wording import TITLES, listed, number, setting, signed, spanned, verdict

PAPER = 1.8
"""How many points more accuracy on average the summary of FLoRA's paper (arXiv 2405.14739) names."""

_SLOWER = 1.5  # times LoRA's training loss, from which on a delta has fitted less
_ROOM = 5.0  # points, below which a task says little


def reading(results: Results) -> str:
    """Where FLoRA wins and where it does not, what to take, what a wrong choice costs: a list in markdown."""
    said = [
        *_against(results, "lora"),
        *_against(results, "locon"),
        *_fitted(results),
        *_beside_the_ends(results),
        *_budgets(results),
        *_settings(results),
        *_edges(results),
    ]
    return "\n".join(f"- {sentence}" for sentence in said)


def _against(results: Results, other: str) -> list[str]:
    tasks = [task for task in results.main_tasks() if other == "lora" or not results.same("lora", other, task)]
    found = results.between("flora", other, tasks)
    if found is None:
        return []
    title = TITLES[other]
    where = (
        f" over {number(len(found.differences), 'task')}"
        if len(found.differences) > 1
        else f" on {next(iter(found.differences))}"
    )
    said = [f"**{verdict('FLoRA', title, found.here)}{where}**, at the same number of parameters{_by_task(found)}."]
    if found.here.sign and len(found.differences) > 1 and found.beyond.sign != found.here.sign:
        said[0] += (
            f" That holds for these tasks; taken as a sample of others ({spanned(found.beyond)}) they do not settle it."
        )
    if other == "lora" and found.here.low is not None and found.here.high is not None:
        within = found.here.low <= PAPER <= found.here.high
        said[0] += (
            f" The paper's summary names {PAPER:g} points on average, over other networks and data: that is "
            f"{'within' if within else 'above' if found.here.high < PAPER else 'below'} this interval."
        )
    more = [task for task in results.main_tasks("networks") if other == "lora" or not results.same("lora", other, task)]
    more = [task for task in more if task not in tasks]
    beyond = results.between("flora", other, more) if results.main == "core" else None
    if beyond is not None:
        said.append(f"On {listed(beyond.differences)}: {verdict('FLoRA', title, beyond.here)}{_by_task(beyond)}.")
    return said


def _by_task(contrast: Contrast) -> str:
    """Which tasks are clear for themselves, where there are several."""
    if len(contrast.differences) < 2:
        return ""
    by_sign: dict[int, list[str]] = {}
    for task in contrast.differences:
        by_sign.setdefault(contrast.on(task).sign, []).append(task)
    names = {1: "clearly better on", -1: "clearly worse on", 0: "unclear on"}
    return "; " + "; ".join(f"{names[sign]} {listed(by_sign[sign])}" for sign in (1, -1, 0) if sign in by_sign)


def _fitted(results: Results) -> list[str]:
    """Where FLoRA is behind LoRA on the test examples and on those that it has learned from as well."""
    found = []
    for task in results.main_tasks():
        ours, theirs = results.standard(task, "flora"), results.standard(task, "lora")
        if ours is None or theirs is None or ours.train_loss is None or not theirs.train_loss:
            continue
        times = ours.train_loss / theirs.train_loss
        behind = results.between("flora", "lora", [task])
        if behind is not None and behind.on(task).mean < 0 and times > _SLOWER:
            found.append(f"{times:.1f} times LoRA's on {task} ({results.tasks[task]} steps)")
    return (
        [f"Where FLoRA is behind, it has also fitted less: its training loss ends at {listed(found)}."] if found else []
    )


def _beside_the_ends(results: Results) -> list[str]:
    tasks = results.main_tasks()
    said = []
    full, head = (results.between("flora", other, tasks) for other in ("full", "head"))
    if full is not None:
        shares = []
        for task in full.differences:
            ours, all_of_it = results.standard(task, "flora"), results.standard(task, "full")
            if ours is not None and all_of_it is not None and ours.parameters and all_of_it.parameters:
                shares.append(100 * ours.parameters / all_of_it.parameters)
        ends = list(dict.fromkeys(f"{end:.1f} %" for end in (min(shares), max(shares)))) if shares else []
        learns = f", with {' to '.join(ends)} of its trainable parameters" if ends else ""
        said.append(f"{verdict('FLoRA', TITLES['full'], full.here)}{learns}{_by_task(full)}.")
    if head is not None:
        said.append(f"{verdict('FLoRA', 'the classifier alone', head.here)}{_by_task(head)}.")
    room = results.between("full", "head", tasks)
    narrow = [] if room is None else [task for task in room.differences if room.on(task).mean < _ROOM]
    if narrow:
        said.append(
            f"On {listed(narrow)} full fine-tuning is less than {_ROOM:g} points above the classifier alone, which "
            "leaves little room for a difference between methods."
        )
    return said


def _budgets(results: Results) -> list[str]:
    tasks = results.main_tasks("budgets")
    shares = sorted({o.comparison.share for o in results.part("budgets") if o.comparison.share and o.finals})
    said = []
    for share in shares:
        found = results.contrast(
            {task: (results.at(task, "flora", share), results.at(task, "flora", SHARE)) for task in tasks}
        )
        if found is not None:
            first, second = (f"FLoRA with {100 * s:g} % of the weights" for s in (share, SHARE))
            said.append(
                f"Rank: {verdict(first, second.replace('FLoRA ', 'one '), found.here)}, on {listed(found.differences)}."
            )
    gains = []
    for share in sorted({*shares, SHARE}) if shares else []:
        found = results.contrast(
            {task: (results.at(task, "flora", share), results.at(task, "lora", share)) for task in tasks}
        )
        if found is not None:
            gains.append(f"{signed(found.here.mean)} ({spanned(found.here)}) at {100 * share:g} %")
    if len(gains) > 1:
        said.append(f"FLoRA less LoRA by budget, points: {listed(gains)}.")
    return said


_SETTINGS: Mapping[str, tuple[str, str]] = {
    "scale": ("Scale", "scale 1"),
    "start": ("Start", "the authors' factors"),
    "core-lr": ("Learning rate of the core", "one rate for all"),
    "batch-norm": ("BatchNorm", "held statistics"),
    "alpha": ("A learning rate taken to another rank", "no rule"),
}


def _settings(results: Results) -> list[str]:
    """What each part's settings change, of each method at each budget."""
    said = []
    for part, (about, plain) in _SETTINGS.items():
        kinds = dict.fromkeys((o.comparison.method, o.comparison.share) for o in results.part(part))
        for method, share in kinds:
            found = _of_settings(results, part, method, share)
            if found:
                budget = "" if share == SHARE or share is None else f" at {100 * share:g} %"
                said.append(f"{about}, {TITLES[method]}{budget}: {_beside(plain, found)}")
    return said


def _beside(plain: str, found: Iterable[tuple[Mapping[str, Any], Contrast]]) -> str:
    """Sentences on what settings change beside the plain one."""
    clear: list[str] = []
    unclear: list[str] = []
    identical: list[str] = []
    better = False
    for options, contrast in found:
        estimate = contrast.here
        if contrast.identical:
            identical.append(setting(options))
        elif estimate.sign:
            better |= estimate.sign > 0
            change = "gains" if estimate.sign > 0 else "costs"
            tasks = ", ".join(f"{signed(contrast.on(task).mean)} on {task}" for task in contrast.differences)
            by_task = f"; {tasks}" if len(contrast.differences) > 1 else ""
            clear.append(f"{setting(options)} {change} {abs(estimate.mean):.1f} points ({spanned(estimate)}{by_task})")
        else:
            unclear.append(f"{setting(options)} ({signed(estimate.mean)}, {spanned(estimate)})")
    said = [f"beside {plain}, {listed(clear)}."] if clear else []
    if unclear:
        said.append(f"{'N' if clear else 'n'}ot to be told from {plain}: {'; '.join(unclear)}.")
    if identical:
        said.append(f"{listed(identical)}: every run scored as it does with {plain}, as if nothing had been changed.")
    if clear and not better:
        said.append(f"Nothing that was tried is clearly better than {plain}.")
    return " ".join(said)


def _of_settings(
    results: Results, part: str, method: str, share: float | None
) -> list[tuple[Mapping[str, Any], Contrast]]:
    """Every setting of a method in a part, beside the one that it has otherwise."""
    every: list[Mapping[str, Any]] = []
    for outcome in results.part(part):
        c = outcome.comparison
        if (c.method, c.share) == (method, share) and c.options and c.options not in every:
            every.append(c.options)
    found = []
    for options in every:
        pairs = {}
        for task in results.main_tasks(part):
            ours = results.find(part, task, method, share, options)
            pairs[task] = ours, results.baseline(part, task, method, share)
        contrast = results.contrast(pairs)
        if contrast is not None:
            found.append((options, contrast))
    return found


def _edges(results: Results) -> list[str]:
    """Which learning rates might have gone further."""
    found: dict[str, list[str]] = {}
    more = results.main_tasks("networks") if results.main == "core" else []
    for task in dict.fromkeys((*results.main_tasks(), *more)):
        for method in MAIN_METHODS:
            outcome = results.standard(task, method)
            if outcome is not None and outcome.edge is not None:
                found.setdefault(outcome.edge, []).append(f"{TITLES[method]} on {task}")
    if not found:
        return ["Every learning rate was chosen from inside the grid."]
    where = "; ".join(f"{edge}: {listed(names)}" for edge, names in found.items())
    return [f"Some learning rates were chosen at the grid's end, where one beyond it might be better ({where})."]
