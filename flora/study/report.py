"""docs/study.md from the lines of a study, and the figures that the README quotes: every sentence follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.study import distortion_report, figures
from flora.study.methods import METHODS
from flora.study.plan import MAIN_METHODS, SEARCH_SEED, SHARE
from flora.study.reading import reading
from flora.study.records import Record
from flora.study.results import KNOWN, Contrast, Outcome, Results
from flora.study.section import Section, shown, table, unwrapped
from flora.study.statistics import LEVEL, quantile, spread
from flora.study.wording import TITLES, estimated, listed, number, setting, verdict

BEGIN = "<!-- study: printed by python -m flora study --report DIR -->"
END = "<!-- end of study -->"

_NONE = "–"


def write(records: Iterable[Record], folder: Path) -> None:
    """Writes ``study.md`` and the ``study-*.svg`` that it shows into ``folder``.

    Raises ValueError if no comparison is complete, ModuleNotFoundError without matplotlib or SciPy.
    """
    sections = page(Results(records))
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        figures.save(section.figures, folder)
    (folder / "study.md").write_text("\n\n".join(unwrapped(section.text) for section in sections) + "\n")


def page(results: Results) -> list[Section]:
    """The whole report in its order. Raises ValueError if no comparison is complete."""
    if not results.main_tasks():
        raise ValueError("the lines hold no final run: the study has to get further before it can be reported")
    made = [
        _opening(results),
        _accuracy(results),
        _paired(results),
        _cost(results),
        distortion_report.section(results.records),
        *(part.section(results) for part in PARTS),
        _method(results),
        _machine(results),
    ]
    return [section for section in made if section is not None]


def readme_figures(records: Iterable[Record]) -> str:
    """The three figures that the README quotes, between their two marks.

    Raises ValueError if no comparison is complete.
    """
    results = Results(records)
    tasks = results.main_tasks()
    if not tasks:
        raise ValueError("the lines hold no final run: there are no figures to quote")
    seeds = max(len(o.finals) for o in results.part(results.main))
    share = f"{100 * SHARE:g} %"
    lines = [
        f"On {number(len(tasks), 'task')} ({listed(tasks)}), with {number(seeds, 'seed')} each, and deltas of as many "
        f"trainable parameters as {share} of the weights that they adapt:",
        "",
    ]
    quoted = []
    for other in ("lora", "locon"):
        where = [task for task in tasks if other == "lora" or not results.same("lora", other, task)]
        found = results.between("flora", other, where)
        if found is not None:
            on = "" if list(found.differences) == tasks else f" ({listed(found.differences)})"
            quoted.append(
                f"- {verdict('FLoRA', TITLES[other], found.here)}{on}: {_means(results, found, 'flora', other)}."
            )
    distortion = distortion_report.headline(results.records)
    if distortion is not None:
        quoted.append(f"- {distortion}")
    else:
        found = results.between("flora", "full", tasks)
        if found is not None:
            quoted.append(
                f"- {verdict('FLoRA', TITLES['full'], found.here)}: {_means(results, found, 'flora', 'full')}."
            )
    return "\n".join([BEGIN, *lines, *quoted, END])


def _means(results: Results, contrast: Contrast, *methods: str) -> str:
    """Each method's mean accuracy over the contrast's tasks, %."""
    found = []
    for method in methods:
        outcomes = [results.standard(task, method) for task in contrast.differences]
        means = [figures.mean_and_spread(outcome)[0] for outcome in outcomes if outcome is not None]
        found.append(f"{sum(means) / len(means):.1f} %")
    return f"{' and '.join(found)} on average"


# The main comparison -------------------------------------------------------------------------------------------------


def _opening(results: Results) -> Section:
    tasks = results.main_tasks()
    names = [KNOWN[task].title for task in tasks]
    quick = "" if results.main == "core" else " This is the quick version: it shows that the study runs, and no more."
    progress = [[PART_TITLES.get(name, name), f"{whole} of {planned}"] for name, whole, planned in results.progress()]
    text = f"""# Does structure pay?

