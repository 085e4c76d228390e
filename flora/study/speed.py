"""What a training step costs with each method: in turns, in one process, with nothing else running."""

from __future__ import annotations

import time

import torch

from flora.finetune.data import require
from flora.finetune.training import hold_statistics, step
from flora.study.plan import MAIN_METHODS, OTHER_METHODS, SEARCH_SEED, SHARE, TEXTS, UNSHARED, Run
from flora.study.records import Record, Store, digest
from flora.study.runs import Place, known_tasks, prepared

ROUNDS = 12
WARM_UP = 2  # rounds that do not count


def run(store: Store, place: Place, environment: str, *, quiet: bool) -> None:
    """Adds a line of kind "speed" for each method on the main tasks: the least seconds of a step over all rounds."""
    known = known_tasks(place.text_data)
    text = next((name for name in TEXTS if name in known), None)
    tasks = [name for name in ("animals", text) if name is not None]
    ids = {name: digest(speed=name, environment=environment) for name in tasks}
    missing = [name for name in tasks if not store.has(f"{ids[name]}-head")]
    for name in require("tqdm").tqdm(missing, desc="seconds a step", unit="task", disable=quiet):
        for record in _of_task(place, name):
            store.append(record | {"id": f"{ids[name]}-{record['method']}", "environment": environment})


def _of_task(place: Place, name: str) -> list[Record]:
    """The lines of one task, head only last, so that its line says that all are there."""
    models, optimizers, deltas = {}, {}, {}
    for method in (*MAIN_METHODS, *OTHER_METHODS):
        share = None if method in UNSHARED else SHARE
        run = Run(name, method, share, SEARCH_SEED, 1e-3, 0, "speed")
        ready, task, data, _ = prepared(place, run)
        ready.model.train()
        hold_statistics(ready.model)
        models[method], deltas[method] = ready.model, ready.deltas
        learning = [p for p in ready.model.parameters() if p.requires_grad]
        optimizers[method] = torch.optim.AdamW(learning, lr=1e-6)
    inputs, labels = data.pool.batch(torch.arange(task.batch_size))
    least = dict.fromkeys(models, float("inf"))
    for turn in range(WARM_UP + ROUNDS):
        for method, model in models.items():
            start = time.perf_counter()
            step(model, optimizers[method], inputs, labels)
            if turn >= WARM_UP:
                least[method] = min(least[method], time.perf_counter() - start)
    return [
        {
            "kind": "speed",
            "task": name,
            "method": method,
            "share": None if method in UNSHARED else SHARE,
            "parameters": deltas[method],
            "seconds_per_step": least[method],
            "ratio": least[method] / least["head"],
            "threads": torch.get_num_threads(),
        }
        for method in sorted(models, key=lambda method: method == "head")
    ]
