"""``python -m benchmarks.plans``: the cost model behind ``plan="auto"`` against measurement, on a grid of layers.

Every plan that a layer may take is timed on each, in turns; a pick counts as good if it is the fastest or within
`WITHIN` of it. ``--fit`` also suggests constants for `flora.plan`, ``--read FILE`` takes earlier runs instead of
measuring. Exits with 0 if `GOAL` of the picks that can be judged are good and they are `JUDGED` at least, or, of a
part of the grid (``--only``), by the share alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS
from flora import functional, plan
from flora.bench import machine
from flora.bench.case import Case, conv, linear
from flora.bench.peers import build, peers
from flora.bench.timing import FEWEST, TOLERANCE, interleaved
from flora.kinds import kind_of
from flora.plan import PLANS
from flora.tables import aligned

WITHIN = 1.10
GOAL = 0.95
JUDGED = 100


@dataclass(frozen=True)
class Entry:
    """A layer of the grid, with or without gradients, and what was measured on it.

    ``call`` holds the arguments of `flora.plan.plan_costs`. ``becomes`` says which plan runs when one is picked: below
    float32 hybrid is fused. ``seconds`` are by plan that runs, ``error`` is the largest of the
    relative errors of those within reach of the best.
    """

    name: str
    grad: bool
    call: tuple[Any, ...]
    becomes: Mapping[str, str]
    picked: str
    predicted: Mapping[str, float]
    seconds: Mapping[str, float]
    error: float

    @property
    def possible(self) -> tuple[str, ...]:
        """The plans that "auto" chooses from."""
        return tuple(name for name in PLANS if self.becomes[name] == name)

    @property
    def loss(self) -> float:
        """The picked plan's time over the fastest one's."""
        return self.loss_of(self.picked)

    def loss_of(self, choice: str) -> float:
        return self.seconds[self.becomes[choice]] / min(self.seconds.values())

    @property
    def good(self) -> bool:
        return self.loss <= WITHIN

    @property
    def noisy(self) -> bool:
        """Whether the errors are too large to tell whether the pick is good."""
        return abs(self.loss / WITHIN - 1) < self.error and self.error > TOLERANCE


def grid() -> list[tuple[Case, bool]]:
    """At least 100 pairs of a layer and whether it is trained: usual layers of networks, on small and large batches."""
    ranks = cycle((16, 4, 32, 8, 64))
    layers = [
        *(linear(d_in, d_out, n, rank=next(ranks)) for d_in, d_out in _WIDTHS for n in (4, 128, 1024)),
        linear(2048, 2048, 256),
        linear(64, 64, 8192),
        *(conv(c, c, (3, 3), b, (e, e), rank=next(ranks)) for c, e in _STAGES for b in (1, 8)),
        *(conv(c, c, (3, 3), 4, (e, e), channels_last=True, rank=next(ranks)) for c, e in _STAGES),
        conv(3, 64, (7, 7), 4, (112, 112), stride=2, rank=8),
        conv(256, 64, (1, 1), 4, (28, 28)),
        conv(256, 64, (1, 1), 4, (28, 28), channels_last=True),
        *(conv(96, 192, (2, 2), 4, (28, 28), stride=2, channels_last=last) for last in (False, True)),
        *(conv(c, c, (7, 7), 2, (e, e), groups=c, channels_last=last) for c, e in _DEEP for last in (False, True)),
        *(conv(c, c, (3, 3), 2, (e, e), groups=c, stride=2, rank=4) for c, e in _DEEP[1:]),
        *(
            conv(128, 128, (3, 3), 2, (14, 14), groups=g, channels_last=last)
            for g in (2, 8, 32)
            for last in (False, True)
        ),
        conv(64, 128, (5,), 4, (500,)),
        conv(256, 256, (3,), 8, (100,), rank=8),
        conv(128, 128, (9,), 4, (200,), groups=128),
        conv(16, 32, (3, 3, 3), 2, (8, 14, 14), rank=8),
        conv(32, 32, (3, 3, 3), 2, (8, 14, 14), groups=32),
        conv(16, 32, (3, 3, 3), 2, (8, 14, 14), channels_last=True, rank=8),
        linear(768, 3072, 256, dtype=torch.bfloat16),
        conv(64, 64, (3, 3), 2, (28, 28), dtype=torch.bfloat16),
        conv(96, 96, (7, 7), 1, (28, 28), groups=96, dtype=torch.bfloat16),
    ]
    return [(case, grad) for case in layers for grad in (True, False)]


_WIDTHS = ((256, 256), (768, 768), (768, 3072), (3072, 768), (1024, 1024))
_STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
_DEEP = ((96, 28), (192, 14), (384, 7))


def measure(case: Case, grad: bool, *, rounds: int, attempts: int) -> Entry:
    """Every plan that may be taken on a layer."""
    makers = peers(case, plans=True)
    modules = {name: build(makers[f"flora, {name}"], case) for name in PLANS}
    layer, x = case.make()
    tucker = modules["fused"].deltas["default"].tucker
    arguments = kind_of(layer).op(layer), x, layer.weight, tucker
    becomes = {name: functional.resolve_plan(*arguments, name, 0.0, grad) for name in PLANS}
    call = _tuples(tucker.form.plan_call(arguments[0], x, layer.weight, tucker.tensors, grad))
    picked = functional.resolve_plan(*arguments, "auto", 0.0, grad)
    steps = {becomes[name]: _step(modules[name], x, grad) for name in reversed(PLANS)}
    times = interleaved(
        steps, becomes["merged" if case.layer().weight.shape[1] == 1 else "fused"], rounds, attempts=attempts
    )
    base = next(t.quartile for t in times.values() if t.ratio == 1.0)
    seconds = {name: t.ratio * base for name, t in times.items()}
    near = [t.error / t.ratio for name, t in times.items() if seconds[name] <= 1.3 * min(seconds.values())]
    name = f"{case.name}, rank {case.rank}"
    return Entry(name, grad, call, becomes, picked, plan.plan_costs(*call), seconds, max(near))


def _step(module: torch.nn.Module, x: torch.Tensor, grad: bool) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            module(x)

    def both() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = module(x)
        y.backward(dy)

    with torch.no_grad():
        dy = torch.randn_like(module(x))
    return both if grad else forward


def fit(entries: Sequence[Entry]) -> plan.Speeds:
    """Constants with fewer and smaller losses, found one by one from the present ones."""

    def cost(speeds: plan.Speeds) -> float:
        losses = []
        for entry in entries:
            costs = plan.plan_costs(*entry.call, speeds)
            losses.append(entry.loss_of(min(entry.possible, key=costs.__getitem__)))
        return sum(math.log(loss) + (loss > WITHIN) for loss in losses)

    best = plan.SPEEDS
    least = cost(best)
    for factor in (4.0, 2.0, 1.4, 1.15):
        improved = True
        while improved:
            improved = False
            for name, value in best._asdict().items():
                for step in (factor, 1 / factor):
                    tried = best._replace(**{name: value * step})
                    if (now := cost(tried)) < least:
                        best, least, improved = tried, now, True
    return best


def summary(entries: Sequence[Entry]) -> str:
    """How many picks are good, and every one that is not."""
    judged = [entry for entry in entries if not entry.noisy]
    good = sum(entry.good for entry in judged)
    share = good / len(judged) if judged else 0.0
    lines = [
        f"{good} of {len(judged)} picks are the fastest plan or within {WITHIN - 1:.0%} ({share:.0%}; goal {GOAL:.0%})"
    ]
    if len(judged) < len(entries):
        lines.append(f"too noisy to tell: {', '.join(_name(entry) for entry in entries if entry.noisy)}")
    misses = sorted((entry for entry in judged if not entry.good), key=lambda entry: -entry.loss)
    if misses:
        rows = [(_name(e), e.picked, f"{e.loss:.2f}", *_pairs(e)) for e in misses]
        lines.append(aligned(("miss", "picked", "loss", *(f"{name}: predicted, µs" for name in PLANS)), rows))
    return "\n".join(lines)


def _name(entry: Entry) -> str:
    return f"{entry.name}, {'trained' if entry.grad else 'no grad'}"


def _pairs(entry: Entry) -> Iterator[str]:
    """Predicted cost and measured time of each plan."""
    for name in PLANS:
        yield f"{entry.predicted[name]:.2e}, {entry.seconds[entry.becomes[name]] * 1e6:.0f}"


def read(path: Path) -> list[Entry]:
    """The entries of a JSON file. Raises OSError or ValueError, naming it, if it is none of ours."""
    try:
        return [Entry(**entry | {"call": _tuples(entry["call"])}) for entry in json.loads(path.read_text())["entries"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of this program: {error!r}") from error


def _tuples(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_tuples(value) if isinstance(value, list | tuple) else value for value in values)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the grid, prints the summary and writes JSON. Returns the exit status: 1 also on a busy machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description="plan='auto' against measurement.")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="layers with one of these in their name")
    parser.add_argument("--quick", action="store_true", help="few samples, one attempt")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write instead of benchmarks/results")
    parser.add_argument("--read", type=Path, nargs="+", metavar="FILE", help="sum earlier runs up instead of measuring")
    parser.add_argument("--fit", action="store_true", help="also suggest constants for flora.plan")
    args = parser.parse_args(argv)

    def chosen(name: str) -> bool:
        return args.only is None or any(text.lower() in name.lower() for text in args.only)

    try:
        found = {(e.name, e.grad): e for path in args.read or () for e in read(path) if chosen(e.name)}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    entries = [*found.values()]
    layers = [(case, grad) for case, grad in grid() if chosen(case.name)]
    if args.only is not None and not (entries if args.read else layers):
        parser.error(
            f"--only {' '.join(map(repr, args.only))} is in no name of {'the files' if args.read else 'the grid'}"
        )
    if not args.read:
        reason = machine.busy()
        if reason is not None:
            print(f"the machine is busy: {reason}")
            if not args.anyway:
                return 1
        for case, grad in layers:
            entries.append(measure(case, grad, rounds=FEWEST if args.quick else 9, attempts=1 if args.quick else 2))
            times = ", ".join(f"{name} {seconds * 1e6:.0f} µs" for name, seconds in entries[-1].seconds.items())
            print(f"{_name(entries[-1])}: picks {entries[-1].picked} ({entries[-1].loss:.2f}); {times}", flush=True)
        path = args.json or RESULTS / f"plans-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine.describe(), "entries": [asdict(entry) for entry in entries]}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
        print(f"written to {path}")
    print(summary(entries))
    if args.fit:
        print(f"now:    {plan.SPEEDS}\nfitted: {fit([entry for entry in entries if not entry.noisy])}")
    judged = [entry.good for entry in entries if not entry.noisy]
    least = JUDGED if args.only is None else 1
    if args.only is not None:
        print("partial: only a part of the grid was judged")
    elif len(judged) < least:
        print(f"{len(judged)} judged picks are too few, {least} at least")
    return 0 if len(judged) >= least and sum(judged) >= GOAL * len(judged) else 1


if __name__ == "__main__":
    raise SystemExit(main())