FLoRA's claim is that an update which keeps a weight's own N-D structure does better than a matrix of as many
parameters. Here it is put to the test on {number(len(tasks), "task")}: {"; ".join(names)}. This page is written by
`python -m flora study --report DIR` from the lines of the runs, its sentences too; `python -m flora study` makes the
lines.{quick}

## What it says

{reading(results)}

## What ran

Each comparison is a method on a task in one setting: a search for its learning rate, and the seeds. A table says so
where some seeds are missing; what has none is left out.

{table(["part", "comparisons complete"], progress)}"""
    return Section(text)


def _accuracy(results: Results) -> Section:
    tasks = results.main_tasks()
    outcomes = {task: _present(results, task, MAIN_METHODS) for task in tasks}
    lines = {
        task: {method: [outcome, *_other_budgets(results, task, method)] for method, outcome in outcomes[task].items()}
        for task in tasks
    }
    text = f"""## Accuracy at equal numbers of parameters

Test accuracy in %, mean ± standard deviation over the seeds. Each delta gets at most {100 * SHARE:g} % of the entries
of the weights that all methods adapt; the classifier learns everywhere.

{_accuracies(outcomes, MAIN_METHODS)}

{shown("accuracy", "Test accuracy over the trainable parameters of the deltas, by task")}

Trainable parameters in the deltas, and what they are of the adapted weights:

{_parameters(outcomes, MAIN_METHODS)}

{_budget_note(outcomes)}

The learning rate of each was taken from the same grid by the validation accuracy on seed {SEARCH_SEED}; an arrow says
that it lies at the grid's end, so that one beyond it might have done better:

{_rates(outcomes, MAIN_METHODS)}

{shown("rates", "Validation accuracy over the learning rate, by task")}

The training loss at the end, the mean of the last ten steps and of the seeds, says who has fitted how much by then:

{_losses(outcomes, MAIN_METHODS)}
{_notes(results, outcomes)}"""
    return Section(
        text, {"accuracy": figures.over_parameters(lines, TITLES), "rates": figures.over_rates(outcomes, TITLES)}
    )


def _paired(results: Results) -> Section | None:
    tasks = results.main_tasks()
    more = [task for task in results.main_tasks("networks") if task not in tasks] if results.main == "core" else []
    contrasts = {}
    for other in ("lora", "locon", "full", "head"):
        where = [task for task in (*tasks, *more) if other != "locon" or not results.same("lora", "locon", task)]
        found = results.between("flora", other, where)
        if found is not None:
            contrasts[f"FLoRA − {TITLES[other]}"] = found
    if not contrasts:
        return None
    rows = [
        [task, *(estimated(c.on(task)) if task in c.differences else _NONE for c in contrasts.values())]
        for task in (*tasks, *more)
    ]
    several = [len(contrast.differences) > 1 for contrast in contrasts.values()]
    if any(several):
        pairs = list(zip(contrasts.values(), several, strict=True))
        rows.append(["*these tasks*", *(estimated(c.here) if enough else _NONE for c, enough in pairs)])
        rows.append(["*tasks like these*", *(estimated(c.beyond) if enough else _NONE for c, enough in pairs)])
    text = f"""## FLoRA beside the others, paired

Differences of test accuracy in points, each between two runs of the same seed, which gives both the same examples in
the same order and the same classifier to start from; in brackets the {100 * LEVEL:g} % interval. A task's is Student's
t interval over its seeds. That of *these tasks* holds the tasks as they are and lets the seeds vary (the variances of
the tasks' means add up, Welch's degrees of freedom). That of *tasks like these* is a t interval over the means of the
tasks, as if they were drawn from many: with so few it is wide, and it is the one that speaks of a task of your own.

{table(["", *contrasts], rows)}

