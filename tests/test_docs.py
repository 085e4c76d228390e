"""The documentation: its code runs, its site builds without a warning, its links lead somewhere, its API is whole."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import ENVIRONMENT, ROOT, blocks, run

import flora

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
TASKS = ["docs/index.md", "docs/conv-net.md", "docs/from-lora.md", "docs/serve.md", "docs/trainer.md"]


@pytest.mark.parametrize("page", TASKS)
def test_the_blocks_of_a_page_continue_each_other_and_run(page, tmp_path):
    run("-c", "\n".join(blocks(page)), cwd=tmp_path)


def test_every_page_with_code_is_run():
    """The guide's and design.md's blocks by test_examples.py, distributed.md's by test_launchers.py."""
    others = {"docs/guide.md", "docs/design.md", "docs/distributed.md"}
    assert {page for page in PAGES if blocks(page)} == {*TASKS, *others}


def test_the_api_pages_have_every_public_name():
    listed = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", (ROOT / page).read_text(), re.MULTILINE)]
    assert len(listed) == len(set(listed))
    assert {f"flora.{name}" for name in flora.__all__} == {name for name in listed if name.count(".") == 1}
    for module in ("flora.integrations.peft", "flora.integrations.transformers"):
        for name in importlib.import_module(module).__all__:
            assert any(entry.endswith(f".{name}") for entry in listed), f"{module}.{name}"


def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=ENVIRONMENT | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    models = (tmp_path / "site" / "api" / "models" / "index.html").read_text()
    assert 'id="flora.adapt"' in models and "base_dtype" in models


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", *PAGES])
def test_links_lead_to_files(page):
    """On GitHub, where they may leave docs/; the site's own are checked when it is built."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (ROOT / page).parent.joinpath(target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", ["docs/guarantees.md", "SECURITY.md"])
def test_promises_name_tests_and_commands_that_are_there(page):
    """``::name`` is a test of the file that the page has named last."""
    text = (ROOT / page).read_text()
    for name in re.findall(r"\btest_\w+\.py\b", text):
        assert (ROOT / "tests" / name).is_file(), name
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    file = None
    for span in re.findall(r"`([^`\n]+)`", text):
        named, colons, test = span.partition("::")
        if colons or re.fullmatch(r"test_\w+\.py", named):
            file = file if named in ("", "…") else ROOT / "tests" / named
        if colons:
            assert test.partition("[")[0] in re.findall(r"^def (\w+)", file.read_text(), re.MULTILINE), span
        if span.startswith("make ") and not span.startswith("make -C "):
            assert {word for word in shlex.split(span)[1:] if "=" not in word} <= made, span


USER = """
from typing import assert_type

import torch
from torch import Tensor, nn

import flora


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


config = flora.TuckerConfig(rank=4, modules_to_save=["head"])
model = flora.adapt(Net(), config)
assert_type(model, Net)
assert_type(flora.adapt(Net(), {"body": config, "head": flora.LoRAConfig(rank=2, alpha=4.0)}), Net)
assert_type(flora.add_adapter(model, flora.KroneckerConfig(rank=2), "other"), Net)
assert_type(flora.load_adapter(Net(), "folder", trainable=False), Net)
report = flora.summary(model)
assert_type(report.trainable_parameters, int)
assert_type(report.share, float)
assert_type([row.ranks for row in report.layers], list[tuple[int, ...]])
assert_type(flora.budget(model, flora.TuckerConfig, parameters=100).rank, int | tuple[int, ...])
layer = flora.wrap(nn.Conv2d(3, 8, 3), config)
assert_type(layer, flora.AdaptedLayer)
assert_type(layer.merged, bool)
assert_type(flora.unload(model), nn.Module)
with flora.disabled(model):
    flora.merge(model)
flora.set_adapter(model, {"default": 0.5, "other": 0.5})
flora.save_adapter(model, "folder", hashes=True)
flora.TuckerConfig(rank="four")  # type: ignore[arg-type]
flora.adapt(model, config, base_type=torch.bfloat16)  # type: ignore[call-arg]
flora.summary("model")  # type: ignore[arg-type]
"""


def test_a_users_script_is_type_checked(tmp_path):
    """Where an ignored line were no error, --strict would say that nothing is to be ignored."""
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml", str(tmp_path / "user.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    assert Path(flora.__file__).with_name("py.typed").is_file()
