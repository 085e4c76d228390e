"""Structural distortion, measured: how close each parametrisation can come to an update, and how close training comes.

Lines of kind "distortion", by their "part":

- "target", an update ΔW of one weight: "target" (its name), "task" (null if synthetic), "layer", "layer_kind"
  ("pointwise", "depthwise", "full" or "linear"), "shape", "parameters" (of the weight), "norm", and for each mode, null
  where its extent is 1, "leading" (how many directions hold half of ‖ΔW‖²) and "values" (the largest singular values
  of the unfolding over ‖ΔW‖, zeros at the end left out);
- "fit", the best that a method has for the "target" of another line, at several budgets: "method", and "points", one a
  budget: "share" (of the weight's entries), "budget" (so many parameters), "parameters" (the mean of what `COPIES` such
  layers have), "sizes" ([setting, parameters, copies]), "how" (`flora.study.approximations.EXACT` and others), "error",
  "spectra", "subspaces", as `flora.study.structure` defines them, errors and spectra being root mean squares over the
  copies and subspaces means. Where the method needs more parameters there is "least", the reason, instead. "values"
  where the budget is the share that runs have (`flora.study.plan.SHARE`): the approximation's, as those of the target;
- "learned", the update that a run has learned beside that of full fine-tuning with the same seed: "task", "method",
  "budget", "options", "seed", "run" and "full" (ids of the two runs), "parameters", "cosine" and "norm" (‖ΔW‖ over that
  of full fine-tuning) of all layers as one vector, and "layers": "layer", "layer_kind", "cosine", "norm", and after the
  best scalar "error", "spectra" and "subspaces". Full fine-tuning with another seed is compared, too: the yardstick.

Every line has its "environment", and "seconds".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from flora.finetune.data import require
from flora.study.approximations import COPIES, METHODS, Approximation, Fit, TooFewParametersError
from flora.study.layers import KINDS, chosen, in_depth, kind
from flora.study.plan import SHARE
from flora.study.records import Record, Store, digest
from flora.study.structure import Distortion, Mode, Reference, cosine, modes
from flora.study.synthetic import SYNTHETIC

BUDGETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
"""Of a layer, as shares of the weight's entries; none below half of LoRA's rank 1, and none above its rank 16."""

_VALUES = 20  # singular values kept of each mode
_ZERO = 1e-4  # of ‖ΔW‖: smaller values are not kept
_LARGEST = 2**18  # entries of a weight that is approximated
_SEED = 20240514  # of what approximations draw: not one by which targets are drawn, as both would be alike
_VERSION = 1  # of the procedure: a line of another one is measured again


@dataclass(frozen=True)
class Extent:
    """How much is measured: layers of each kind a task; synthetic targets, their shape and draws; budgets."""

    layers: Mapping[str, int]
    synthetic: tuple[str, ...]
    shape: tuple[int, ...]
    draws: int
    shares: tuple[float, ...]


_LAYERS = {"pointwise": 2, "depthwise": 2, "full": 4, "linear": 2}  # a full kernel is what has structure to lose

WHOLE = Extent(_LAYERS, tuple(one.name for one in SYNTHETIC), (64, 48, 3, 3), 2, BUDGETS)
QUICK = Extent(dict.fromkeys(KINDS, 1), ("tucker", "matrix"), (24, 16, 3, 3), 1, (SHARE, 0.16))


@dataclass(frozen=True)
class Target:
    """An update to approximate: how it is told from others, and what its lines say about it."""

    spec: Mapping[str, Any]
    about: Mapping[str, Any]
    read: Callable[[], Tensor]


def run(store: Store, folder: Path, *, quick: bool, quiet: bool) -> None:
    """Adds the lines that are missing.

    Args:
        store: with the runs whose updates lie in ``folder / "updates"``; tasks without them have no targets.
        folder: of the study.
        quick: small synthetic targets, one layer of each kind, two budgets.
        quiet: no progress bar.
    """
    extent = QUICK if quick else WHOLE
    updates = Updates(store, folder / "updates")
    known = {record["id"] for record in store.records("distortion")}
    environments = store.records("environment")
    environment = environments[-1]["id"] if environments else None
    jobs = [job for job in (*_learned(updates), *_fits(updates, extent)) if job.id not in known]
    for job in require("tqdm").tqdm(jobs, "distortion", disable=quiet, unit="line"):
        started = time.perf_counter()
        found = job.measure()
        record = {"kind": "distortion", "id": job.id, "environment": environment, **job.about, **found}
        store.append(rounded(record | {"seconds": time.perf_counter() - started}))


@dataclass(frozen=True)
class Job:
    """A line to add: its id, what is known of it beforehand, and what measures the rest."""

    id: str
    about: Mapping[str, Any]
    measure: Callable[[], Mapping[str, Any]]


def rounded(value: Any) -> Any:
    """The same with four significant digits in every float."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


