"""The machine that a figure belongs to: what it is, how fast it multiplies, whether something else keeps it busy."""

from __future__ import annotations

import os
import platform
import statistics
import time
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flora
from flora import functional, ops

PACKAGES = ("peft", "lycoris-lora", "tensorly-torch", "transformers")
MATRIX = 1024  # extent of the matrices whose product is the yardstick
QUIET_SECONDS = 0.5  # for which the machine is watched before a start
OTHERS = 0.10  # share of the CPUs that others may take
UNSTEADY = 0.25  # by how much the upper quartile of equal products' times may exceed the lower one
TRIES = 3  # before a machine counts as busy


def describe() -> dict[str, Any]:
    """What the figures depend on: CPU, threads, versions, and what flora's kernels run on."""
    cpu = _cpuinfo("model name") or platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "bfloat16": "AMX" if has_amx() else "native" if multiplies_bfloat16() else "emulated",
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flora": flora.__version__,
        "core": {name: value for name, value in functional.info().items() if name != "threads"}
        | {"own_products": ops.OWN_PRODUCTS, "own_convolutions": ops.OWN_CONVOLUTIONS},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16."""
    return has_amx() or not {"avx512_bf16", "bf16"}.isdisjoint(_flags())


def has_amx() -> bool:
    """Whether bfloat16 can be multiplied in tiles: a virtual machine may advertise AMX without usable palettes."""
    return "v4-amx" in functional.info()["isa_available"]


def gemm_speed(dtype: torch.dtype = torch.float32) -> float:
    """The floating-point operations a second of a large product, at the present number of threads: the best of many."""
    return 2 * MATRIX**3 / min(_products(dtype))


def busy() -> str | None:
    """Why nothing should be timed now, or None.

    Looks at what other processes (and other virtual machines, as stolen time) take of the CPUs while this one waits,
    and at how far the times of equal products scatter. Looks again, a few times, before it says no.
    """
    for _ in range(TRIES):
        reason = _busy_now()
        if reason is None:
            return None
    return reason


def _busy_now() -> str | None:
    watch = Others()
    if watch.known:
        time.sleep(QUIET_SECONDS)
        taken = watch.share()
    else:
        taken = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0
    if taken > OTHERS:
        return f"others have {taken:.0%} of its CPUs"
    low, _, high = statistics.quantiles(_products(torch.float32), n=4)
    if high / low - 1 > UNSTEADY:
        return f"the quartiles of equal matrix products' times are {high / low - 1:.0%} apart"
    return None


class Others:
    """Watches, from its making on, what others than this process take of the CPUs; stolen time counts as theirs."""

    def __init__(self) -> None:
        self._start = _ticks()
        self._own = time.process_time()

    @property
    def known(self) -> bool:
        """Whether the system tells (Linux does)."""
        return self._start is not None

    def share(self) -> float:
        """Their share of all CPUs' time, 0 to 1; 0 where the system does not tell or ticks are too few to say."""
        end = _ticks()
        if self._start is None or end is None:
            return 0.0
        hertz = os.sysconf("SC_CLK_TCK")
        used, total = ((b - a) / hertz for a, b in zip(self._start, end, strict=True))
        others = used - (time.process_time() - self._own)
        few = 3 / hertz * (os.cpu_count() or 1)  # time is counted in ticks of each CPU
        return max(0.0, others - few) / total if total > 0 else 0.0


def _ticks() -> tuple[int, int] | None:
    """(busy, all) ticks of all CPUs since boot."""
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
    used = user + nice + system + irq + softirq + steal
    return used, used + idle + iowait


def _products(dtype: torch.dtype) -> list[float]:
    """Seconds of equal products, after some that warm up."""
    a = torch.ones(MATRIX, MATRIX, dtype=dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(25):
            start = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - start)
    return seconds[5:]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache
def _cpuinfo(key: str) -> str:
    """The first CPU's line of /proc/cpuinfo, or ""."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((v.strip() for k, _, v in (line.partition(":") for line in lines) if k.strip() == key), "")


def _flags() -> set[str]:
    return {*_cpuinfo("flags").split(), *_cpuinfo("Features").split()}
