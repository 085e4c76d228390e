"""Runs PEFT's own tests with FLoRA as the method: those of the release that is installed, from its source distribution.

`python tests/peft_suite [ARGS of pytest]` fetches it from the package index into build/, once.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import peft

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
FILES = ("test_custom_models.py", "test_config.py", "test_other.py")


def fetch(folder):
    """PEFT's tests, unpacked as the package ``peft_tests`` in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "peft",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--dest", folder, f"peft=={peft.__version__}"], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = next(folder.glob("peft-*/tests"))
    (tests / "__init__.py").touch()  # the source distribution leaves it out
    tests.rename(folder / "peft_tests")


def main(arguments):
    folder = REPOSITORY / "build" / "peft-suite" / peft.__version__
    if not (folder / "peft_tests").exists():
        fetch(folder)
    path = [str(REPOSITORY), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path)}
    options = ["-c", os.devnull, "--rootdir", folder, "-p", "flora_rows", "-p", "no:cacheprovider", "-q", "-rfEx"]
    files = [*(folder / "peft_tests" / name for name in FILES), HERE / "mixed.py"]
    command = [sys.executable, "-m", "pytest", *options, "--disable-warnings", *arguments, *files]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


sys.exit(main(sys.argv[1:]))
