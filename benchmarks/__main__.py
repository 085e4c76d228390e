"""``python -m benchmarks [--rounds N] [--only TEXT]``. Exits with 1 if a figure was too noisy to be used."""

from __future__ import annotations

import argparse
import gc

from benchmarks.cases import CASES, Case
from benchmarks.peers import BASELINE, PEERS, RefusedError
from benchmarks.report import Row, line, machine, write
from benchmarks.timing import interleaved
from flora.finetune.training import saved_bytes


def measure(case: Case, rounds: int) -> list[Row]:
    """Every peer on one layer."""
    modules, refusals = {}, {}
    for name, peer in PEERS.items():
        try:
            modules[name] = peer(case.make()[0])
        except RefusedError as refusal:
            refusals[name] = str(refusal)
    _, x = case.make()
    samples = interleaved(modules, x, rounds)
    base = samples[BASELINE]
    rows = []
    for name in PEERS:
        if name in refusals:
            rows.append(Row(case.name, name, refusal=refusals[name]))
        else:
            sample = samples[name]
            ratio, noisy = sample.quartile / base.quartile, sample.noisy or base.noisy
            rows.append(Row(case.name, name, sample, ratio, saved_bytes(modules[name], x), noisy))
    return rows


def main() -> int:
    """Measures the cases whose name holds ``--only``, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="One layer, forward and backward.")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each module")
    parser.add_argument("--only", default="", help="part of the names of the cases to measure")
    args = parser.parse_args()
    if args.rounds < 4:
        parser.error(f"--rounds {args.rounds} is too few for quartiles")
    cases = [case for case in CASES if args.only in case.name]
    if not cases:
        parser.error(f"--only {args.only!r} is in none of: {'; '.join(case.name for case in CASES)}")
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    rows = []
    for case in cases:
        print(f"{case.name}   (least, lower quartile of {args.rounds}; ratio to the frozen layer)")
        measured = measure(case, args.rounds)
        print("\n".join(line(row) for row in measured), flush=True)
        rows += measured
        gc.collect()
    print(f"written to {write(rows)}")
    noisy = sum(row.noisy for row in rows)
    if noisy:
        print(f"{noisy} of {len(rows)} figures were too noisy: run again on a quiet machine")
    return 1 if noisy else 0


if __name__ == "__main__":
    raise SystemExit(main())
