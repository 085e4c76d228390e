"""Saves that are cut off, and saves at once: a short form of ``make crash-saves``, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("crash_saves.py")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kills", "8", "--every", "29", "--limits", "4", "--disk", "0", "--saves", "4"],
        pytest.param(["--kills", "500"], marks=pytest.mark.slow),
    ],
    ids=["short", "long"],
)
def test_a_save_that_is_cut_off_leaves_the_old_adapter_or_the_new_one_whole(arguments):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "processes at once" in done.stdout.splitlines()[-1]
