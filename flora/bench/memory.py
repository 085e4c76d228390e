"""What a training step holds, and where its memory comes from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from flora.finetune.training import saved_bytes

__all__ = ["exact_heap", "keep_heap", "peak_bytes", "saved_bytes"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def keep_heap() -> None:
    """From now on the C library gives no freed memory back, and large blocks come from the heap as small ones do.

    Does nothing where the C library is not glibc.
    """
    _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})


def exact_heap() -> None:
    """From now on large blocks come from the system and go back to it, as does at once all that is free.

    Does nothing where the C library is not glibc.
    """
    _mallopt({_MMAP_MAX: 2**16, _MMAP_THRESHOLD: 2**17})
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_bytes(step: Callable[[], None], clear: Callable[[], None]) -> int | None:
    """By how much a step raises the memory of the process at its highest, or None where the system does not tell.

    It is the kernel's own count of resident pages (VmHWM, reset beforehand through clear_refs), so that it holds
    everything: tensors, but also what flora's kernels, oneDNN and the BLAS allocate past PyTorch, which its profiler
    does not see. It runs under `exact_heap`, since what a heap keeps of earlier steps would be used again unseen. One
    step runs before, for whatever is allocated only once; ``clear`` drops its gradients, so that those of the counted
    step count.
    """
    exact_heap()
    step()
    clear()
    exact_heap()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    before = _high_water()
    step()
    return _high_water() - before


def _mallopt(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def _high_water() -> int:
    lines = (line.partition(":") for line in _STATUS.read_text().splitlines())
    return next(int(value.split()[0]) * 1024 for key, _, value in lines if key == "VmHWM")
