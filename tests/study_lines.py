"""Lines of a study that never ran: invented accuracies, in the form and the order of real ones."""

import random

from flora.study.methods import METHODS
from flora.study.plan import PARTS, comparisons
from flora.study.records import digest

WEIGHTS = 1_000_000  # that all methods adapt
STEPS = {"digits": 96, "animals": 96, "resnet-digits": 96, "vit-digits": 96, "trec": 96, "polarity": 96}

BASE = {"head": 80.0, "full": 93.0, "lora": 90.0, "locon": 90.5, "flora": 91.0}

ENVIRONMENT = {
    "kind": "environment",
    "id": "here",
    "versions": {"python": "3.11.2", "flora": "0.1.0", "torch": "2.13.0", "datasets": None},
    "machine": {"cpu": "A CPU", "cpus": 2, "system": "Linux x86_64", "core": {"isa": "v4"}, "memory": 8 * 2**30},
    "commit": "0123456789abcdef",
    "jobs": 2,
    "threads": 1,
    "time": "2026-01-02T03:04:05+00:00",
}


def accuracy(run, gains):
    """Per cent: what the method has, what ``gains`` add to it, and an amount that task and seed share."""
    shared = random.Random(f"{run.task} {run.seed}").uniform(-1, 1)
    own = random.Random(f"{run.id}").uniform(-0.2, 0.2)
    best = 1e-2 if run.method != "full" else 3e-4
    return BASE.get(run.method, 88.0) + shared + own + gains(run) - (0.0 if run.lr == best else 4.0)


def line(run, gains, diverged):
    without = METHODS[run.method].kind == "head"
    whole = METHODS[run.method].kind == "full"
    budget = None if run.share is None else round(run.share * WEIGHTS)
    fallen = diverged(run)
    result = 0.0 if fallen else accuracy(run, gains) / 100
    return {
        "kind": "run",
        "id": run.id,
        "environment": "here",
        "task": run.task,
        "method": run.method,
        "share": run.share,
        "seed": run.seed,
        "lr": run.lr,
        "steps": run.steps,
        "stage": run.stage,
        "options": run.options,
        "batch_size": 32,
        "budget": budget,
        "parameters": 0 if without else WEIGHTS if whole else round(0.99 * (budget or 0)),
        "head_parameters": 1290,
        "adapted_weights": WEIGHTS,
        "config": "" if without or whole else "TuckerConfig(rank_pattern={'^0$': 8, '^2$': 8}, rank=7, kernel_rank=2)",
        "diverged": fallen,
        "train_loss": None if fallen else 0.1,
        "validation": result,
        "test": result if run.stage == "final" else None,
        "seconds": 36.0,
        "seconds_per_step": {"head": 0.1, "full": 0.3}.get(run.method, 0.2),
    }


def study(parts=PARTS, steps=STEPS, gains=lambda run: 0.0, diverged=lambda run: False, seeds=None):
    """All lines of these parts. ``gains`` adds points to a run, ``diverged`` ends it, ``seeds`` leaves others out."""
    done = {}
    for comparison in comparisons(parts, steps):
        for run in comparison.search():
            done.setdefault(run.id, line(run, gains, diverged))
        for run in comparison.final(done) or ():
            if seeds is None or run.seed in seeds:
                done.setdefault(run.id, line(run, gains, diverged))
    return [ENVIRONMENT, *done.values()]


def speeds(task="digits"):
    """Lines of what a step costs alone on the machine."""
    ratios = {"head": 1.0, "full": 3.0, "lora": 2.0, "locon": 2.1, "flora": 1.9}
    return [
        {
            "kind": "speed",
            "id": digest(task=task, method=m),
            "environment": "here",
            "task": task,
            "method": m,
            "ratio": r,
        }
        for m, r in ratios.items()
    ]