{shown("differences", "Differences of accuracy with their intervals")}

{_few_seeds(contrasts.values())}One in twenty intervals misses the truth, and none is corrected for the number of
comparisons on this page. The test examples are the same for all seeds: what another choice of them would change is in
no interval. Where LoCon is LoRA to the last digit, as on networks without convolutions, it is left out."""
    names = {task: task for task in (*tasks, *more)}
    return Section(text, {"differences": figures.differences(contrasts, names)})


def _few_seeds(contrasts: Iterable[Contrast]) -> str:
    seeds = min(len(values) for contrast in contrasts for values in contrast.differences.values())
    if seeds < 2:
        return ""
    return (
        f"With {number(seeds, 'seed')} a task's interval reaches {quantile(seeds - 1):.1f} standard errors to either "
        "side, so that only large differences are clear. "
    )


def _cost(results: Results) -> Section | None:
    alone: dict[str, dict[str, float]] = {}
    for record in results.of_kind("speed"):
        alone.setdefault(record["task"], {})[record["method"]] = record["ratio"]
    source = "measured in turns in one process with nothing else running, the least of several rounds"
    ratios = alone
    if not ratios:
        source = "the median of the runs' own steps, several runs at once, one thread each: rough"
        ratios = {task: _rough_ratios(results, task) for task in results.main_tasks()}
    ratios = {task: found for task, found in ratios.items() if found}
    if not ratios:
        return None
    methods = [name for name in METHODS if any(name in found for found in ratios.values())]
    rows = [[TITLES[m], *(f"{found[m]:.2f}" if m in found else _NONE for found in ratios.values())] for m in methods]
    points = {}
    for task, found in ratios.items():
        with_outcome = {m: (found[m], o) for m, o in _present(results, task, methods).items() if m in found}
        if with_outcome:
            points[task] = with_outcome
    text = f"""## What a step costs

The time of a training step as a ratio to that of training the classifier alone, {source}.

{table(["", *ratios], rows)}"""
    if not points:
        return Section(text)
    text += f"\n\n{shown('cost', 'Test accuracy over the time of a step')}"
    return Section(text, {"cost": figures.over_cost(points, TITLES)})


def _rough_ratios(results: Results, task: str) -> dict[str, float]:
    seconds = {
        method: sorted(run["seconds_per_step"] for run in outcome.finals)[len(outcome.finals) // 2]
        for method, outcome in _present(results, task, METHODS).items()
    }
    return {method: time / seconds["head"] for method, time in seconds.items()} if "head" in seconds else {}


# The further parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the study after its core: nothing is written of one that has no complete comparison."""

    name: str
    title: str
    about: str
    make: Callable[[Results, Part], Section]

    def section(self, results: Results) -> Section | None:
        if results.main != "core" or not any(outcome.finals for outcome in results.part(self.name)):
            return None
        return self.make(results, self)

    @property
    def heading(self) -> str:
        return f"## {self.title}\n\n{self.about}".rstrip()


def _networks(results: Results, part: Part) -> Section:
    outcomes = {task: _present(results, task, MAIN_METHODS) for task in results.main_tasks(part.name)}
    text = f"""{part.heading}

{_accuracies(outcomes, MAIN_METHODS)}

{shown("networks", "Test accuracy on the further networks")}

{_parameters(outcomes, MAIN_METHODS)}

{_rates(outcomes, MAIN_METHODS)}
{_notes(results, outcomes)}"""
    return Section(text, {"networks": figures.ranking(outcomes, TITLES)})


