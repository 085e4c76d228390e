"""The store's runs as the comparisons that they were made for: what was chosen, what came out, what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from flora.study.data import Corpus
from flora.study.plan import MAIN_METHODS, PARTS, SHARE, TEXTS, Comparison, Run, comparisons
from flora.study.records import Record
from flora.study.statistics import Estimate, interval, over_groups
from flora.study.tasks import Task, tasks


@dataclass(frozen=True)
class Outcome:
    """What there is of a comparison: its search's lines by learning rate, its final ones in the order of the seeds."""

    comparison: Comparison
    searched: Mapping[float, Record]
    finals: tuple[Record, ...]

    @property
    def accuracies(self) -> dict[int, float]:
        """On the test split, in %, by seed."""
        return {run["seed"]: 100 * run["test"] for run in self.finals}

    @property
    def lr(self) -> float | None:
        """The learning rate of the final runs."""
        return self.finals[0]["lr"] if self.finals else None

    @property
    def edge(self) -> str | None:
        """ "lowest" or "highest" if the learning rate that was searched for lies at the grid's end."""
        if self.comparison.like is not None or self.lr is None:
            return None
        return {min(self.comparison.lrs): "lowest", max(self.comparison.lrs): "highest"}.get(self.lr)

    @property
    def diverged(self) -> int:
        """How many final runs ended at a loss that was not finite; they count with an accuracy of 0."""
        return sum(bool(run.get("diverged")) for run in self.finals)

    @property
    def train_loss(self) -> float | None:
        """The mean of the final runs' losses of their last steps; None if one is missing."""
        losses = [float(run["train_loss"]) for run in self.finals if run["train_loss"] is not None]
        return sum(losses) / len(losses) if losses and len(losses) == len(self.finals) else None

    @property
    def parameters(self) -> int | None:
        """That learn in the deltas."""
        return self.finals[0]["parameters"] if self.finals else None

    @property
    def sizes(self) -> str:
        """The ranks that the budget allowed, as far as the configuration has any: "4 to 5, kernel 2"."""
        config = self.finals[0].get("config", "") if self.finals else ""
        kernel, pattern = re.search(r"\bkernel_rank=(\d+)", config), re.search(r"\brank_pattern={(.*?)}", config)
        ranks = re.findall(r"\brank=(\d+)", config) + re.findall(r": (\d+)", pattern[1] if pattern else "")
        ends = [min(map(int, ranks)), max(map(int, ranks))] if ranks else []
        return " to ".join(map(str, dict.fromkeys(ends))) + (f", kernel {kernel[1]}" if kernel else "")


@dataclass(frozen=True)
class Contrast:
    """Differences of accuracy in points between two methods, paired by seed, for each task in turn."""

    differences: Mapping[str, Sequence[float]]

    @property
    def identical(self) -> bool:
        """Whether every run of the one scored as its twin did: the two do the same, or one of them not what it says."""
        return not any(any(values) for values in self.differences.values())

    def on(self, task: str) -> Estimate:
        """On one task, over its seeds."""
        return interval(self.differences[task])

    @property
    def here(self) -> Estimate:
        """The mean over these very tasks: only seeds are drawn anew."""
        return over_groups(list(self.differences.values()))

    @property
    def beyond(self) -> Estimate:
        """The mean over tasks of which these are a sample."""
        return interval([interval(values).mean for values in self.differences.values()])


