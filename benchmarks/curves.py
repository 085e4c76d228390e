"""How the cost grows: flora and PEFT LoRA on a Linear and a 3×3 convolution, over rows, rank, channels and threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from flora.bench.case import RANK, Case, conv, linear
from flora.bench.compare import Result, compare
from flora.bench.peers import FLORA, FROZEN, LORA, build, peers

SHOWN = (FROZEN, LORA, FLORA)


@dataclass(frozen=True)
class Curve:
    """Cases along one quantity; ``by_threads`` if the quantity is the number of threads."""

    name: str
    quantity: str
    points: Mapping[int, Case]
    by_threads: bool = False


def _curve(kind: str, quantity: str, points: Mapping[int, Case], by_threads: bool = False) -> Curve:
    return Curve(f"{kind} over {quantity}", quantity, points, by_threads)


def _threads() -> list[int]:
    """1, 2, 4 … and all."""
    most = torch.get_num_threads()
    return sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i <= most)})


def _conv(channels: int, *, batch: int = 8, rank: int = RANK) -> Case:
    return conv(channels, channels, (3, 3), batch, (28, 28), rank=rank)


def curves(*, quick: bool = False) -> list[Curve]:
    """All curves; ``quick`` keeps two points of each."""
    rows, batches, ranks = (64, 256, 1024, 4096), (1, 4, 16), (4, 8, 16, 32, 64)
    layers = {"Linear 768→768, 1024 rows": linear(768, 768, 1024), "Conv 128→128 3×3, 8×28×28": _conv(128)}
    found = [
        _curve("Linear 768→768", "rows", {n: linear(768, 768, n) for n in rows}),
        _curve("Linear 768→768, 1024 rows", "rank", {r: linear(768, 768, 1024, rank=r) for r in ranks}),
        _curve("Linear, 1024 rows", "channels", {n: linear(n, n, 1024) for n in (128, 256, 512, 1024, 2048)}),
        _curve("Conv 128→128 3×3, 28×28", "batch", {n: _conv(128, batch=n) for n in batches}),
        _curve("Conv 128→128 3×3, 8×28×28", "rank", {r: _conv(128, rank=r) for r in ranks}),
        _curve("Conv 3×3, 8×28×28", "channels", {n: _conv(n) for n in (32, 64, 128, 256)}),
        *(_curve(kind, "threads", dict.fromkeys(_threads(), case), True) for kind, case in layers.items()),
    ]
    if quick:
        found = [replace(curve, points=dict([*curve.points.items()][:2])) for curve in found]
    return found


def measure(curve: Curve, *, rounds: int, attempts: int) -> dict[int, Result]:
    """The comparison at each point."""
    before = torch.get_num_threads()
    results = {}
    try:
        for value, case in curve.points.items():
            torch.set_num_threads(value if curve.by_threads else before)
            makers = {name: partial(build, peer, case) for name, peer in peers(case).items() if name in SHOWN}
            results[value] = compare(case.name, makers, case.make()[1], rounds=rounds, attempts=attempts)
    finally:
        torch.set_num_threads(before)
    return results
