"""The examples and the page on several machines, started by torchrun and accelerate in two processes."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed
from test_examples import ENVIRONMENT, ROOT, blocks

import flora
from flora.serialization import read_adapter

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")

TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


def launch(launcher: tuple[str, ...], program: Path, *arguments: str, cwd: Path) -> str:
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *launcher, __file__, str(program), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(out: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^loss ([\d.]+)", out, re.MULTILINE)]


@pytest.mark.slow
def test_torchrun_trains_whole_and_goes_on_sharded(tmp_path):
    first = losses(launch(TORCHRUN, ROOT / "examples/distributed.py", cwd=tmp_path))
    then = losses(launch(TORCHRUN, ROOT / "examples/distributed.py", "--shard", "--resume", cwd=tmp_path))
    assert len(first) == len(then) == 4  # of one process, not of both
    assert first[-1] < first[0]
    assert max(then) < first[0]
    assert read_adapter(tmp_path / "adapter").saved == ("5",)


def test_accelerate_trains_in_two_processes(tmp_path):
    out = launch(ACCELERATE, ROOT / "examples/train_accelerate.py", cwd=tmp_path)
    assert "2 processes" in out
    assert losses(out)[-1] < 0.5 * losses(out)[0]
    assert read_adapter(tmp_path / "adapter").saved == ("classifier",)


def test_the_page_runs_as_one_program(tmp_path):
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks("docs/distributed.md")))
    out = launch(TORCHRUN, program, cwd=tmp_path)
    assert "2 processes" in out
    differences = [float(found) for found in re.findall(r"tensor\(([\d.e-]+)\)", out)]  # the two may share a line
    assert len(differences) == 2 and max(differences) < 1e-5
    assert out.count("tensor(True)") == 2
    assert flora.TuckerConfig is type(read_adapter(tmp_path / "adapter").config)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    os._exit(0)  # past the threads of PyTorch's that may still be at work when an interpreter ends