def _methods(results: Results, part: Part) -> Section:
    tasks = results.main_tasks(part.name)
    outcomes = {task: _present(results, task, METHODS) for task in tasks}
    methods = [name for name in METHODS if any(name in found for found in outcomes.values())]
    rows = []
    for method in methods:
        found = results.between(method, "flora", tasks) if method != "flora" else None
        rows.append([TITLES[method], *_cells(outcomes, method), estimated(found.here) if found is not None else _NONE])
    text = f"""{part.heading}

{table(["", *tasks, "less FLoRA, points"], rows)}

{shown("methods", "Test accuracy of every method")}

Trainable parameters in the deltas; what has no size to choose has as many as it has:

{_parameters(outcomes, methods)}

{_rates(outcomes, methods)}
{_notes(results, outcomes)}"""
    return Section(text, {"methods": figures.ranking(outcomes, TITLES)})


def _peft(results: Results, part: Part) -> Section:
    tasks = results.main_tasks("methods")
    theirs = {task: results.standard(task, "peft-lora") for task in tasks}
    found = results.between("lora", "peft-lora", tasks)
    if found is None:
        return Section(f"{part.heading}\n\nIts runs are not complete.")
    rows = [
        [task, estimated(found.on(task)), f"{outcome.parameters:,}", f"`{outcome.finals[0]['config']}`"]
        for task, outcome in theirs.items()
        if outcome is not None and task in found.differences
    ]
    text = f"""{part.heading}

{verdict("flora's LoRA", TITLES["peft-lora"], found.here)}, over {listed(found.differences)}.

{table(["", "flora's less PEFT's, points", "PEFT's parameters", "PEFT's configuration"], rows)}"""
    return Section(text)


def _budgets(results: Results, part: Part) -> Section:
    tasks = results.main_tasks(part.name)
    methods = list(dict.fromkeys(o.comparison.method for o in results.part(part.name)))
    shares = sorted({SHARE, *(o.comparison.share for o in results.part(part.name) if o.comparison.share is not None)})
    rows = []
    for method in methods:
        for share in shares:
            found = {task: results.at(task, method, share) for task in tasks}
            rows.append(
                [
                    f"{TITLES[method]}, {100 * share:g} %",
                    *(_cell(found[task]) for task in tasks),
                    "; ".join(o.sizes if o is not None and o.sizes else _NONE for o in found.values()),
                ]
            )
    beside = []
    for share in shares:
        for other in (name for name in methods if name != "flora"):
            where = [task for task in tasks if other == "lora" or not results.same("lora", other, task)]
            pairs = {task: (results.at(task, "flora", share), results.at(task, other, share)) for task in where}
            contrast = results.contrast(pairs)
            if contrast is not None:
                cells = [estimated(contrast.on(task)) if task in contrast.differences else _NONE for task in tasks]
                beside.append([f"FLoRA − {TITLES[other]}, {100 * share:g} %", *cells, estimated(contrast.here)])
    text = f"""{part.heading}

{table(["", *tasks, f"rank ({'; '.join(tasks)})"], rows)}

{shown("budgets", "Test accuracy over the trainable parameters of the deltas, on the tasks of this part")}

Paired differences in points, with {100 * LEVEL:g} % intervals:

{table(["", *tasks, "these tasks"], beside)}"""
    lines: dict[str, dict[str, list[Outcome]]] = {}
    for task in tasks:
        known = _present(results, task, MAIN_METHODS)
        lines[task] = {method: [outcome, *_other_budgets(results, task, method)] for method, outcome in known.items()}
    return Section(text, {"budgets": figures.over_parameters(lines, TITLES)})


