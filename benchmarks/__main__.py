"""``python -m benchmarks``: flora beside its peers. Exits with 1 if the machine was too busy for some figure."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import cases, curves, models, plots, small
from benchmarks.report import DOCS, PARTS, RESULTS, Run, into_readme, markdown
from flora.bench import compare, machine
from flora.bench.command import any_noisy
from flora.bench.compare import ROUNDS
from flora.bench.methods import method_peers
from flora.bench.peers import peers
from flora.bench.tables import microseconds, ratios, terminal
from flora.bench.timing import ATTEMPTS, FEWEST

MODEL_ROUNDS = 5  # a step takes seconds: more rounds, or a second attempt, would be many minutes more
MODEL_ATTEMPTS = 1
SMALL_ROUNDS = 60
CURVE_ROUNDS = 9
LAYERS = {
    "layers": cases.LAYERS,
    "channels_last": cases.CHANNELS_LAST,
    "bfloat16": cases.BFLOAT16,
    "methods": cases.METHODS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON and drawings. Returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        run = Run.read(args.read) if args.read else _run(parser, args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if run is None:
        return 1
    target = args.json or RESULTS / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    run.write(target)
    drawn = plots.draw(run, DOCS if args.docs else target.with_suffix(""))
    print(f"written to {target} and, {len(drawn)} drawings, {DOCS if args.docs else target.with_suffix('')}")
    if args.docs:
        (DOCS / "benchmarks.md").write_text(markdown(run, drawn))
        readme = DOCS.parent / "README.md"
        readme.write_text(into_readme(readme.read_text(), run))
    return 1 if any_noisy(run.all()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="flora beside its peers.")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="what has one of these in its name")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[*PARTS], help="all parts")
    parser.add_argument("--quick", action="store_true", help="few samples, one attempt, short curves")
    parser.add_argument("--plans", action="store_true", help="also each of flora's plans by itself, on single layers")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine too; noisy figures are marked")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md and the README's table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write instead of benchmarks/results")
    parser.add_argument("--read", type=Path, nargs="+", metavar="FILE", help="put earlier results together instead")
    return parser


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Run | None:
    """Measures what the options ask for; None on a busy machine."""

    def chosen(name: str) -> bool:
        return any(text.lower() in name.lower() for text in args.only)

    rounds = {"layers": ROUNDS, "small": SMALL_ROUNDS, "models": MODEL_ROUNDS, "curves": CURVE_ROUNDS}
    rounds = dict.fromkeys(rounds, FEWEST) if args.quick else rounds
    attempts = 1 if args.quick else ATTEMPTS
    layers = {part: [c for c in LAYERS[part] if chosen(c.name)] for part in args.part if part in LAYERS}
    calls = [c for c in small.CALLS if chosen(c.name)] if "small" in args.part else []
    networks = [m for m in models.MODELS if chosen(m.name)] if "models" in args.part else []
    lines = [c for c in curves.curves(quick=args.quick) if chosen(c.name)] if "curves" in args.part else []
    if not (any(layers.values()) or calls or networks or lines):
        parser.error(f"--only {' '.join(map(repr, args.only))} is in no name of {', '.join(args.part)}")
    run = Run()
    print(", ".join(f"{key} {value}" for key, value in run.machine.items() if not isinstance(value, dict)))
    reason = machine.busy()
    if reason is not None:
        print(f"the machine is busy: {reason}")
        if not args.anyway:
            return None
    for part, found in layers.items():
        of = method_peers if part == "methods" else partial(peers, plans=args.plans)
        for case in found:
            result = compare.measure(case, rounds=rounds["layers"], attempts=attempts, of=of)
            run.results.setdefault(part, []).append(result)
            print(f"\n{terminal(result)}", flush=True)
    for call in calls:
        result = small.measure(call, rounds=rounds["small"], attempts=attempts)
        run.results.setdefault("small", []).append(result)
        print(f"\n{call.name}\n{microseconds([result], small.SHOWN)}", flush=True)
    for model in networks:
        result = models.measure(model, rounds=rounds["models"], attempts=min(attempts, MODEL_ATTEMPTS))
        run.results.setdefault("models", []).append(result)
        print(f"\n{terminal(result)}", flush=True)
    for curve in lines:
        points = curves.measure(curve, rounds=rounds["curves"], attempts=attempts)
        run.curves[curve.name] = points
        print(f"\n{curve.name}\n{ratios([*points.values()], curves.SHOWN)}", flush=True)
    return run


if __name__ == "__main__":
    raise SystemExit(main())
