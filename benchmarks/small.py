"""Calls so small that what an adapter adds is a matter of microseconds, not of arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from flora.bench.case import Case, conv, linear
from flora.bench.compare import Result, Row, training_step
from flora.bench.peers import FLORA, FROZEN, LORA, AbsentError, build, peers
from flora.bench.timing import interleaved

SHOWN = (FROZEN, LORA, FLORA)
MOST = 15e-6  # seconds that flora should add to a call without gradients


@dataclass(frozen=True)
class Call:
    """A layer, with all gradients or none; ``bounded`` if flora has a bound on it."""

    case: Case
    grad: bool
    bounded: bool

    @property
    def name(self) -> str:
        return f"{self.case.name}, {'forward and backward' if self.grad else 'no grad'}"


CALLS = [
    Call(case, grad, bounded)
    for case, bounded in ((linear(768, 768, 1), True), (conv(64, 64, (3, 3), 1, (7, 7)), False))
    for grad in (False, True)
]


def measure(call: Call, *, rounds: int, attempts: int) -> Result:
    """The peers on a call. With gradients flora should add no more than PEFT LoRA does in the same run."""
    case, x = call.case, call.case.make()[1]
    steps, absent = {}, {}
    for name in SHOWN:
        try:
            module = build(peers(case)[name], case)
        except AbsentError as error:
            absent[name] = str(error)
            continue
        dy = torch.randn_like(module(x).detach())
        steps[name] = training_step(module, x, dy) if call.grad else partial(module, x)
    with torch.set_grad_enabled(call.grad):
        timings = interleaved(steps, FROZEN, rounds, attempts=attempts)
    rows = {name: Row(name, timings.get(name), absent=absent.get(name)) for name in SHOWN}
    if call.bounded:
        rows[FLORA] = replace(rows[FLORA], over_bound=rows[LORA].over if call.grad else MOST)
    return Result(call.name, tuple(rows.values()))
