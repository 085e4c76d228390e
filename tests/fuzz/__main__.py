"""Calls of every C function with arguments that are wrong in every way, and adapter files that are.

    python tests/fuzz --cases 200000 --seed 1

A case follows from the seed and its number alone. The cases run in a process of their own: when that dies or hangs, the
case that it was at is reported with the command that runs it alone, and another process goes on behind it. Prints how
many cases of each kind came to which end, also when it is interrupted; the exit status is 1 if any came to a bad one.
"""

from __future__ import annotations

import argparse
import collections
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PATIENCE = 300
"""Seconds that one case may take."""

FOLDER = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--what", choices=("calls", "files"), default="calls")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        from serve import serve

        serve(options.what, options.seed, options.first, options.cases)
        return 0
    return campaign(options)


def campaign(options: argparse.Namespace) -> int:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    start, at, end = time.monotonic(), options.first, options.first + options.cases
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="flora-fuzz-") as folder:
            while at < end:
                at = child(options, at, end, counts, folder)
    except KeyboardInterrupt:
        done = sum(counter.total() for counter in counts.values())
        print(f"interrupted: go on with --first {options.first + done} --cases {options.cases - done}")
    outcomes = sorted({outcome for counter in counts.values() for outcome in counter})
    print(f"{'kind':44}", *(f"{outcome:>12}" for outcome in outcomes))
    for kind in sorted(counts):
        print(f"{kind:44}", *(f"{counts[kind][outcome] or '':>12}" for outcome in outcomes))
    total = sum(counts.values(), collections.Counter())
    print(f"{'all':44}", *(f"{total[outcome]:>12}" for outcome in outcomes))
    bad = sum(total[outcome] for outcome in ("FAILED", "DIED", "HUNG"))
    print(f"{total.total()} cases of {len(counts)} kinds in {time.monotonic() - start:.0f} s, {bad} bad ones")
    return bad > 0


def child(
    options: argparse.Namespace, at: int, end: int, counts: dict[str, collections.Counter[str]], folder: str
) -> int:
    """Runs cases in a process until it ends, its temporary files in a folder; gives the number of the next case."""
    command = [sys.executable, "-X", "faulthandler", str(FOLDER), "--serve", "--what", options.what]
    command += ["--seed", str(options.seed), "--first", str(at), "--cases", str(end - at)]
    limits = "allocator_may_return_null=1:max_allocation_size_mb=4096"  # of AddressSanitizer, as MEMORY is without it
    environment = os.environ | {"ASAN_OPTIONS": f"{os.environ.get('ASAN_OPTIONS', '')}:{limits}", "TMPDIR": folder}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            at, hung = follow(process, options, at, counts)
        finally:
            if process.poll() is None:
                process.kill()
    status = process.wait()
    if status == 0 and at == end:
        return end
    if status == 1:
        sys.exit(f"the fuzzer itself failed at case {at}")
    outcome = "HUNG" if hung else "DIED"
    counts["unknown"][outcome] += 1
    report(options, at, f"{outcome}, exit status {process.returncode}")
    return at + 1


def follow(
    process: subprocess.Popen[bytes], options: argparse.Namespace, at: int, counts: dict[str, collections.Counter[str]]
) -> tuple[int, bool]:
    """Counts what the process reports until it ends or hangs; the case that it was at, and whether it hangs."""
    assert process.stdout is not None
    rest = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        if not ready:
            return at, True
        data = os.read(process.stdout.fileno(), 1 << 16)
        if not data:
            process.wait()
            return at, False
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            number, kind, outcome, *words = line.decode().split("\t")
            counts[kind][outcome] += 1
            at = int(number) + 1
            if words:
                report(options, int(number), f"{kind}: {words[0]}")


def report(options: argparse.Namespace, number: int, text: str) -> None:
    alone = f"python tests/fuzz --what {options.what} --seed {options.seed} --first {number} --cases 1"
    print(f"{text}\n  {alone}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
