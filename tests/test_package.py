"""What is built and installed: sdist, wheel, metadata, types."""

import ast
import inspect
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import flora
from flora import _core, reference

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist and the wheel that is built from it, not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def names_in(folder, pattern):
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if "__pycache__" not in path.parts}


def test_sdist_holds_everything(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile", "CHANGELOG.md"}
    wanted |= names_in("csrc", "*.[ch]") | names_in("flora", "*.py") | {"flora/_core.pyi", "flora/py.typed"}
    wanted |= names_in("tests", "*.py") | names_in("tests/golden", "*.npz") | names_in("docs", "*.md")
    wanted |= names_in("examples", "*.py") | names_in("benchmarks", "*.py")
    assert not wanted - held
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


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert flora.__version__ == project["version"] == version("flora-adapters")


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
        if name not in ("info", "set_isa"):
            assert list(inspect.signature(getattr(reference, name)).parameters) == list(parameters), name