class Updates:
    """The files of updates that runs have left, by what they are of."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.folder = folder
        self.runs = [run for run in store.records("run") if self._kept(run["id"])]
        full = [run for run in self.runs if run["method"] == "full"]
        self.full = sorted(full, key=lambda run: (-run["steps"], run["seed"]))

    def _file(self, run: str) -> Path:
        return self.folder / f"{run}.safetensors"

    def _kept(self, run: str) -> bool:
        if not self._file(run).is_file():
            return False
        with safetensors.safe_open(self._file(run), "pt") as file:
            return bool(file.keys())

    def read(self, run: str) -> dict[str, Tensor]:
        """Each adapted layer's s·ΔW that is not 0, in the order of the network."""
        found = safetensors.torch.load_file(self._file(run))
        return {name: found[name] for name in sorted(found, key=in_depth) if found[name].any()}

    def one(self, run: str, layer: str) -> Tensor:
        """That of a layer alone."""
        with safetensors.safe_open(self._file(run), "pt") as file:
            tensor: Tensor = file.get_tensor(layer)
        return tensor


# The best approximations ---------------------------------------------------------------------------------------------


def targets(updates: Updates, extent: Extent) -> Iterator[Target]:
    """Layers of every task's full fine-tuning with its first seed, and the synthetic ones."""
    for task, full in {run["task"]: run["id"] for run in reversed(updates.full)}.items():
        shapes = {name: tuple(update.shape) for name, update in updates.read(full).items()}
        for layer in chosen(shapes, extent.layers, _LARGEST):
            yield Target(
                {"run": full, "layer": layer},
                _about(f"{task}/{layer}", task, layer, shapes[layer]),
                lambda full=full, layer=layer: updates.one(full, layer),  # type: ignore[misc]
            )
    for one in SYNTHETIC:
        if one.name in extent.synthetic:
            for seed in range(extent.draws):
                yield Target(
                    {"synthetic": one.name, "shape": extent.shape, "seed": seed},
                    _about(f"{one.name}/{seed}", None, str(seed), extent.shape),
                    lambda one=one, seed=seed: one.target(extent.shape, seed),  # type: ignore[misc]
                )


def _about(name: str, task: str | None, layer: str, shape: Sequence[int]) -> dict[str, Any]:
    return {"target": name, "task": task, "layer": layer, "layer_kind": kind(shape), "shape": list(shape)}


def budgets(shape: Sequence[int], shares: Sequence[float]) -> dict[float, int]:
    """Numbers of parameters to approximate a weight with, by their share of its entries: see `BUDGETS`."""
    rank_1, size = shape[0] + _size(shape[1:]), _size(shape)
    return {share: int(share * size) for share in shares if rank_1 / 2 <= share * size <= 16 * rank_1}


def _size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _fits(updates: Updates, extent: Extent) -> Iterator[Job]:
    for target in targets(updates, extent):
        asked = budgets(target.about["shape"], extent.shares)
        references: list[Reference] = []  # decomposed when the first line needs it

        def reference(target: Target = target, references: list[Reference] = references) -> Reference:
            if not references:
                references.append(Reference(target.read()))
            return references[0]

        spec = {"part": "target", "version": _VERSION, "target": target.spec}
        yield Job(digest(**spec), {"part": "target", **target.about}, lambda known=reference: described(known()))  # type: ignore[misc]
        for name, method in METHODS.items():
            spec = {
                "part": "fit",
                "version": _VERSION,
                "target": target.spec,
                "method": name,
                "budgets": [*asked.values()],
            }
            about = {"part": "fit", "target": target.about["target"], "method": name}
            yield Job(
                digest(**spec),
                about,
                lambda known=reference, method=method, asked=asked: {  # type: ignore[misc]
                    "points": points(known(), method, asked)
                },
            )


def described(reference: Reference) -> dict[str, Any]:
    """What a "target" line says of the values."""
    leading = [None if mode is None else mode.leading for mode in reference.modes]
    size = reference.target.numel()
    return {
        "parameters": size,
        "norm": reference.norm,
        "leading": leading,
        "values": _values(reference.modes, reference),
    }


def _values(found: Sequence[Mode | None], reference: Reference) -> list[list[float] | None]:
    values = [None if mode is None else mode.values[:_VALUES] / reference.norm for mode in found]
    return [None if one is None else one[one > _ZERO].tolist() for one in values]


