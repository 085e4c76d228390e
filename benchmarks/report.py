"""A run as JSON, and docs/benchmarks.md from it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora.bench import machine
from flora.bench.compare import Result
from flora.bench.tables import megabytes, microseconds, ratios

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

PARTS = {
    "layers": "One layer, float32",
    "channels_last": "One layer, float32, channels_last",
    "bfloat16": "One layer, bfloat16 activations and base",
    "methods": "Structured matrices and rescaling, float32",
    "small": "Small calls, float32",
    "models": "A whole training step, float32",
    "curves": "How the cost grows",
}
"""The parts of a run and their titles."""

_INTRODUCTION = """# Benchmarks

`make bench ARGS=--docs` writes this file. A figure is the time of a step, forward and backward with the gradient of
the input and of all that learns, as a ratio to the same step of the frozen layer or network, in one process and in
turns; `flora/bench/timing.py` says how, and when a figure is thrown away as noisy. What is above 1 is the overhead.
The *limit* is what the adapter's own arithmetic would cost at the speed of the machine's matrix product, by the
cheapest of flora's plans. A dash: the peer does not serve the layer. All have rank 16 (kernel rank 2),
Kronecker 32; the Tucker peers are the same function. `python -m flora bench` measures your own layers on your own
machine.
"""

_SMALL = """Microseconds of a call, lower quartile of samples of many calls each, and the median of their paired
differences to the frozen layer's: what is added to a call is no share of it here. On the Linear flora should add at
most 15 µs without gradients, with all of them not more than PEFT LoRA.
"""

_SAVED = "Kept for backward, MiB (each storage once, weights included):"
_PEAK = "Peak of a step, MiB above what was resident before it:"


@dataclass
class Run:
    """Everything that was measured: results by part; a curve is its points' results by value."""

    machine: Mapping[str, Any] = field(default_factory=machine.describe)
    when: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    results: dict[str, list[Result]] = field(default_factory=dict)
    curves: dict[str, dict[int, Result]] = field(default_factory=dict)

    def all(self) -> list[Result]:
        """Every result of every part."""
        return [
            *(result for results in self.results.values() for result in results),
            *(result for points in self.curves.values() for result in points.values()),
        ]

    def write(self, path: Path) -> None:
        """The run as one JSON file."""
        content = {
            "machine": self.machine,
            "when": self.when,
            "results": {part: [result.to_dict() for result in results] for part, results in self.results.items()},
            "curves": {
                name: [{"value": value} | result.to_dict() for value, result in points.items()]
                for name, points in self.curves.items()
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Run:
        """Runs, at least one, of one machine as one; a comparison that is in several is taken from the last.

        Raises OSError or ValueError, naming the file, for one that is none of ours or of another machine.
        """
        first, *others = paths
        whole = cls._read(first)
        for path in others:
            run = cls._read(path)
            if whole.machine != run.machine:
                differing = [key for key, value in run.machine.items() if whole.machine.get(key) != value]
                raise ValueError(f"{path} is of another machine or setting: {', '.join(differing)}")
            whole = whole._with(run)
        return whole

    @classmethod
    def _read(cls, path: Path) -> Run:
        try:
            content = json.loads(path.read_text())
            return cls(
                content["machine"],
                content["when"],
                {part: [*map(Result.from_dict, results)] for part, results in content["results"].items()},
                {
                    name: {point["value"]: Result.from_dict(point) for point in points}
                    for name, points in content["curves"].items()
                },
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no result of this program: {error!r}") from error

    def _with(self, later: Run) -> Run:
        results = {
            part: [*{r.name: r for r in [*self.results.get(part, ()), *later.results.get(part, ())]}.values()]
            for part in [*self.results, *later.results]
        }
        return Run(self.machine, later.when, results, self.curves | later.curves)


def markdown(run: Run, drawings: Mapping[str, str]) -> str:
    """docs/benchmarks.md: ``drawings`` holds the files of the curves by title."""
    parts = [_INTRODUCTION, f"Measured on {run.when[:10]}: {_machine(run.machine)}.\n"]
    for part, title in PARTS.items():
        results = run.results.get(part)
        if not results:
            continue
        peers = _peers(results)
        if part == "small":
            parts += [f"## {title}\n", _SMALL, microseconds(results, peers), "", *_absent(results), *_noisy(results)]
            continue
        parts += [f"## {title}\n", ratios(results, peers), ""]
        parts += [f"{_SAVED}\n", megabytes(results, peers, "saved"), ""]
        if any(row.peak is not None for result in results for row in result.rows):
            parts += [f"{_PEAK}\n", megabytes(results, peers, "peak"), ""]
        parts += [*_absent(results), *_noisy(results)]
    if drawings:
        parts.append("## Drawings\n")
        parts += [f"![{title}]({file})\n" for title, file in drawings.items()]
    return "\n".join(parts)


_SHOWN = ("full fine-tuning", "PEFT LoRA", "ΔW rebuilt", "factored, plain PyTorch", "flora")
_BEGIN, _END = "<!-- benchmarks: written by make bench ARGS=--docs -->", "<!-- end of benchmarks -->"


def into_readme(readme: str, run: Run) -> str:
    """The README's text with a short table of a run's single layers, and its machine, between the two marks."""
    results = [result for part in ("layers", "channels_last", "bfloat16") for result in run.results.get(part, ())]
    before, _, rest = readme.partition(_BEGIN)
    after = rest.partition(_END)[2]
    table = f"{ratios(results, _SHOWN)}\n\nMeasured on {run.when[:10]}: {_machine(run.machine)}."
    return f"{before}{_BEGIN}\n{table}\n{_END}{after}"


def _peers(results: Sequence[Result]) -> list[str]:
    """Every peer that some result has figures of, in order."""
    rows = [row for result in results for row in result.rows]
    measured = {row.peer for row in rows if row.timing is not None}
    return [peer for peer in dict.fromkeys(row.peer for row in rows) if peer in measured]


def _absent(results: Iterable[Result]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for row in result.rows:
            if row.absent is not None:
                reasons.setdefault((row.peer, row.absent), []).append(result.name)
    lines = [f"- {peer}, on {'; '.join(names)}: {reason}" for (peer, reason), names in reasons.items()]
    return ["Not served:\n", *lines, ""] if lines else []


def _noisy(results: Iterable[Result]) -> list[str]:
    names = [f"{row.peer} on {result.name}" for result in results for row in result.rows if row.noisy]
    return [f"Too noisy to be used: {'; '.join(names)}.\n"] if names else []


def _machine(about: Mapping[str, Any]) -> str:
    core = about["core"]
    own = {"own_products": "own products of gradients", "own_convolutions": "minimal filtering"}
    kernels = ", ".join([f"kernels {core.get('isa')}", *(text for name, text in own.items() if core.get(name))])
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version is not None)
    return (
        f"{about['cpu']}, {about['cpus']} CPUs, {about['threads']} threads, bfloat16 {about['bfloat16']}, "
        f"{about['system']}, Python {about['python']}, torch {about['torch']}, flora {about['flora']} "
        f"({kernels}), {packages}"
    )
