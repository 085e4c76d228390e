"""Runs in processes of their own, several at once, one thread each: on one thread a run repeats bit for bit."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import safetensors.torch
import torch

from flora.study.data import Data, corpora
from flora.study.methods import METHODS, Prepared, adapted_weights
from flora.study.plan import Comparison, Run
from flora.study.records import Record
from flora.study.tasks import Task, tasks
from flora.study.training import learn, score


@dataclass(frozen=True)
class Place:
    """Where the study reads and writes: ``--text-data``, and the folder of its store."""

    text_data: str | None
    folder: Path


@cache
def known_tasks(text_data: str | None) -> dict[str, Task]:
    """The tasks by name; read once in a process."""
    return tasks(corpora(text_data))


@cache
def _data(text_data: str | None, task: str) -> Data:
    return known_tasks(text_data)[task].load()


def prepared(place: Place, run: Run) -> tuple[Prepared, Task, Data, int]:
    """A run's network before it learns; its task, data, and the number of weights that methods adapt.

    The classifier is drawn by the run's seed, the same for every method.
    """
    task, data = known_tasks(place.text_data)[run.task], _data(place.text_data, run.task)
    torch.manual_seed(run.seed)
    model = task.network.build(len(data.classes), place.folder / "pretrained")
    weights = adapted_weights(model, task.network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of layers that a method leaves out: the report has the counts
        ready = METHODS[run.method].prepare(model, task.network, run.share, run.options)
    return ready, task, data, weights


def carry_out(place: Place, run: Run) -> Record:
    """Does one run; returns its line of the store, but for what the store adds."""
    start = time.perf_counter()
    ready, task, data, weights = prepared(place, run)
    train, validation = data.drawn(task.train, task.validation, run.seed)
    sizes = {"steps": run.steps, "batch_size": task.batch_size}
    learned = learn(ready.model, train, **sizes, lr=run.lr, seed=run.seed, options=run.options)
    diverged = learned.train_loss is None
    if run.keep_updates and not diverged:
        _keep(ready, place.folder / "updates" / f"{run.id}.safetensors")
    learning = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
    return {
        "kind": "run",
        "id": run.id,
        **{name: value for name, value in asdict(run).items() if name != "keep_updates"},
        **sizes,
        "budget": None if run.share is None else round(run.share * weights),
        "parameters": ready.deltas,
        "head_parameters": learning - ready.deltas,
        "adapted_weights": weights,
        "config": ready.config,
        "diverged": diverged,
        "train_loss": learned.train_loss,
        "validation": 0.0 if diverged else score(ready.model, validation),
        "test": (0.0 if diverged else score(ready.model, data.test)) if run.stage == "final" else None,
        "seconds": time.perf_counter() - start,
        "seconds_per_step": learned.seconds_per_step,
    }


def _keep(ready: Prepared, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    safetensors.torch.save_file(ready.updates(), aside)
    aside.replace(file)


def pending(comparisons: Sequence[Comparison], done: dict[str, Record], folder: Path) -> list[Run]:
    """The runs that can be begun now, once each, in order: searches, and what their results allow."""
    found: dict[str, Run] = {}
    for comparison in comparisons:
        for run in (*comparison.search(), *(comparison.final(done) or ())):
            lost = run.keep_updates and not (folder / "updates" / f"{run.id}.safetensors").exists()
            if run.id not in done or (lost and not done[run.id]["diverged"]):
                found.setdefault(run.id, run)
    return list(found.values())


def count(comparisons: Sequence[Comparison]) -> int:
    """How many different runs the comparisons have."""
    searches = {run.id for comparison in comparisons for run in comparison.search()}
    final = {(c.task, c.method, c.share, c.steps, seed, str(c.options)) for c in comparisons for seed in c.seeds}
    return len(searches) + len(final)


def carried_out(
    place: Place, comparisons: Sequence[Comparison], done: dict[str, Record], jobs: int
) -> Iterator[Record]:
    """Does what is missing, ``jobs`` at once, and yields each line as it comes; ``done`` learns of it.

    Raises RuntimeError, naming the run, if one fails or a process dies.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet_worker) as pool:
        running: dict[Future[Record], Run] = {}
        try:
            while True:
                begun = {run.id for run in running.values()}
                for run in pending(comparisons, done, place.folder):
                    if len(running) < jobs and run.id not in begun:
                        running[pool.submit(carry_out, place, run)] = run
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running[future]
                    try:
                        record = future.result()
                    except BrokenProcessPool:
                        raise
                    except Exception as error:
                        raise RuntimeError(f"{run.method} on {run.task}, seed {run.seed}: {error}") from error
                    del running[future]
                    done[record["id"]] = record
                    yield record
        except BrokenProcessPool as error:
            names = ", ".join(f"{run.method} on {run.task}" for run in running.values())
            raise RuntimeError(f"a process of the study died (too little memory?) during {names}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _quiet_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _end_with_parent() -> None:
    """A pool's process does not notice by itself that there is no one left to work for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
