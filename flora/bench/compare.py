"""Measures modules that do the same job beside each other: time, ratio to the frozen one, saved bytes, peak memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora.bench.case import Case
from flora.bench.machine import gemm_speed, has_amx, multiplies_bfloat16
from flora.bench.memory import exact_heap, peak_bytes, saved_bytes
from flora.bench.methods import method_peers
from flora.bench.peers import FLORA, FROZEN, LORA, AbsentError, Peer, build, peers
from flora.bench.timing import ATTEMPTS, Timing, interleaved

ROUNDS = 15


@dataclass(frozen=True)
class Row:
    """One peer in a comparison; ``absent`` says why it has no figures. ``bound`` is the greatest ratio it should have,
    ``over_bound`` the most seconds above the frozen one, ``saved_bound`` the most bytes it should keep for backward.
    """

    peer: str
    timing: Timing | None = None
    saved: int | None = None
    peak: int | None = None
    bound: float | None = None
    saved_bound: int | None = None
    over_bound: float | None = None
    absent: str | None = None

    @property
    def ratio(self) -> float | None:
        """The ratio to the frozen step, None where there is none to be used."""
        return None if self.timing is None or self.timing.noisy else self.timing.ratio

    @property
    def over(self) -> float | None:
        """The seconds above the frozen step, None where there are none to be used."""
        return None if self.timing is None or self.timing.noisy else self.timing.over

    @property
    def noisy(self) -> bool:
        return self.timing is not None and self.timing.noisy

    @property
    def met(self) -> bool | None:
        """Whether the figures are within their bounds; None where there is no bound, or no figure to be used."""
        pairs = [(self.ratio, self.bound), (self.over, self.over_bound), (self.saved, self.saved_bound)]
        judged = [value <= bound for value, bound in pairs if value is not None and bound is not None]
        unknown = self.noisy and (self.bound, self.over_bound) != (None, None)
        return all(judged) if judged and not unknown else None


@dataclass(frozen=True)
class Result:
    """All rows of one comparison. ``limit`` is the least ratio that arithmetic allows, by `Case.limit`."""

    name: str
    rows: tuple[Row, ...]
    limit: float | None = None

    def row(self, peer: str) -> Row | None:
        return next((row for row in self.rows if row.peer == peer), None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with what is derived: ratios that may be used, and which bounds are met."""
        rows = [asdict(row) | {"ratio": row.ratio, "noisy": row.noisy, "met": row.met} for row in self.rows]
        return {"name": self.name, "limit": self.limit, "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Result:
        """The inverse of `to_dict`. Raises KeyError or TypeError for anything else."""
        rows = []
        for row in values["rows"]:
            known = {name: value for name, value in row.items() if name not in ("ratio", "noisy", "met")}
            timing = known.pop("timing")
            rows.append(Row(**known, timing=None if timing is None else Timing(**timing)))
        return cls(values["name"], tuple(rows), values["limit"])


def compare(
    name: str,
    makers: Mapping[str, Callable[[], nn.Module]],
    x: Tensor,
    *,
    rounds: int = ROUNDS,
    attempts: int = ATTEMPTS,
    bounds: Mapping[str, float] | None = None,
    saved_bounds: Mapping[str, tuple[str, float]] | None = None,
) -> Result:
    """Every maker's module on x, forward and backward with x's gradient, beside the one named `peers.FROZEN`.

    A maker may raise `AbsentError`. ``saved_bounds`` gives a peer another one's saved bytes times a factor as bound.
    """
    gc.collect()
    exact_heap()
    modules: dict[str, nn.Module] = {}
    absent: dict[str, str] = {}
    for peer, make in makers.items():
        try:
            modules[peer] = make()
        except AbsentError as error:
            absent[peer] = str(error)
    with torch.no_grad():
        dy = torch.randn_like(modules[FROZEN](x))
    saved, peak, steps = {}, {}, {}
    for peer, module in modules.items():
        saved[peer] = saved_bytes(module, x)
        steps[peer] = training_step(module, x, dy)
        peak[peer] = _peak(module, x, dy)
    timings = interleaved(steps, FROZEN, rounds, attempts=attempts)
    bounds, saved_bounds = bounds or {}, saved_bounds or {}
    rows = []
    for peer in makers:
        if peer in absent:
            rows.append(Row(peer, absent=absent[peer]))
            continue
        other, factor = saved_bounds.get(peer, ("", 1.0))
        most = int(saved[other] * factor) if other in saved else None
        rows.append(Row(peer, timings[peer], saved[peer], peak[peer], bounds.get(peer), most))
    return Result(name, tuple(rows))


def measure(
    case: Case,
    *,
    rounds: int = ROUNDS,
    attempts: int = ATTEMPTS,
    of: Callable[[Case], Mapping[str, Peer]] = peers,
) -> Result:
    """Every peer ``of`` a case on its layer."""
    makers = {name: lambda peer=peer: build(peer, case) for name, peer in of(case).items()}
    result = compare(case.name, makers, case.make()[1], rounds=rounds, attempts=attempts, bounds=case.bounds)
    frozen = result.rows[0].timing
    assert frozen is not None
    limit = case.limit(frozen.quartile, gemm_speed(case.dtype)) if of is not method_peers else None
    return Result(case.name, _bounded(result, case.dtype), limit)


def _bounded(result: Result, dtype: torch.dtype) -> tuple[Row, ...]:
    """The rows with the bounds that hold on this CPU.

    In bfloat16 they are meant for AVX512-BF16. With AMX the frozen layer is several times faster: there the overhead
    should be 0.6 of PEFT LoRA's in the same run. A CPU that does not multiply bfloat16 has no bounds.
    """
    if dtype != torch.bfloat16 or (multiplies_bfloat16() and not has_amx()):
        return result.rows
    lora = result.row(LORA)
    of_lora = None if lora is None or lora.ratio is None or not has_amx() else 1 + 0.6 * (lora.ratio - 1)
    return tuple(
        Row(**(vars(row) | {"bound": of_lora if row.peer == FLORA and row.bound is not None else None}))
        for row in result.rows
    )


def training_step(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward from no gradients, as an optimizer leaves them."""
    trained = [p for p in module.parameters() if p.requires_grad]

    def step() -> None:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        y = module(x)
        y.backward(dy if dy.dtype == y.dtype else dy.to(y.dtype))

    return step


def _peak(module: nn.Module, x: Tensor, dy: Tensor) -> int | None:
    step = training_step(module, x, dy)

    def clear() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)

    peak = peak_bytes(step, clear)
    clear()
    return peak
