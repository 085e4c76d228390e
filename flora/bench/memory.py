"""What a training step holds."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from flora.finetune.training import saved_bytes

__all__ = ["peak_bytes", "saved_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_bytes(step: Callable[[], None], clear: Callable[[], None]) -> int | None:
    """By how much a step raises the memory of the process at its highest, or None where the system does not tell.

    It is the kernel's own count of resident pages (VmHWM, reset beforehand through clear_refs), so that it holds
    everything: tensors, but also what flora's kernels, oneDNN and the BLAS allocate past PyTorch, which its profiler
    does not see. What the heap keeps of earlier steps is handed back first (malloc_trim), or it would be used again
    unseen. One step runs before, for whatever is allocated only once; ``clear`` drops its gradients, so that those of
    the counted step count.
    """
    step()
    clear()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not _CLEAR.exists():
        return None
    trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    before = _high_water()
    step()
    return None if before is None else (_high_water() or before) - before


def _high_water() -> int | None:
    for line in _STATUS.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "VmHWM":
            return int(value.split()[0]) * 1024
    return None