def points(reference: Reference, method: Approximation, asked: Mapping[float, int]) -> list[dict[str, Any]]:
    """The best approximations of a target by a method at each number of parameters, by its share of the entries."""
    known: dict[Any, tuple[Fit, list[Distortion], list[list[Mode | None]]]] = {}
    found: list[dict[str, Any]] = []
    for share, budget in asked.items():
        try:
            sizes = method.sizes(reference.target, budget)
        except TooFewParametersError as error:
            found.append({"share": share, "budget": budget, "least": str(error)})
            continue
        for size in sizes:
            if size.setting not in known:
                fit = method.fit(reference.target, size.setting, _SEED)
                decomposed = [modes(weight) for weight in fit.weights]
                pairs = zip(fit.weights, decomposed, strict=True)
                known[size.setting] = fit, [reference.distortion(w, own) for w, own in pairs], decomposed
        of_each = [(size.copies, known[size.setting][1]) for size in sizes]
        most = max(sizes, key=lambda size: size.copies).setting
        point = {
            "share": share,
            "budget": budget,
            "parameters": sum(size.parameters * size.copies for size in sizes) / COPIES,
            "sizes": [[method.label(size.setting), size.parameters, size.copies] for size in sizes],
            "how": known[most][0].how,
            **pooled(of_each),
        }
        found.append(point | ({"values": _values(known[most][2][0], reference)} if share == SHARE else {}))
    return found


def pooled(of_each: Sequence[tuple[int, Sequence[Distortion]]]) -> dict[str, Any]:
    """Errors and spectra as root mean squares and subspaces as means, over the copies that have a size, each size's
    draws counting alike."""
    weights = [copies / len(draws) for copies, draws in of_each for _ in draws]
    every = [one for _, draws in of_each for one in draws]

    def mean(values: Sequence[float | None], power: int) -> float | None:
        if any(value is None for value in values):
            return None
        total = sum(w * v**power for w, v in zip(weights, values, strict=True) if v is not None)
        return float((total / sum(weights)) ** (1 / power))

    return {
        "error": mean([one.error for one in every], 2),
        "spectra": [mean(values, 2) for values in zip(*(one.spectra for one in every), strict=True)],
        "subspaces": [mean(values, 1) for values in zip(*(one.subspaces for one in every), strict=True)],
    }


# What was learned ----------------------------------------------------------------------------------------------------


def _learned(updates: Updates) -> Iterator[Job]:
    decomposed: dict[str, dict[str, Reference]] = {}  # of one full fine-tuning, the last one that was asked for

    def references(full: str) -> dict[str, Reference]:
        if full not in decomposed:
            decomposed.clear()
            decomposed[full] = {name: Reference(update) for name, update in updates.read(full).items()}
        return decomposed[full]

    for run in sorted(updates.runs, key=lambda r: (r["task"], r["seed"], r["method"])):
        full = _full_of(run, updates)
        if full is None:
            continue
        spec = {"part": "learned", "version": _VERSION, "run": run["id"], "full": full}
        about = {"part": "learned", **{key: run[key] for key in ("task", "method", "budget", "options", "seed")}}
        about |= {"run": run["id"], "full": full, "parameters": run["parameters"]}
        yield Job(
            digest(**spec),
            about,
            lambda run=run["id"], full=full: compared(references(full), updates.read(run)),  # type: ignore[misc]
        )


def _full_of(run: Record, updates: Updates) -> str | None:
    """The full fine-tuning that a run is compared with: that of its seed, and for one of those the first seed's."""
    alike = [full for full in updates.full if (full["task"], full["steps"]) == (run["task"], run["steps"])]
    if run["method"] != "full":
        alike = [full for full in alike if full["seed"] == run["seed"]]
    return alike[0]["id"] if alike and alike[0]["id"] != run["id"] else None


def compared(full: Mapping[str, Reference], learned: Mapping[str, Tensor]) -> dict[str, Any]:
    """The figures of a "learned" line. A layer that has no update of its own counts as one of 0 in those of all."""
    dot = square = 0.0
    whole = sum(reference.norm**2 for reference in full.values())
    layers = []
    for name, reference in full.items():
        if name not in learned:
            continue
        update = learned[name].to(torch.float64)
        dot += float((update * reference.target).sum())
        square += float(update.square().sum())
        after = reference.scaled(update)
        layers.append(
            {
                "layer": name,
                "layer_kind": kind(update.shape),
                "cosine": cosine(update, reference.target),
                "norm": float(update.norm()) / reference.norm,
                "error": after.error,
                "spectra": after.spectra,
                "subspaces": after.subspaces,
            }
        )
    return {
        "cosine": dot / (square * whole) ** 0.5 if square else 0.0,
        "norm": (square / whole) ** 0.5 if whole else 0.0,
        "layers": layers,
    }
