"""The most memory that this process has had, for what must not grow."""

from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
UNKNOWN = "this system does not tell the most memory that a process has had (VmHWM)"


def megabytes() -> float | None:
    """Of resident memory, or None where the system does not tell.

    `resource.getrusage` would go on from what the process had that started this one.
    """
    lines = STATUS.read_text().splitlines() if STATUS.exists() else ()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


needed = pytest.mark.skipif(megabytes() is None, reason=UNKNOWN)