def _variants(results: Results, part: Part) -> Section:
    """Settings of a method beside the one that it has otherwise, or beside the part's own plain one."""
    tasks = results.main_tasks(part.name)
    kinds: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for outcome in results.part(part.name):
        known = kinds.setdefault((outcome.comparison.method, outcome.comparison.share), [])
        if outcome.comparison.options and outcome.comparison.options not in known:
            known.append(outcome.comparison.options)
    rows = []
    for (method, share), every in kinds.items():
        plain = {task: results.baseline(part.name, task, method, share) for task in tasks}
        name = TITLES[method] + (
            f", {100 * share:g} %" if len({s for m, s in kinds if m == method}) > 1 and share else ""
        )
        rows.append([f"{name}: {PLAIN[part.name]}", *(_cell(plain[task]) for task in tasks), _NONE])
        for options in every:
            found = {task: results.find(part.name, task, method, share, options) for task in tasks}
            contrast = results.contrast({task: (found[task], plain[task]) for task in tasks})
            if any(outcome is not None for outcome in found.values()):
                cells = (_cell(found[task]) for task in tasks)
                rows.append([f"{name}: {setting(options)}", *cells, estimated(contrast.here) if contrast else _NONE])
    text = f"""{part.heading}

{table(["", *tasks, "beside the first, points"], rows)}"""
    lines = _numeric(results, part, tasks)
    if not lines:
        return Section(text)
    text += f"\n\n{shown(part.name, part.title)}"
    return Section(text, {part.name: figures.over_values(lines, TITLES, _AXES[part.name])})


def _numeric(results: Results, part: Part, tasks: Sequence[str]) -> dict[str, dict[str, dict[float, Outcome]]]:
    """Where the part varies one number: the outcomes by its value by method by task."""
    key = part.name.replace("-", "_")
    found: dict[str, dict[str, dict[float, Outcome]]] = {}
    if part.name not in _AXES:
        return found
    for outcome in results.part(part.name):
        c = outcome.comparison
        if outcome.finals:
            line = found.setdefault(c.task, {}).setdefault(c.method, {})
            line[float(c.options[key])] = outcome
            plain = results.baseline(part.name, c.task, c.method, c.share)
            if plain is not None:
                line[1.0] = plain
    return found


PLAIN = {
    "scale": "scale 1",
    "start": "as the authors draw it",
    "core-lr": "one rate for all",
    "alpha": "ΔW times 1",
    "batch-norm": "statistics held",
}

_AXES = {"scale": "scale s", "core-lr": "learning rate of the core / that of the factors"}

PARTS = (
    Part(
        "networks",
        "More networks: attention, full convolutions",
        "Small networks that the study pretrains itself, with the same methods and the same budget.",
        _networks,
    ),
    Part("budgets", "More and fewer parameters", "The share of the adapted weights that a delta may have.", _budgets),
    Part(
        "methods",
        "Other methods",
        "At the same budget where a method has a size to choose. The last column is the mean difference to FLoRA over "
        f"these tasks, paired by seed, with its {100 * LEVEL:g} % interval.",
        _methods,
    ),
    Part(
        "methods",
        "PEFT's LoRA beside flora's",
        "A check on the baseline. PEFT's has the layers that PEFT accepts, and the largest rank that stays within the "
        "budget there, so that the two are not the same function on every network.",
        _peft,
    ),
    Part(
        "scale",
        "What a wrong scale costs",
        "ΔW is multiplied by s. The learning rate is the one that was chosen for s = 1, as of one who takes over a "
        "scale from elsewhere and searches no further.",
        _variants,
    ),
    Part(
        "start",
        "How the factors start",
        "The core starts at 0 everywhere. The scale of each start is set such that the first step moves ΔW as far as "
        "it does from the authors' factors, so that what is compared is the directions and not the step; each has a "
        "learning rate of its own.",
        _variants,
    ),
    Part(
        "core-lr",
        "A learning rate for the core",
        "Cores at a multiple of the rate that was chosen for one rate; the factors keep that one.",
        _variants,
    ),
    Part(
        "alpha",
        "alpha / r against alpha / √r",
        "A learning rate that was found at the middle budget, taken to others as it is: which rule for the scale keeps "
        "it right? All rules are the same at the middle budget.",
        _variants,
    ),
    Part(
        "batch-norm",
        "Deltas before BatchNorm",
        "flora holds BatchNorm's statistics, as they belong to the base. Here they also move with the batches.",
        _variants,
    ),
)

PART_TITLES = {part.name: part.title for part in reversed(PARTS)} | {
    "core": "The core",
    "quick": "A quick version of the core",
}