class Results:
    """All lines of a study, by part.

    Attributes
    ----------
    tasks
        those that there are runs of, in the study's order, with their numbers of steps: the most that a run had.
    main
        the part that carries the report: "core", or "quick" if there is nothing else.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        names = [field.name for field in fields(Run) if field.name != "keep_updates"]
        runs = self.of_kind("run")
        self._done = {Run(**{name: run[name] for name in names}).id: run for run in runs}
        steps = {run["task"]: 0 for run in runs}
        for run in runs:
            steps[run["task"]] = max(steps[run["task"]], run["steps"])
        self.tasks = {name: steps[name] for name in KNOWN if name in steps}
        images = {name: task.steps for name, task in KNOWN.items() if name not in _OF_TEXT}
        self._planned = {name: (images | self.tasks)[name] for name in KNOWN if name in images | self.tasks}
        self.main = "core" if any(outcome.finals for outcome in self.part("core")) else "quick"

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    @cached_property
    def _parts(self) -> dict[str, list[Outcome]]:
        return {}

    def part(self, name: str) -> list[Outcome]:
        """The comparisons of a part, whether or not their runs are there; those on text, which run last, included."""
        if name not in self._parts:
            found = [*comparisons([name], self._planned)]
            found += [c for c in comparisons(["texts"], self._planned) if _section_of(c) == name]
            self._parts[name] = [self._outcome(comparison) for comparison in found]
        return self._parts[name]

    def _outcome(self, comparison: Comparison) -> Outcome:
        searched = {run.lr: self._done[run.id] for run in comparison.search() if run.id in self._done}
        planned = comparison.final(self._done) or []
        return Outcome(comparison, searched, tuple(self._done[run.id] for run in planned if run.id in self._done))

    def find(
        self, part: str, task: str, method: str, share: float | None = None, options: Mapping[str, Any] | None = None
    ) -> Outcome | None:
        """The finished or half finished comparison of these; None if nothing final is there."""
        for outcome in self.part(part):
            c = outcome.comparison
            if (c.task, c.method, c.options) == (task, method, options or {}) and share in (None, c.share):
                return outcome if outcome.finals else None
        return None

    def main_tasks(self, part: str | None = None) -> list[str]:
        """The tasks of a part, by default the main one, that have any final run."""
        found = {outcome.comparison.task for outcome in self.part(part or self.main) if outcome.finals}
        return [name for name in self.tasks if name in found]

    def standard(self, task: str, method: str) -> Outcome | None:
        """A method as it comes, at the middle budget."""
        parts = (self.main, "networks", "methods") if self.main == "core" else (self.main,)
        found = (self.find(part, task, method) for part in parts)
        return next((outcome for outcome in found if outcome is not None), None)

    def at(self, task: str, method: str, share: float) -> Outcome | None:
        """A method at some budget, with a learning rate that was searched for there."""
        return self.standard(task, method) if share == SHARE else self.find("budgets", task, method, share)

    def baseline(self, part: str, task: str, method: str, share: float | None) -> Outcome | None:
        """What a part's settings are compared with: the part's own plain one, or the method as it comes."""
        own = self.find(part, task, method, share)
        return own if own is not None else self.standard(task, method) if share == SHARE else None

    def contrast(self, pairs: Mapping[str, tuple[Outcome | None, Outcome | None]]) -> Contrast | None:
        """First minus second, by task; None if no task has a seed of both."""
        differences = {}
        for task, (first, second) in pairs.items():
            if first is None or second is None:
                continue
            ours, theirs = first.accuracies, second.accuracies
            common = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            if common:
                differences[task] = common
        return Contrast(differences) if differences else None

    def between(self, first: str, second: str, tasks: Iterable[str]) -> Contrast | None:
        """Two methods as they come."""
        return self.contrast({task: (self.standard(task, first), self.standard(task, second)) for task in tasks})

    def same(self, first: str, second: str, task: str) -> bool:
        """Whether two methods did the same on a task to the last digit, as LoRA and LoCon do without convolutions."""
        ours, theirs = self.standard(task, first), self.standard(task, second)
        return (
            ours is not None
            and theirs is not None
            and (ours.accuracies, ours.parameters, ours.lr) == (theirs.accuracies, theirs.parameters, theirs.lr)
        )

    def progress(self) -> list[tuple[str, int, int]]:
        """Of every part that has any: its comparisons that have all their seeds, and all that it has."""
        names = [part for part in PARTS if part != "texts"] if self.main == "core" else [self.main]
        found = []
        for name in names:
            outcomes = self.part(name)
            whole = sum(len(outcome.finals) == len(outcome.comparison.seeds) for outcome in outcomes)
            found.append((name, whole, len(outcomes)))
        return found


def _section_of(comparison: Comparison) -> str:
    """The part that a comparison on text belongs to by what it is of."""
    if comparison.share not in (None, SHARE):
        return "budgets"
    return "networks" if comparison.method in MAIN_METHODS else "methods"


def _known() -> dict[str, Task]:
    nothing = Corpus(([], []), None, ())
    return tasks(dict.fromkeys(TEXTS, nothing))


KNOWN = _known()
"""All tasks of the study, whether or not their data are there, by name."""

_OF_TEXT = (*TEXTS, "llama-trec")  # which a study may be without
