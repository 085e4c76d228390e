"""The short form of `make fuzz`: see tests/fuzz."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

import flora

HERE = Path(__file__).parent


@pytest.mark.parametrize(("what", "cases"), [("calls", 3000), ("files", 400)])
def test_no_case_comes_to_a_bad_end(what, cases, tmp_path):
    seed = os.environ.get("FLORA_FUZZ_SEED", "0")
    command = [sys.executable, str(HERE / "fuzz"), "--what", what, "--cases", str(cases), "--seed", seed]
    environment = os.environ | {"PYTHONPATH": str(Path(flora.__file__).parents[1]), "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"\n{cases} cases of " in result.stdout
    assert "right" in result.stdout and "ValueError" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_it_is_told_to_stop(tmp_path, sent):
    environment = os.environ | {"PYTHONPATH": str(Path(flora.__file__).parents[1]), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(HERE / "fuzz"), "--what", "files", "--cases", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        until = time.monotonic() + 300
        while not list(tmp_path.glob("*/*/spoilt")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(sent)
        output, _ = process.communicate(timeout=60)
    assert "interrupted: go on with --first" in output
    assert not list(tmp_path.iterdir())


def test_a_valid_call_may_not_be_refused(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "fuzz")
    import attacks
    import cases

    def refuse(*arguments):
        raise ValueError("not today")

    template = cases.draw_template("drop", "0")
    monkeypatch.setattr(cases, "_core", SimpleNamespace(drop=refuse))
    spoilt, valid = (cases.Case(template, Random(1)) for _ in range(2))
    assert spoilt.run() == "ValueError"
    attacks.ATTACKS["nothing"](valid)
    with pytest.raises(cases.BrokenPromiseError, match="a valid call was refused"):
        valid.run()
