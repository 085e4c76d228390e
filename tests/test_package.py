"""What is built and installed: sdist, wheel, metadata, types, and what the extension brings into a process."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import flora
from flora import _core, reference

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist and the wheel that is built from it, not from the checkout, where torch is no torch."""
    folder, hidden = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("hidden")
    (hidden / "torch.py").write_text("open(__file__ + '.imported', 'w').close()\nraise ImportError('no torch here')\n")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": str(hidden)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not (hidden / "torch.py.imported").exists(), "building asked for torch"
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def names_in(folder, pattern):
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if "__pycache__" not in path.parts}


def tracked():
    """Every file of the project: as git has them in a checkout, and what the folders have elsewhere."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    names = {"setup.py", "pyproject.toml", "constraints.txt", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"}
    names |= {"Makefile", ".ci/run", ".gitignore", ".clang-format", ".pre-commit-config.yaml", "benchmarks/.gitignore"}
    names |= {"mkdocs.yml"} | names_in(".github", "*.yml") | names_in("examples", "*.ipynb")
    names |= names_in("csrc", "*.[ch]") | names_in("flora", "*.py") | {"flora/_core.pyi", "flora/py.typed"}
    names |= names_in("tests", "*.py") | names_in("tests/golden", "*.npz") | names_in("docs", "*.*")
    return names | names_in("examples", "*.py") | names_in("benchmarks", "*.py")


def test_sdist_holds_everything(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not tracked() - held
    assert not {name for name in held if name.endswith((".so", ".o", ".pyc"))}


def test_wheel_holds_the_package_alone(wheel):
    assert wheel.name.startswith("flora_adapters-0.1.0-cp311-abi3-")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {name.partition("/")[0] for name in held} == {"flora", "flora_adapters-0.1.0.dist-info"}
    assert names_in("flora", "*.py") | {"flora/_core.pyi", "flora/py.typed", "flora/_core.abi3.so"} <= held
    assert "flora_adapters-0.1.0.dist-info/licenses/LICENSE" in held
    assert not {name for name in held if name.endswith((".c", ".h", ".pyc"))}


def test_the_wheel_works(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import torch, flora\n"
        "layer = flora.Linear(5, 7, delta=flora.TuckerConfig(rank=2))\n"
        "layer(torch.ones(3, 5)).sum().backward()\n"
        "print(flora._core.__file__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == tmp_path / "flora"


def test_the_wheel_keeps_to_the_stable_abi(wheel):
    """Of CPython 3.11, as its name says: nothing from outside it, nothing that came later."""
    command = [sys.executable, "-m", "abi3audit", "--strict", "--report", str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (audit,) = json.loads(result.stdout)["specs"].values()
    (extension,) = audit["wheel"]
    assert extension["result"]["is_abi3_baseline_compatible"], extension


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert flora.__version__ == project["version"] == version("flora-adapters")


OF_THE_RUNNERS = ("sudo apt-get ", "pipx run ")


def test_the_workflows_run_what_is_there():
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix", {})
            targets = set(matrix.get("target", ()))
            assert targets <= made
            assert {added["target"] for added in matrix.get("include", ())} <= targets
            for command in (step["run"] for step in job["steps"] if "run" in step):
                made_as = command.removeprefix("${{ matrix.as }} ")
                own = made_as == "make ${{ matrix.target }}" or (ROOT / command).is_file()
                assert own or command.startswith(OF_THE_RUNNERS), command


def test_the_stub_agrees_with_the_extension():
    stub = ast.parse((ROOT / "flora" / "_core.pyi").read_text())
    declared = {node.name: node.args for node in stub.body if isinstance(node, ast.FunctionDef)}
    defined = {name: f for name, f in vars(_core).items() if inspect.isbuiltin(f)}
    assert set(declared) == set(defined)
    for name, arguments in declared.items():
        parameters = inspect.signature(defined[name]).parameters
        assert [a.arg for a in arguments.posonlyargs] == list(parameters), name
        assert not arguments.args + arguments.kwonlyargs, name
        assert all(p.kind is p.POSITIONAL_ONLY for p in parameters.values()), name
        assert defined[name].__doc__, name
        if name not in ("info", "set_isa", "takes"):
            assert list(inspect.signature(getattr(reference, name)).parameters) == list(parameters), name


# What the extension brings into a process --------------------------------------------------------------------------


def in_a_process(script):
    """The words that a script prints in a process of its own."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_extension_brings_no_other_library():
    """Neither torch, of which it may meet any version, nor an OpenMP runtime, which would be the process's second."""
    brought = in_a_process(f"""
import importlib.util, re, numpy

def libraries():
    return set(re.findall(r"/[^/\\n]+\\.so[^/\\n]*$", open("/proc/self/maps").read(), flags=re.MULTILINE))

before = libraries()
spec = importlib.util.spec_from_file_location("_core", {_core.__file__!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print(*(libraries() - before))
""")
    assert brought == ["/" + Path(_core.__file__).name]


def test_importing_flora_leaves_denormals_alone():
    """Linked with -ffast-math, a library sets a flag of the CPU's by which the whole process loses them."""
    assert (
        in_a_process("""
import flora, numpy, torch

def halved_tiny_numbers():
    yield float.fromhex("0x1p-1070") * 0.5
    yield (numpy.full(10, 1e-310) * 0.5).min()
    yield (torch.full((1 << 20,), 1e-40) * 0.5).min()

layer = flora.Linear(64, 64, delta=flora.TuckerConfig(rank=8))
layer(torch.ones(4096, 64)).sum().backward()
print(*(bool(number > 0) for number in halved_tiny_numbers()))
""")
        == ["True"] * 3
    )


def test_a_forked_child_computes_the_same_serially():
    """It inherits a pool whose threads are gone; to wait for them would be for ever."""
    assert in_a_process("""
import os, signal, numpy, torch
from flora import _core

rng = numpy.random.default_rng(0)
shapes = {"x": (4096, 64), "dy": (4096, 48), "u_in": (64, 8), "core": (8, 8), "u_out": (48, 8)}
x, dy, u_in, core, u_out = (rng.standard_normal(shape, dtype=numpy.float32) for shape in shapes.values())

def results(threads=None):
    if threads is not None:
        torch.set_num_threads(threads)
    y, h = numpy.zeros_like(dy), numpy.zeros((len(x), 8), numpy.float32)
    gradients = [numpy.zeros_like(array) for array in (x, u_in, core, u_out)]
    _core.tucker_linear_forward(y, h, x, u_in, core, u_out, 0.5)
    _core.tucker_linear_backward(*gradients, dy, x, h, u_in, core, u_out, 0.5)
    return b"".join(array.tobytes() for array in (y, h, *gradients))

expected = results(threads=1)
results(threads=2)
assert _core.info()["pool"] == "torch" and _core.info()["threads"] == 2, _core.info()
child = os.fork()
if child == 0:
    signal.alarm(300)
    same = results() == expected and (_core.info()["pool"], _core.info()["threads"]) == ("serial", 1)
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1], _core.info()["pool"])
""") == ["0", "torch"]
