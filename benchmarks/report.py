"""One measured row, the machine it was measured on, and both as a table and as JSON."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import flora
from benchmarks.timing import Sample
from flora import functional

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One peer on one layer; ``sample`` None where it refused. ``ratio``: to the frozen layer, quartile to quartile."""

    case: str
    peer: str
    sample: Sample | None = None
    ratio: float | None = None
    saved_bytes: int | None = None
    noisy: bool = False  # this sample or the frozen layer's
    refusal: str | None = None


def line(row: Row) -> str:
    """One line of the table."""
    if row.sample is None:
        return f"  {row.peer:<24} refuses: {(row.refusal or '').splitlines()[0][:80]}"
    assert row.ratio is not None
    assert row.saved_bytes is not None
    times = f"{row.sample.least * 1e3:9.3f} {row.sample.quartile * 1e3:9.3f} ms"
    mark = f"  spread {row.sample.spread:.0%}: not to be used" if row.noisy else ""
    return f"  {row.peer:<24}{times}  ratio {row.ratio:5.2f}  saved {row.saved_bytes / 2**20:7.1f} MiB{mark}"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpus = [v for k, _, v in (s.partition(":") for s in _cpuinfo()) if k.strip() == "model name"]
    return {
        "cpu": cpus[0].strip() if cpus else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flora": flora.__version__,
        "core": functional.info(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(rows: Sequence[Row]) -> Path:
    """All rows as JSON, in a new file of ``benchmarks/results``."""
    now = datetime.datetime.now(datetime.UTC)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"layers-{now:%Y%m%d-%H%M%S}.json"
    content = {"when": now.isoformat(), "machine": machine(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
    return path
