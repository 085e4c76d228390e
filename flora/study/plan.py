"""Which runs the study has: its parts, and the two stages of each comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flora.study.records import Record, digest

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MIDDLE_RATES = LEARNING_RATES[2:6]  # where the best one of LoRA, LoCon and FLoRA lies, whatever their settings
SEARCH_SEED = 0
SEEDS = (1, 2, 3)
SHARE = 0.04  # of the adapted weights' entries, as trainable parameters
SHARES = (0.02, SHARE, 0.08)
TEXTS = ("trec", "text", "polarity")

MAIN_METHODS = ("head", "full", "lora", "locon", "flora")
OTHER_METHODS = (
    *("flora-fixed", "circulant", "toeplitz", "ldr", "kronecker", "rescale"),
    *("peft-lora", "peft-loha", "peft-lokr"),
)
BUDGETED = ("lora", "locon", "flora")
UNSHARED = ("head", "full")  # no number of parameters is asked of them


@dataclass(frozen=True)
class Run:
    """One network that learns. Stage "search" looks at the validation split only, "final" at the test split, too."""

    task: str
    method: str
    share: float | None
    seed: int
    lr: float
    steps: int
    stage: str
    options: dict[str, Any] = field(default_factory=dict)
    keep_updates: bool = field(default=False, compare=False)

    @property
    def id(self) -> str:
        """The same for the same run in any part of the study."""
        return digest(**{name: value for name, value in asdict(self).items() if name != "keep_updates"})


@dataclass(frozen=True)
class Comparison:
    """A method on a task: its learning rate is searched on one seed, and it is run at the best on the others.

    Args:
        like: a comparison's method; its learning rate is taken instead of a search.
    """

    part: str
    task: str
    method: str
    share: float | None
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    lrs: tuple[float, ...] = LEARNING_RATES
    seeds: tuple[int, ...] = SEEDS
    like: Comparison | None = None
    keep_updates: bool = False

    def search(self) -> list[Run]:
        """The runs that the learning rate is chosen from."""
        if self.like is not None:
            return self.like.search()
        return [self._run(SEARCH_SEED, lr, "search") for lr in self.lrs]

    def final(self, done: dict[str, Record]) -> list[Run] | None:
        """The runs that are reported; None as long as the search is not through."""
        runs = self.search()
        if not all(run.id in done for run in runs):
            return None
        best = max(runs, key=lambda run: (done[run.id]["validation"], -run.lr))
        return [self._run(seed, best.lr, "final") for seed in self.seeds]

    def _run(self, seed: int, lr: float, stage: str) -> Run:
        seeds = self.seeds[:2] if self.method == "full" else self.seeds[:1]  # two of those that others are compared to
        keep = self.keep_updates and stage == "final" and seed in seeds
        return Run(self.task, self.method, self.share, seed, lr, self.steps, stage, self.options, keep)


def comparisons(parts: Sequence[str], tasks: dict[str, int]) -> Iterator[Comparison]:
    """All comparisons of the parts, on the tasks that there are, by name, with their numbers of steps."""
    text = next((name for name in TEXTS if name in tasks), None)
    main = [name for name in ("digits", "animals", text) if name is not None]

    def one(part: str, task: str, method: str, share: float = SHARE, **more: Any) -> Comparison:
        return Comparison(part, task, method, None if method in UNSHARED else share, tasks[task], **more)

    def like(part: str, task: str, method: str, options: dict[str, Any], share: float = SHARE) -> Comparison:
        standard = one("core", task, method)
        return one(part, task, method, share, options=options, like=standard)

    def budgets(part: str, task: str) -> Iterator[Comparison]:
        for share in SHARES:
            for method in BUDGETED if share != SHARE else ():
                yield one(part, task, method, share, lrs=MIDDLE_RATES)

    if "quick" in parts:
        for method in MAIN_METHODS:
            share = None if method in UNSHARED else SHARE
            yield Comparison("quick", "digits", method, share, 60, lrs=(1e-3, 3e-3), seeds=(1,), keep_updates=True)
    if "core" in parts:
        for task in main:
            for method in MAIN_METHODS:
                yield one("core", task, method, keep_updates=True)
    if "networks" in parts:
        for task in ("resnet-digits", "vit-digits", "llama-trec"):
            for method in MAIN_METHODS if task in tasks else ():
                yield one("networks", task, method, keep_updates=True)
    narrow = [name for name in ("resnet-digits", "animals") if name in tasks]
    if "scale" in parts:  # at the learning rate that was best for scale 1
        for task in narrow:
            for method in ("flora", "lora"):
                for scale in (0.25, 4.0, 16.0):
                    yield like("scale", task, method, {"scale": scale})
    if "start" in parts:
        for task in narrow:
            for options in STARTS:
                yield one("start", task, "flora", options=options, lrs=MIDDLE_RATES)
    if "core-lr" in parts:
        for task in narrow:
            for times in (0.25, 4.0, 16.0):
                yield like("core-lr", task, "flora", {"core_lr": times})
    if "batch-norm" in parts:
        for task in narrow:
            for method in ("flora", "lora"):
                yield like("batch-norm", task, method, {"batch_norm": "moving"})
    if "methods" in parts:
        for task in narrow:
            for method in OTHER_METHODS:
                yield one("methods", task, method, keep_updates=True)
    if "budgets" in parts:
        for task in narrow:
            yield from budgets("budgets", task)
    if "alpha" in parts:  # a learning rate found at one rank, taken to others
        for task in narrow:
            for share in SHARES:
                for options in ALPHAS if share != SHARE else ():
                    yield like("alpha", task, "lora", options, share)
    if "texts" in parts and text is not None:
        yield from budgets("texts", text)
        for method in OTHER_METHODS:
            yield one("texts", text, method, keep_updates=True)
        for method in MAIN_METHODS if "polarity" in tasks and text != "polarity" else ():
            yield one("texts", "polarity", method, keep_updates=True)


PARTS = ("core", "networks", "scale", "start", "core-lr", "batch-norm", "methods", "budgets", "alpha", "texts")
"""In the order in which they run; each is of use without those after it."""

STARTS: tuple[dict[str, Any], ...] = (
    {"init": "orthogonal", "gain": "matched"},
    {"init": "hosvd", "gain": "matched"},
    {"draw": "unit", "gain": "matched"},
)

ALPHAS: tuple[dict[str, Any], ...] = ({}, {"alpha_rule": "rank"}, {"alpha_rule": "sqrt"})
"""ΔW times 1, alpha / r and alpha / √r, all 1 at the middle budget."""
