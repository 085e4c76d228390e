"""The short form of `make fuzz`: see tests/fuzz."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flora

HERE = Path(__file__).parent


@pytest.mark.parametrize(("what", "cases"), [("calls", 3000), ("files", 400)])
def test_no_case_comes_to_a_bad_end(what, cases):
    seed = os.environ.get("FLORA_FUZZ_SEED", "0")
    command = [sys.executable, str(HERE / "fuzz"), "--what", what, "--cases", str(cases), "--seed", seed]
    environment = os.environ | {"PYTHONPATH": str(Path(flora.__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"\n{cases} cases of " in result.stdout
    assert "right" in result.stdout and "ValueError" in result.stdout