# What all parts write ------------------------------------------------------------------------------------------------


def _present(results: Results, task: str, methods: Iterable[str]) -> dict[str, Outcome]:
    found = {method: results.standard(task, method) for method in methods}
    return {method: outcome for method, outcome in found.items() if outcome is not None}


def _other_budgets(results: Results, task: str, method: str) -> list[Outcome]:
    found = (o for o in results.part("budgets") if (o.comparison.task, o.comparison.method) == (task, method))
    return [outcome for outcome in found if outcome.finals]


def _accuracies(outcomes: Mapping[str, Mapping[str, Outcome]], methods: Iterable[str]) -> str:
    return table(["", *outcomes], [[TITLES[method], *_cells(outcomes, method)] for method in methods])


def _cells(outcomes: Mapping[str, Mapping[str, Outcome]], method: str) -> list[str]:
    return [_cell(found.get(method)) for found in outcomes.values()]


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return _NONE
    mean, width = figures.mean_and_spread(outcome)
    missing = len(outcome.comparison.seeds) - len(outcome.finals)
    marks = ("†" if outcome.diverged else "") + (f" ({len(outcome.finals)} seeds)" if missing else "")
    return f"{mean:.1f}" + (f" ± {width:.1f}" if spread([*outcome.accuracies.values()]) is not None else "") + marks


def _parameters(outcomes: Mapping[str, Mapping[str, Outcome]], methods: Iterable[str]) -> str:
    rows = []
    for method in methods:
        cells = []
        for found in outcomes.values():
            outcome = found.get(method)
            if outcome is None:
                cells.append(_NONE)
                continue
            share = 100 * (outcome.parameters or 0) / outcome.finals[0]["adapted_weights"]
            size = f"; rank {outcome.sizes}" if outcome.sizes else ""
            cells.append(f"{outcome.parameters:,} ({share:.3g} %{size})")
        rows.append([TITLES[method], *cells])
    return table(["", *outcomes], rows)


def _budget_note(outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    used = {
        (TITLES[method], task): outcome.finals[0]["parameters"] / outcome.finals[0]["budget"]
        for task, found in outcomes.items()
        for method, outcome in found.items()
        if outcome.finals[0].get("budget")
    }
    if not used:
        return ""
    (method, task), least = min(used.items(), key=lambda item: item[1])
    most = max(used.values())
    ends = [f"{100 * least:.1f} % ({method} on {task})", f"{100 * most:.1f} %"]
    used_up = " to ".join(ends) if f"{100 * least:.1f}" != f"{100 * most:.1f}" else ends[1]
    return (
        f"A budget is an upper limit, of which these deltas use {used_up}. Full fine-tuning also learns what no delta "
        "adapts, as biases and normalisation."
    )


def _rates(outcomes: Mapping[str, Mapping[str, Outcome]], methods: Iterable[str]) -> str:
    arrows = {"lowest": " ↓", "highest": " ↑", None: ""}
    rows = []
    for method in methods:
        found = [outcomes[task].get(method) for task in outcomes]
        rows.append([TITLES[method], *(_NONE if o is None else f"{o.lr:g}{arrows[o.edge]}" for o in found)])
    return table(["learning rate", *outcomes], rows)


def _losses(outcomes: Mapping[str, Mapping[str, Outcome]], methods: Iterable[str]) -> str:
    rows = []
    for method in methods:
        losses = [found[method].train_loss if method in found else None for found in outcomes.values()]
        rows.append([TITLES[method], *(_NONE if loss is None else f"{loss:.3g}" for loss in losses)])
    return table(["training loss", *outcomes], rows)


def _notes(results: Results, outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    notes = []
    same = [task for task in outcomes if results.same("lora", "locon", task)]
    if same:
        notes.append(f"On {listed(same)} LoCon is LoRA: it differs on convolutions alone.")
    fallen = [
        f"{TITLES[method]} on {task} ({outcome.diverged} of {len(outcome.finals)})"
        for task, found in outcomes.items()
        for method, outcome in found.items()
        if outcome.diverged
    ]
    if fallen:
        notes.append(f"† ended at a loss that was not finite and counts as 0 %: {listed(fallen)}.")
    return "\n" + "\n\n".join(notes) if notes else ""


# How and where it was done -------------------------------------------------------------------------------------------


def _method(results: Results) -> Section:
    rows = []
    for task, steps in results.tasks.items():
        known = KNOWN[task]
        sizes = next((r["batch_size"] for r in results.of_kind("run") if r["task"] == task), known.batch_size)
        rows.append([task, known.title, f"{known.train:,}", f"{known.validation:,}", str(steps), str(sizes)])
    outcomes = [o for o in results.part(results.main) if o.finals]
    rates = listed(f"{lr:g}" for lr in outcomes[0].comparison.lrs)
    seeds = listed(str(run["seed"]) for run in max(outcomes, key=lambda o: len(o.finals)).finals)
    text = f"""## How it was done

{table(["task", "what it is", "training examples", "validation examples", "steps", "batch"], rows)}

- Every method has the same examples in the same order, the same classifier at the start, AdamW without weight decay
  and a learning rate that rises for a tenth of the steps and falls to 0 along a cosine. BatchNorm's statistics are
  held.
- A seed draws the examples to train and validate on, their order, the classifier and the delta. The test examples are
  the same for all.
- Learning rates of the core: {rates}, each run once with seed {SEARCH_SEED}; the best on the validation examples, of
  equals the smallest, is run with seeds {seeds}, and only these runs look at the test examples. The choice is noisy
  itself: {_noise(outcomes)}. Later parts search less: their tables of rates mark the ends of their own grids.
- The number of parameters is set by `flora.budget`: the largest rank that stays within it on all layers, and the next
  one on as many as then fit."""
    return Section(text)


def _noise(outcomes: Sequence[Outcome]) -> str:
    """How well an accuracy on the validation examples is known."""
    best = [max(run["validation"] for run in o.searched.values()) for o in outcomes]
    mean = sum(best) / len(best)
    fewest = min(KNOWN[o.comparison.task].validation for o in outcomes)
    error = 100 * math.sqrt(mean * (1 - mean) / fewest)
    return (
        f"{100 * mean:.0f} % of {fewest} examples, the mean of the chosen, has a standard error of {error:.1f} points"
    )


def _machine(results: Results) -> Section:
    runs = results.of_kind("run")
    lines = []
    for record in results.of_kind("environment"):
        count = sum(run.get("environment") == record["id"] for run in runs)
        if not count:
            continue
        about = record["machine"]
        memory = f", {about['memory'] / 2**30:.0f} GiB" if about.get("memory") else ""
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
        commit = f", commit {record['commit'][:10]}" if record.get("commit") else ""
        kernels = about.get("core") or {}
        kernels = f", kernels {kernels['isa']}" if isinstance(kernels, Mapping) and "isa" in kernels else ""
        lines.append(
            f"- {record['time'][:10]}: {count} runs, {record['jobs']} at once, {record['threads']} thread each, on "
            f"{about['cpu']} ({about.get('cpus')} CPUs{memory}, {about.get('system')}{kernels}){commit}; {versions}."
        )
    hours = sum(run["seconds"] for run in runs) / 3600
    main = {run["id"]: run for o in results.part(results.main) for run in (*o.searched.values(), *o.finals)}
    minutes = sum(run["seconds"] for run in main.values()) / 60
    said = f"{len(runs)} runs took {hours:.1f} hours of one thread; the {len(main)} of the core, {minutes:.0f} minutes."
    text = f"""## Seeds, versions, machine

{said} Search has seed {SEARCH_SEED}; the others are in the lines.

{chr(10).join(lines)}"""
    return Section(text)
